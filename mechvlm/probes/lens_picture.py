"""The picture of a logit lens: words by state, or where the patches lie on the image."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.fitted import write_in_cell
from mechvlm.figures.headings import short_name
from mechvlm.figures.image_map import image_map, on_grid
from mechvlm.figures.style import STATE, color_bar, number_ticks, position_ticks, text
from mechvlm.figures.token_axis import mark_spans, runs_of
from mechvlm.inputs.batch import Inputs, picture_of

WORDS_UP_TO = 80
"""Positions up to which a picture shows the words; with more of them they would overlap."""


class LensPicture:
    """The plot of a `LogitLensResult`, from its fields."""

    ids: Int[Tensor, "state point k"]
    probs: Float[Tensor, "state point k"]
    states: tuple[int, ...]
    example: Int[Tensor, " point"]
    position: Int[Tensor, " point"]
    vocabulary: tuple[tuple[int, str], ...]
    model: str
    cells: Int[Tensor, "point 3"] | None
    _only: Any
    _patches: Any
    _state: Any

    @plots(lambda self, on=None, image=0, **_: self._size_of_image(image) if self._on(on) == "image" else self._size)
    def plot(
        self,
        canvas: Canvas,
        on: str | None = None,
        state: int | None = None,
        image: int = 0,
        inputs: Inputs | None = None,
    ) -> None:
        """Each position's likeliest token on its probability's color, by state or on the image.

        Args:
            on: "tokens" draws all states, with words for up to 80 positions; "image" one state,
                its words where the patches lie. By default tokens, and the image where the words of
                its patches would not fit.
            state: that of the image; by default the one whose words are likeliest on average.
            image: which of the prompt's images.
            inputs: those that were read; with them the words lie over the picture.

        Raises:
            ValueError: for another `on`, for several examples on one image, and where visual tokens
                have no row and column.
        """
        if self._on(on) == "tokens":
            self._draw_states(canvas)
        else:
            self._draw_on_image(canvas, state, image, inputs)

    def _on(self, on: str | None) -> str:
        if on not in (None, "tokens", "image"):
            raise ValueError(f"on={on!r} was asked for: a lens is drawn on 'tokens' or on the 'image'.")
        on_one = self.cells is not None and bool((self.cells[:, 0] == 0).all()) and len(set(self.example.tolist())) == 1
        return on or ("image" if on_one and len(self.position) > WORDS_UP_TO else "tokens")

    @property
    def _size(self) -> tuple[float, float]:
        n_states, n_points, _ = self.ids.shape
        return min(2 + 0.4 * n_points, 14.0), 1.8 + 0.28 * n_states

    def _size_of_image(self, image: int) -> tuple[float, float]:
        """Wide enough for words of seven letters in the patches of most models."""
        own = torch.zeros(1, 3) if self.cells is None else self.cells[self.cells[:, 0] == image]
        rows, cols = own[:, 1:].amax(0).tolist() if len(own) else (0, 0)
        width = min(max(0.36 * (cols + 1), 4.0), 9.0)
        return width + 1.6, min(width * (rows + 1) / (cols + 1), 10.0) + 0.8

    def _draw_states(self, canvas: Canvas) -> None:
        ax, n_points = canvas.ax, len(self.position)
        top, name = self.probs[:, :, 0].numpy(), dict(self.vocabulary)  # [state point]
        mesh = ax.imshow(top, origin="lower", aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1)
        longest = 8 if n_points <= 48 else 6
        for row, col in np.ndindex(*top.shape) if n_points <= WORDS_UP_TO else ():
            word = text(name[int(self.ids[row, col, 0])], longest)
            color = "white" if top[row, col] > 0.6 else "#222222"
            write_in_cell(ax, col, row, word, may_be_cut=True, fontsize="xx-small", color=color)
        number_ticks(ax.yaxis, self.states)
        position_ticks(ax, self.position.tolist())
        ax.set_ylabel(STATE)
        ax.set_xlabel("position")
        ax.grid(False)
        ax.spines[:].set_visible(True)
        mark_spans(ax, self._spans())
        dropped = "" if n_points <= WORDS_UP_TO else f"words left out: {n_points} positions"
        canvas.head(f"Logit lens: likeliest token, {short_name(self.model)}", dropped)
        color_bar(ax, mesh, "probability")

    def _spans(self) -> list[tuple[float, float, str]]:
        """The image's points, of each example where there are several."""
        several = len(set(self.example.tolist())) > 1
        is_image = torch.zeros_like(self.example, dtype=torch.bool) if self.cells is None else self.cells[:, 0] >= 0
        kinds = [
            f"{'image' if image else ''}{f' of example {example}' if several else ''}" if image else f"{example}"
            for image, example in zip(is_image.tolist(), self.example.tolist(), strict=True)
        ]
        return [(first - 0.5, last + 0.5, kind) for first, last, kind in runs_of(kinds) if kind.startswith("image")]

    def _draw_on_image(self, canvas: Canvas, state: int | None, image: int, inputs: Inputs | None) -> None:
        example, cells, name = self._only(None, "plot"), self._patches().numpy(), dict(self.vocabulary)
        own, top = cells[:, 0] == image, self.probs[:, :, 0].numpy()
        at = int(top[:, own].mean(1).argmax()) if state is None and own.any() else self._state(state or 0)
        words = {
            (row, col): text(name[best], 12)
            for (row, col), best in zip(cells[own, 1:].tolist(), self.ids[at, own, 0].tolist(), strict=True)
        }
        picture, area = picture_of(inputs, example, image)
        mesh = image_map(
            canvas.ax, on_grid(top[at], cells, image), picture, area, words, cmap="Blues", vmin=0, vmax=1
        )  # fmt: skip
        why = "" if state is not None else f", the likeliest on average of {len(self.states)} states"
        canvas.head(f"Logit lens on the image, {short_name(self.model)}", f"state {self.states[at]}{why}")
        color_bar(canvas.ax, mesh, "probability of the likeliest token")
