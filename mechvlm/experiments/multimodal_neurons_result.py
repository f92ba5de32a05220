"""Result of the search for multimodal neurons: their attributions, words and maps."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.headings import ALONE, answer_label, short_name
from mechvlm.figures.panels import beside
from mechvlm.figures.settings import pen
from mechvlm.figures.style import SIGNED, text
from mechvlm.intervals import Interval, mean_interval
from mechvlm.results import Result


@dataclass(frozen=True, repr=False)
class MultimodalNeuronsResult(Result):
    """The MLP neurons that did most for an answer at the image's positions; the strongest first.

    Attributes:
        layer, index: the layer whose MLP holds the neuron, from 0, and the neuron's number there.
        attribution: Σ activation * d logit / d activation over the image's positions (logits): what
            the logit would lose, to first order, were the neuron silent on the image.
        activation: of the neuron at each image token, in the order of the image's positions; NaN
            past an example's last.
        sign: of the neuron's mean activation on the image, 1 or -1. Gated neurons fire either way,
            and one that fires negatively writes the reverse of its column.
        words: the tokens whose logits the neuron's column times `sign` raises most, for each
            neuron.
        answers: the texts of the tokens whose logits were measured.
        grid: (rows, cols) of the patches; empty where visual tokens are queries, or an example has
            several images.
        model: the model's name.
    """

    units: ClassVar[str] = "logit"
    texts: ClassVar[tuple[str, ...]] = ("words", "answers")
    per_example: ClassVar[tuple[str, ...]] = ("answers",)
    apart: ClassVar[str] = (
        "neurons are chosen by their mean over all examples. Give multimodal_neurons all batches at once, as a list."
    )

    layer: Int[Tensor, " neuron"]
    index: Int[Tensor, " neuron"]
    attribution: Float[Tensor, "example neuron"]
    activation: Float[Tensor, "example neuron image"]
    sign: Int[Tensor, " neuron"]
    words: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    grid: tuple[int, ...]
    model: str

    @classmethod
    def counted_from_0(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file of format 1, with their layers counted from 0."""
        return values | {"layer": values["layer"] - 1}

    @property
    def interval(self) -> Interval:
        """The mean attribution of each neuron over examples, with its 95 % bootstrap interval.

        The neurons were chosen by this mean: on other examples expect a little less.
        """
        return mean_interval(self.attribution)

    @property
    def maps(self) -> Float[Tensor, "example neuron row col"]:
        """The activations on the patches.

        Raises:
            ValueError: where there is no grid.
        """
        if not self.grid:
            raise ValueError(
                "These visual tokens do not lie on one grid: they are queries, which read the whole image "
                "(mechvlm.query_reading says where), or patches of several images, views or grids. `activation` holds "
                "the neurons' activations on them in order."
            )
        return self.activation.unflatten(-1, self.grid)

    def to_frame(self) -> pd.DataFrame:
        """One row per neuron and example.

        Columns: rank, layer, index, words, sign, example, answer, attribution, mean_activation.
        """
        n_examples, n_neurons = self.attribution.shape
        frame = pd.DataFrame(
            {
                "rank": [r + 1 for r in range(n_neurons) for _ in range(n_examples)],
                "layer": self.layer.repeat_interleave(n_examples).numpy(),
                "index": self.index.repeat_interleave(n_examples).numpy(),
                "words": [" ".join(word.strip() for word in words) for words in self.words for _ in range(n_examples)],
                "sign": self.sign.repeat_interleave(n_examples).numpy(),
                "example": list(range(n_examples)) * n_neurons,
                "answer": list(self.answers) * n_neurons,
                "attribution": self.attribution.T.reshape(-1).numpy(),
                "mean_activation": self.activation.nanmean(-1).T.reshape(-1).numpy(),
            }
        )
        return self.with_ids(frame)

    @plots(lambda self, **_: (7.5, 1.4 + 0.52 * self.attribution.shape[1]))
    def plot(self, canvas: Canvas) -> None:
        """Each neuron's attribution with its words, and where on the image it fires.

        The map of a neuron is from the example in which it did most.
        """
        side = beside(canvas.ax, 0.3)
        self._draw_attribution(canvas.ax)
        self._draw_maps(side)
        n = len(self.answers)
        note = f"mean of {n} examples with 95 % intervals" if n > 1 else ALONE
        canvas.head(f"Multimodal neurons for {answer_label(self.answers)}, {short_name(self.model)}", note)

    def _draw_attribution(self, ax: Axes) -> None:
        n_examples, n_neurons = self.attribution.shape
        mean, low, high = (x.numpy() for x in self.interval)
        rows = np.arange(n_neurons)
        ax.barh(rows, mean, height=0.5, color="#009E73", alpha=0.8)
        if n_examples > 1:
            error = np.clip([mean - low, high - mean], 0, None)
            ax.errorbar(mean, rows, xerr=error, fmt="none", color=pen(), capsize=2, linewidth=1)
        names = zip(self.layer.tolist(), self.index.tolist(), self.words, strict=True)
        labels = [f"layer {layer}, {i}\n" + " ".join(text(w, 10) for w in words[:5]) for layer, i, words in names]
        ax.set_yticks(rows, labels, fontsize="x-small")
        ax.set_ylim(n_neurons - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_ylabel("MLP neuron, and the words it writes")
        ax.set_xlabel("attribution on the image (logits)")

    def _draw_maps(self, ax: Axes) -> None:
        """A small map per neuron, each to its own maximum: their strengths are not compared."""
        best = self.attribution.argmax(0)
        maps = self.maps if self.grid else self.activation[:, :, None]
        for row, example in enumerate(best.tolist()):
            neuron_map = maps[example, row].numpy()
            most = np.nanmax(np.abs(neuron_map)) or 1.0
            half = 0.44 if self.grid else 0.2
            extent = (0.0, 1.0, row + half, row - half)
            ax.imshow(
                neuron_map, extent=extent, cmap=SIGNED, vmin=-most, vmax=most, aspect="auto", interpolation="nearest",
                origin="upper",
            )  # fmt: skip
            where = f"\nexample {example}" if len(self.attribution) > 1 else ""
            ax.text(1.05, row, f"±{most:.2g}{where}", fontsize="xx-small", va="center")
        ax.set_xlim(0, 1.5)
        ax.set_ylim(len(best) - 0.5, -0.5)
        ax.set_xticks([])
        ax.tick_params(labelleft=False, left=False)
        ax.grid(False)
        ax.set_frame_on(False)
        ax.set_xlabel("activation" if self.grid else "activation, by query")
