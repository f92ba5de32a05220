"""Result of the experiment on Winoground's pairs: scores, and measures under both captions.

`pair_scores` is the formula of the three scores; `WinogroundResult` holds every measure.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.fitted import fit, name_places
from mechvlm.figures.headings import INTERVAL, short_name
from mechvlm.figures.legends import legend_above
from mechvlm.figures.settings import marker_size, pen
from mechvlm.figures.style import LAYER, hue, state_axis
from mechvlm.intervals import Interval, mean_interval
from mechvlm.results import Result, long_frame

PAIR_MEASURES = ("precision", "recall", "contextualization", "norm attention", "log-likelihood")
CAPTION_CONDITIONS = ("matched", "mismatched")
CHANCE = {"text": 25.0, "image": 25.0, "group": 100 / 6}
"""Scores of a model for which every order of the four likelihoods is equally likely, in percent.

Thrush et al. 2022.
"""
LABELS = {
    "precision": "lens precision", "recall": "lens recall", "contextualization": "cosine of image and caption",
    "norm attention": "last token's reading of the image",
}  # fmt: skip
"""Titles of the panels: the measures that are drawn by layer."""


class PairScores(NamedTuple):
    """Which pairs are right, by each of the three scores."""

    text: Bool[Tensor, " pair"]
    image: Bool[Tensor, " pair"]
    group: Bool[Tensor, " pair"]

    def __repr__(self) -> str:
        right = ", ".join(f"{name} {int(values.sum())}" for name, values in self._asdict().items())
        return f"PairScores(right of {len(self.group)} pairs: {right})"

    def to_frame(self, seed: int = 0) -> pd.DataFrame:
        """One row per score.

        Columns: score, percent of pairs, low and high (its 95 % bootstrap interval), chance, and n
        pairs.
        """
        interval = mean_interval(100 * torch.stack(list(self), -1).double(), seed=seed)
        ends = {name: getattr(interval, name).tolist() for name in ("low", "high")}
        percent = {"score": list(CHANCE), "percent": interval.mean.tolist()}
        return pd.DataFrame({**percent, **ends, "chance": list(CHANCE.values()), "n": len(self.group)})


def pair_scores(s: Float[Tensor, "pair caption image"]) -> PairScores:
    """The text, image and group score of each pair; caption i is true of image i.

        text:  s(C0, I0) > s(C1, I0) and s(C1, I1) > s(C0, I1)
               (each image's own caption is the likelier one)
        image: s(C0, I0) > s(C0, I1) and s(C1, I1) > s(C1, I0)
               (each caption's own image makes it likelier)
        group: both

    Equal values count as wrong. Chance is 25, 25 and 16.7 %.

    >>> scores = mv.pair_scores(result.logprob)
    >>> scores.group.float().mean()  # the share of pairs that are right both ways

    Source: Thrush et al. 2022, "Winoground: Probing Vision and Language Models for
    Visio-Linguistic Compositionality".
    Tested: equals values worked by hand; random values give chance.

    Raises:
        ValueError: for another shape than [pair 2 2], or a value that is NaN.
    """
    if s.ndim != 3 or tuple(s.shape[1:]) != (2, 2) or not len(s):
        raise ValueError(f"s is [pair caption image] of two captions and two images, not {list(s.shape)}.")
    if s.isnan().any():
        raise ValueError(f"s is NaN in pairs {s.isnan().flatten(1).any(1).nonzero().flatten().tolist()}.")
    (c0i0, c0i1), (c1i0, c1i1) = (row.unbind(-1) for row in s.unbind(1))
    text = (c0i0 > c1i0) & (c1i1 > c0i1)
    image = (c0i0 > c0i1) & (c1i1 > c1i0)
    return PairScores(text, image, text & image)


@dataclass(frozen=True, repr=False)
class WinogroundResult(Result):
    """Every measure of every pair, with each of its captions on each of its images.

    Attributes:
        values: by `measures`. The axis `layer` is the state of what is read between layers, and the
            layer itself of norm-based attention, 0 to n_layers - 1. NaN where a measure has no such
            layer (the likelihood is the model's own, at n_layers) or no value (the precision of no
            word).
        pairs: their ids.
        set_aside: (id, reason) of each pair that could not be read.
        prompt: what the captions answered.
        model: the model's name.
    """

    units: ClassVar[str] = "share of words, cosine, residual-stream units, nats"
    measures: ClassVar[tuple[str, ...]] = PAIR_MEASURES
    per_example: ClassVar[tuple[str, ...]] = ("pairs", "set_aside")

    values: Float[Tensor, "measure layer pair caption image"]
    pairs: tuple[str, ...]
    set_aside: tuple[tuple[str, str], ...]
    prompt: str
    model: str

    @classmethod
    def counted_from_0(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file of format 1, with their layers counted from 0."""
        row = PAIR_MEASURES.index("norm attention")
        values["values"][row] = values["values"][row].roll(-1, dims=0)
        return values

    @property
    def logprob(self) -> Float[Tensor, "pair caption image"]:
        """log p(caption | image, prompt), in nats."""
        return self.values[PAIR_MEASURES.index("log-likelihood"), -1]

    @property
    def scores(self) -> PairScores:
        """Which pairs are right by the text, image and group score.

        `scores.to_frame()` gives percentages, intervals and chance.
        """
        return pair_scores(self.logprob)

    @property
    def by_condition(self) -> Float[Tensor, "condition measure layer pair image"]:
        """Each image with its own caption ("matched") and with the other ("mismatched")."""
        own = torch.stack([self.values[..., i, i] for i in (0, 1)], -1)
        other = torch.stack([self.values[..., 1 - i, i] for i in (0, 1)], -1)
        return torch.stack([own, other])

    @property
    def difference(self) -> Interval:
        """Matched less mismatched: the mean over pairs [measure layer] with its interval.

        The interval is the 95 % bootstrap one. A pair's two images count as one value, their mean,
        because they are not independent examples.
        """
        return self.difference_by(seed=0)

    def difference_by(self, seed: int) -> Interval:
        """`difference`, with a seed for the bootstrap."""
        matched, mismatched = self.by_condition
        return mean_interval((matched - mismatched).nanmean(-1).movedim(-1, 0), seed=seed)

    def to_frame(self) -> pd.DataFrame:
        """One row per measure, layer, pair, image and condition ("matched", "mismatched").

        Layers that a measure does not have are left out.
        """
        names = dict(zip(range(len(self.pairs)), self.pairs, strict=True))
        layers = range(self.values.shape[1])
        labels = {
            "condition": CAPTION_CONDITIONS,
            "measure": PAIR_MEASURES,
            "layer": layers,
            "pair": names,
            "image": (0, 1),
        }
        frame = long_frame(self.by_condition, **labels)
        frame["pair"] = frame["pair"].map(names)
        has_value = {"norm attention": frame["layer"] < layers[-1], "log-likelihood": frame["layer"] == layers[-1]}
        for measure, rows in has_value.items():
            frame = frame[(frame["measure"] != measure) | rows.loc[frame.index]]
        return frame[["pair", "image", "measure", "layer", "condition", "value"]].reset_index(drop=True)

    @plots((8, 6.6))
    def plot(self, canvas: Canvas) -> None:
        """The scores as bars, with their intervals and chance.

        A new figure also shows, below them, each measure's difference by layer.
        """
        if canvas.is_new:
            figure, interval = canvas.ax.figure, self.difference
            grid = figure.add_gridspec(3, 2, height_ratios=(1.1, 1, 1))
            canvas.ax.set_subplotspec(grid[0, :])
            for i, measure in enumerate(LABELS):
                row = self.measures.index(measure)
                values = (ends[row].numpy() for ends in interval)
                draw_difference(figure.add_subplot(grid[1 + i // 2, i % 2]), measure, *values)
        draw_scores(canvas, self)

    def single(self, example: int) -> "WinogroundResult":
        """The result of one pair, without those set aside."""
        return replace(super().single(example), set_aside=())


def draw_scores(canvas: Canvas, result: WinogroundResult) -> None:
    """The three scores as bars, with their intervals and chance."""
    ax = canvas.ax
    scores = result.scores.to_frame()
    x = np.arange(len(scores))
    ax.bar(x, scores["percent"], 0.55, color=hue("#0072B2"))
    ax.vlines(x, scores["low"], scores["high"], color=pen(), linewidth=1.2)
    ax.hlines(scores["chance"], x - 0.4, x + 0.4, color=hue("#D55E00"), linestyle="--", linewidth=1.5, label="chance")
    for at, percent, high in zip(x, scores["percent"], scores["high"], strict=True):
        top = np.nanmax([percent, high, 25])
        ax.annotate(
            f"{percent:.1f}", (at, top), xytext=(0, 2), textcoords="offset points", ha="center", fontsize="small"
        )
    name_places(ax, [f"{name} score" for name in scores["score"]])
    ax.set_ylim(0, 112)
    ax.set_ylabel("pairs (%)")
    legend_above(ax)
    n = len(result.pairs)
    set_aside = f", {len(result.set_aside)} set aside" if result.set_aside else ""
    canvas.head(
        f"Winoground's scores, {short_name(result.model)}: n = {n} pairs{set_aside}",
        f"bars are shares of pairs, bands and vertical lines the {INTERVAL} over pairs",
    )


def draw_difference(ax: Axes, measure: str, mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """One measure's mean paired difference of the two conditions, by layer, with its interval.

    Paired, because measures differ more between pairs than within one.
    """
    x = np.arange(len(mean))
    ax.axhline(0, color=pen("#444444"), linewidth=0.8)
    ax.fill_between(x, low, high, color=hue("#0072B2"), alpha=0.15, linewidth=0)
    ax.plot(x, mean, color=hue("#0072B2"), marker="o", markersize=marker_size(thin=True) if len(x) < 20 else 0)
    state_axis(ax, len(mean) - 1)
    if measure == "norm attention":
        ax.set_xlabel(LAYER)
    fit(ax.set_title(LABELS[measure], fontsize="medium"), ax)
    ax.set_ylabel("own less other caption", fontsize="small")
