"""One look for every figure: colors, lines and bands, axes of layers, heat maps.

A figure that `result.plot()` makes is pyplot's, as with pandas: a notebook shows it at the end of
its cell, `plt.show()` in a window, and a script that makes many closes them with `plt.close`. On
given axes pyplot is neither needed nor loaded.

Colors are Okabe and Ito's, which differ for the color-blind; lines differ by their dashes and
markers too, so that a figure survives a grey printer.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

LAYER = "layer (0 = embeddings)"
FIGURE_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.8, "axes.edgecolor": "#444444", "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "legend.frameon": False, "legend.handlelength": 3, "lines.linewidth": 1.8, "lines.markersize": 4.5,
    "figure.dpi": 100, "savefig.dpi": 200, "savefig.facecolor": "white", "figure.facecolor": "white",
    "svg.hashsalt": "mechvlm", "svg.fonttype": "path",
}  # fmt: skip


class Line(NamedTuple):
    """How one kind of curve looks, everywhere."""

    label: str
    color: str
    dash: str | tuple
    marker: str


LINES = {
    "inter": Line("image – text", "#0072B2", "-", "o"),
    "image": Line("within image", "#D55E00", "--", "s"),
    "text": Line("within text", "#009E73", "-.", "^"),
    "own": Line("image tokens, own captions", "#0072B2", "-", "o"),
    "single": Line("image tokens, each caption alone", "#56B4E9", "-.", "d"),
    "other": Line("image tokens, another image's captions", "#E69F00", "--", "s"),
    "other_single": Line("image tokens, another's captions, each alone", "#CC79A7", (0, (3, 1, 1, 1)), "v"),
    "prompt": Line("text tokens, own captions", "#666666", ":", "^"),
}
HEAT = "magma_r"
SIGNED = "RdBu_r"
"""For values of either sign, white at 0; the color-blind can tell its ends apart."""
PALE, DARK = 0.13, 0.35
"""Opacity of a band of standard deviations, and of one of intervals of the mean."""


@contextmanager
def style():
    """Figures made and drawn within have this package's look; nothing outside changes."""
    # Not mpl.rc_context, which undoes everything: a notebook's backend, loaded by the first figure, turns on interactive mode
    # for good, and without it no later figure is shown.
    before = {key: mpl.rcParams[key] for key in FIGURE_STYLE}
    mpl.rcParams.update(FIGURE_STYLE)
    try:
        yield
    finally:
        mpl.rcParams.update(before)


def axes(ax: Axes | None, width: float | int = 6, height: float | int = 3.6) -> Axes:
    """The given axes, or those of a new figure of pyplot (inches)."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # here, so that a study, which draws on figures of its own, does without

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def curve(
    ax: Axes,
    x: Sequence[int],
    values: np.ndarray,
    line: Line,
    *,
    limits: tuple[float, float] = (-np.inf, np.inf),
    thin: bool = False,
) -> None:
    """Mean over examples of `values` [example, x], within a band of their standard deviation to either side.

    NaN is left out. The band ends at `limits`, past which no value can lie.
    """
    seen = ~np.isnan(values).all(0)
    values = values[:, seen]
    mean = np.nanmean(values, axis=0) if values.size else np.zeros(0)
    spread = np.nanstd(values, axis=0) if len(values) > 1 and values.size else None
    banded(ax, np.asarray(x)[seen], mean, line, spread, limits=limits, thin=thin)


def banded(
    ax: Axes,
    x: np.ndarray,
    mean: np.ndarray,
    line: Line,
    spread: np.ndarray | None = None,
    interval: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    limits: tuple[float, float] = (-np.inf, np.inf),
    thin: bool = False,
) -> None:
    """A line of means, within a pale band of `spread` to either side and a darker one from `interval`'s low to high."""
    if spread is not None:
        # Not percentiles: of shares that are mostly 0 the mean can lie outside of them.
        low, high = np.clip([mean - spread, mean + spread], *limits)
        ax.fill_between(x, low, high, color=line.color, alpha=PALE, linewidth=0)
    if interval is not None:
        ax.fill_between(x, *interval, color=line.color, alpha=DARK, linewidth=0)
    ax.plot(
        x, mean, color=line.color, linestyle=line.dash, marker=line.marker, label=line.label,
        linewidth=1.1 if thin else None, markersize=(2.5 if thin else 4.5) if len(x) < 20 else 0,
    )  # fmt: skip


def layer_axis(ax: Axes, n_layers: int) -> None:
    """Layers 0 (embeddings) to n_layers along x."""
    ax.set_xlim(-0.25, n_layers + 0.25)
    ax.set_xticks(range(0, n_layers + 1, -(-(n_layers + 1) // 14)))
    ax.set_xlabel(LAYER)


def heatmap(ax: Axes, values: np.ndarray, layers: Sequence[int], edges: np.ndarray | None = None, cmap=HEAT, **limits):
    """[layer, position] with the first layer at the bottom; NaN is left white. Gives the mesh, for a color bar.

    `edges` are the positions' borders along x, one more than there are positions; by default each is 1 wide.
    """
    edges = np.arange(values.shape[1] + 1) - 0.5 if edges is None else edges
    rows = np.arange(len(layers) + 1) - 0.5
    # As pixels, in vector files too: half a million small rectangles would stall a browser.
    mesh = ax.pcolormesh(edges, rows, values, cmap=cmap, rasterized=True, **limits)
    step = -(-len(layers) // 9)
    ax.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ax.set_ylabel("layer")
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(True)
    return mesh


def text(piece: str, most: int) -> str:
    """A token as matplotlib can draw it: no mathematics, no control characters, and short."""
    shown = "".join(c if c.isprintable() else "·" for c in piece.replace("▁", " ").strip() or "·")
    # A dollar sign opens mathematics.
    return (shown if len(shown) <= most else shown[: most - 1] + "…").replace("$", r"\$")


def position_ticks(ax: Axes, positions: list[int]) -> None:
    step = max(1, len(positions) // 16)
    ax.set_xticks(range(0, len(positions), step), [str(p) for p in positions[::step]])
