"""Winoground's picture: the three scores against chance, and each measure with the true caption less the other one."""

import numpy as np
from matplotlib.axes import Axes

from mechvlm.experiments.pair_results import WinogroundResult
from mechvlm.view.plots import axes, draw, layer_axis, style, text

LABELS = {
    "precision": "lens precision", "recall": "lens recall", "contextualization": "cosine of image and caption",
    "norm attention": "last token's reading of the image",
}  # fmt: skip
LEVEL = "95 % bootstrap interval over pairs"


@draw.register
def _(result: WinogroundResult, ax: Axes | None = None) -> Axes:
    """The scores as bars with their intervals and chance; on a new figure, below them each measure's difference by layer."""
    with style():
        if ax is None:
            figure = axes(None, width=8, height=6.6).figure
            figure.clear()
            grid = figure.add_gridspec(3, 2, height_ratios=(1.1, 1, 1))
            ax = figure.add_subplot(grid[0, :])
            for i, measure in enumerate(LABELS):
                row = result.measures.index(measure)
                ends = (part[row].numpy() for part in result.difference)
                by_layer(figure.add_subplot(grid[1 + i // 2, i % 2]), measure, *ends)
        _scores(ax, result)
    return ax


def _scores(ax: Axes, result: WinogroundResult) -> None:
    found = result.scores.to_frame()
    x = np.arange(len(found))
    ax.bar(x, found["percent"], 0.55, color="#0072B2")
    ax.vlines(x, found["low"], found["high"], color="#222222", linewidth=1.2)
    ax.hlines(found["chance"], x - 0.4, x + 0.4, color="#D55E00", linestyle="--", linewidth=1.5, label="chance")
    for at, percent, high in zip(x, found["percent"], found["high"], strict=True):
        top = np.nanmax([percent, high, 25])
        ax.annotate(f"{percent:.1f}", (at, top), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xticks(x, [f"{name} score" for name in found["score"]])
    ax.set_ylim(0, 112)
    ax.set_ylabel("pairs (%)")
    ax.grid(False, axis="x")
    ax.legend(loc="upper right")
    n = len(result.pairs)
    aside = f", {len(result.set_aside)} set aside" if result.set_aside else ""
    model = text(result.model.rstrip("/").split("/")[-1], 40)
    ax.set_title(f"Winoground's scores, {model}: n = {n} pairs{aside}", pad=18)
    note = f"bars are shares of pairs, bands and vertical lines the {LEVEL}"
    ax.annotate(note, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points", fontsize=8)


def by_layer(ax: Axes, measure: str, mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """The mean paired difference of the two conditions: between pairs the measures differ more than within."""
    x = np.arange(len(mean))
    ax.axhline(0, color="#444444", linewidth=0.8)
    ax.fill_between(x, low, high, color="#0072B2", alpha=0.15, linewidth=0)
    ax.plot(x, mean, color="#0072B2", marker="o", markersize=3.5 if len(x) < 20 else 0)
    layer_axis(ax, len(mean) - 1)
    ax.set_title(LABELS[measure], fontsize=9)
    ax.set_ylabel("own less other caption", fontsize=8)
