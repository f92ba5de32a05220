"""Result of `word_reading`: each word's heat on the image, its scores, and their controls."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from mechvlm.figures.canvas import Canvas, Size, canvas, plots
from mechvlm.figures.fitted import name_places
from mechvlm.figures.headings import ALONE, INTERVAL, short_name
from mechvlm.figures.image_map import image_map
from mechvlm.figures.legends import legend_above
from mechvlm.figures.settings import pen
from mechvlm.figures.style import HEAT, color_bar, hue, text
from mechvlm.inputs.images import ImageLike, open_image
from mechvlm.intervals import Interval, mean_interval
from mechvlm.results import Result

READING_CONDITIONS = ("word", "other image", "other objects", "words of grammar", "even")
SCORE_NAMES = ("inside", "hit")
CONDITION_COLORS = ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "#BBBBBB")
SCORE_TITLES = ("heat inside the box (share)", "maximum inside the box (rate)")


@dataclass(frozen=True, repr=False)
class WordReadingResult(Result):
    """Where the model read while it wrote words, one row a word, and whether its object is there.

    Scores stand under five conditions, `READING_CONDITIONS`:

    - "word": the word's heat, against its own box.
    - "other image": the same heat against the boxes of another example's words, at their place on
      that image; the mean over these words. NaN where no other example has a box.
    - "other objects": the heats of words in the same answer whose boxes are others, against the
      word's box; their mean. NaN where the answer names no other object with a box.
    - "words of grammar": the heats of the stop words in the same answer, against the word's box;
      their mean. NaN where the answer has none.
    - "even": what an even heat would score, the share of the image that the box takes.

    All are NaN for a word without a box.

    Attributes:
        heat: norms written from each patch of the image's first view to the positions that wrote
            the word, mean over these and over `layers` (residual-stream units); NaN beyond an
            example's own grid, and where a cell holds no token.
        inside: share of the heat that lies in the word's box (0 to 1).
        hit: whether the patch of most heat has its center in the box (1 or 0); of controls with
            several words or boxes their mean.
        example: the example of each word.
        occurrence: which of equal words in the answer it is, 0 the first.
        logprob: of the word, the sum over its tokens when they were written (nats).
        shape: rows and cols of the example's heat.
        area: what the heat covers, (left, top, right, bottom) in pixels of the original image.
        word: the words.
        boxes: the boxes of each word; empty where none is known.
        answers: each example's answer.
        layers: those that the heat is the mean of.
        model: the model's name.
    """

    units: ClassVar[str] = "norm written (residual-stream units)"
    apart: ClassVar[str] = (
        "the control compares examples of all batches. Give word_reading all batches at once, as a list."
    )

    heat: Float[Tensor, "word row col"]
    inside: Float[Tensor, "word condition"]
    hit: Float[Tensor, "word condition"]
    example: Int[Tensor, " word"]
    occurrence: Int[Tensor, " word"]
    logprob: Float[Tensor, " word"]
    shape: Int[Tensor, "word 2"]
    area: Float[Tensor, "word 4"]
    word: tuple[str, ...]
    boxes: tuple[tuple[tuple[float, ...], ...], ...]
    answers: tuple[str, ...]
    layers: tuple[int, ...]
    model: str

    def __len__(self) -> int:
        return len(self.word)

    def count_examples(self) -> int:
        return len(self.answers)

    def map(self, word: int) -> Float[Tensor, "row col"]:
        """The heat of the word of this number, on its own grid."""
        rows, cols = self.shape[word].tolist()
        return self.heat[word, :rows, :cols]

    def single(self, example: int) -> "WordReadingResult":
        """The words of one example."""
        if not 0 <= example < len(self.answers):
            raise IndexError(f"Example {example} was asked for; this result holds 0 to {len(self.answers) - 1}.")
        own = (self.example == example).nonzero()[:, 0]
        names = ("heat", "inside", "hit", "occurrence", "logprob", "shape", "area")
        words: dict[str, Any] = {
            name: tuple(getattr(self, name)[i] for i in own.tolist()) for name in ("word", "boxes")
        }
        ids = None if self.example_ids is None else self.example_ids[example : example + 1]
        return replace(
            self, **{name: getattr(self, name)[own] for name in names}, **words, example=torch.zeros_like(own),
            answers=self.answers[example : example + 1], example_ids=ids,
        )  # fmt: skip

    @property
    def by_example(self) -> Float[Tensor, "example score condition"]:
        """The mean scores of each example's words with boxes; NaN for an example without any."""
        scores = torch.stack([self.inside, self.hit], 1)
        means = [scores[self.example == number].nanmean(0) for number in range(len(self.answers))]
        return torch.stack(means)

    @property
    def interval(self) -> Interval:
        """The mean scores over examples [score condition], with their 95 % bootstrap intervals."""
        return mean_interval(self.by_example)

    @property
    def summary(self) -> pd.DataFrame:
        """One row per score and condition: n (examples), mean, low, high."""
        mean, low, high = self.interval
        n = (~self.by_example.isnan()).sum(0)
        return pd.DataFrame(
            [
                (score, condition, int(n[s, c]), float(mean[s, c]), float(low[s, c]), float(high[s, c]))
                for s, score in enumerate(SCORE_NAMES)
                for c, condition in enumerate(READING_CONDITIONS)
            ],
            columns=["score", "condition", "n", "mean", "low", "high"],
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per word: example, word, occurrence, logprob, and both scores per condition.

        The columns of the scores are "inside", "inside, other image" and so on.
        """
        frame = pd.DataFrame(
            {
                "example": self.example.numpy(), "word": self.word, "occurrence": self.occurrence.numpy(),
                "logprob": self.logprob.numpy(),
            }
        )  # fmt: skip
        for name, values in zip(SCORE_NAMES, (self.inside, self.hit), strict=True):
            for number, condition in enumerate(READING_CONDITIONS):
                frame[f"{name}, {condition}" if number else name] = values[:, number].numpy()
        return self.with_ids(frame)

    def plot_word(
        self,
        word: int,
        image: ImageLike | None = None,
        ax: Axes | None = None,
        title: str | bool | None = None,
        figsize: Size | None = None,
    ) -> Axes:
        """The heat of the word of this number, over its image where one is given, with its boxes.

        `ax`, `title` and `figsize` as for `plot`.

        Raises:
            IndexError: for a word that is not there.
        """
        if not 0 <= word < len(self):
            raise IndexError(f"Word {word} was asked for; there are 0 to {len(self) - 1}.")
        picture, inside = None if image is None else open_image(image), self.inside[word, 0]
        share = "" if inside.isnan() else f", {100 * float(inside):.0f} % in its box"
        with canvas(ax, title, figsize, (4.6, 4.2)) as drawn_on:
            ax = drawn_on.ax
            mesh = image_map(ax, self.map(word).numpy(), picture, self.area[word].tolist(), cmap=HEAT, vmin=0)
            for x0, y0, x1, y1 in self.boxes[word]:
                ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="#0072B2", linewidth=1.6))
            drawn_on.head(
                f"Read to write “{text(self.word[word], 24)}”",
                f"example {int(self.example[word])}, {short_name(self.model)}{share}",
            )
            color_bar(ax, mesh, "norm written (mean over layers)")
        return ax

    @plots((6.4, 3.8))
    def plot(self, canvas: Canvas) -> None:
        """Both scores, a bar for each condition: the word's own beside its controls.

        Raises:
            TypeError: where no word has a box; `plot_word(number)` draws a heat.
        """
        if self.inside[:, 0].isnan().all():
            raise TypeError("No word of this result has a box, so there are no rates: plot_word(number) draws a heat.")
        mean, low, high = (part.numpy() for part in self.interval)
        n = int((~self.by_example[:, 0, 0].isnan()).sum())
        ax = canvas.ax
        self._draw_bars(ax, mean, low, high)
        name_places(ax, SCORE_TITLES)
        ax.set_ylim(0, 1.05)
        ax.set_ylabel("mean over examples")
        legend_above(ax)
        ax.set_yticks(np.linspace(0, 1, 6))
        note = f"n = {n} examples; bars are means, lines their {INTERVAL}" if n > 1 else ALONE
        canvas.head(f"Reading while writing a word, {short_name(self.model)}", note)

    def _draw_bars(self, ax: Axes, mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        width = 0.8 / len(READING_CONDITIONS)
        looks: Sequence[tuple[str, str]] = list(zip(READING_CONDITIONS, CONDITION_COLORS, strict=True))
        for number, (condition, color) in enumerate(looks):
            x = np.arange(len(SCORE_NAMES)) + (number - (len(looks) - 1) / 2) * width
            ax.bar(x, mean[:, number], 0.9 * width, label=condition, color=hue(color))
            ax.vlines(x, low[:, number], high[:, number], color=pen(), linewidth=1.2)
