"""One style for every figure: colors, lines and bands, axes of layers, heat maps.

A figure that `result.plot()` makes belongs to pyplot, as with pandas: a notebook shows it at the
end of its cell, `plt.show()` in a window, and a script that makes many closes them with
`plt.close`. On given axes pyplot is neither needed nor loaded.

Colors are Okabe and Ito's, which the color-blind can tell apart. Lines also differ by their dashes
and markers, so that a figure survives a grey printer.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes


class Line(NamedTuple):
    """How one kind of curve looks in every figure."""

    label: str
    color: str
    dash: str | tuple
    marker: str


LAYER = "layer (0 = embeddings)"
STATE = "state (0 = embeddings)"
HEAT = "magma_r"
SIGNED = "RdBu_r"
"""Colors for values of either sign, white at 0; the color-blind can tell the ends apart."""
PALE, DARK = 0.13, 0.35
"""Opacity of a band of standard deviations, and of a band of intervals of the mean."""
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
FIGURE_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.8, "axes.edgecolor": "#444444", "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "legend.frameon": False, "legend.handlelength": 3, "lines.linewidth": 1.8, "lines.markersize": 4.5,
    "figure.dpi": 100, "savefig.dpi": 200, "savefig.facecolor": "white", "figure.facecolor": "white",
    "svg.hashsalt": "mechvlm", "svg.fonttype": "path",
}  # fmt: skip


@contextmanager
def style():
    """Context in which figures have this package's style; it changes nothing outside."""
    # mpl.rc_context would undo too much: in a notebook the first figure loads the backend, which
    # turns on interactive mode for good. Undone, no later figure would be shown.
    before = {key: mpl.rcParams[key] for key in FIGURE_STYLE}
    mpl.rcParams.update(FIGURE_STYLE)
    try:
        yield
    finally:
        mpl.rcParams.update(before)


def axes(ax: Axes | None, width: float | int = 6, height: float | int = 3.6) -> Axes:
    """The given axes, or those of a new pyplot figure, `width` x `height` inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # only here: a study draws on its own figures, without pyplot

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
    """Draw the mean over examples, within a band of one standard deviation to either side.

    NaN is left out.

    Args:
        ax: where to draw.
        x: one number per column of `values`.
        values: [example, x].
        line: how the curve looks.
        limits: the band ends here; no value can lie outside.
        thin: a thinner line with smaller markers.
    """
    has_value = ~np.isnan(values).all(0)
    values = values[:, has_value]
    mean = np.nanmean(values, axis=0) if values.size else np.zeros(0)
    spread = np.nanstd(values, axis=0) if len(values) > 1 and values.size else None
    banded(ax, np.asarray(x)[has_value], mean, line, spread, limits=limits, thin=thin)


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
    """Draw a line of means, a pale band of `spread` to either side, a darker one of `interval`.

    Args:
        ax: where to draw.
        x: positions of the means [x].
        mean: [x].
        line: how the curve looks.
        spread: standard deviations [x].
        interval: low and high ends of an interval of the mean, each [x].
        limits: the pale band ends here; no value can lie outside.
        thin: a thinner line with smaller markers.
    """
    if spread is not None:
        # Standard deviations and not percentiles: when shares are mostly 0, their mean can lie
        # outside the percentiles.
        low, high = np.clip([mean - spread, mean + spread], *limits)
        ax.fill_between(x, low, high, color=line.color, alpha=PALE, linewidth=0)
    if interval is not None:
        ax.fill_between(x, *interval, color=line.color, alpha=DARK, linewidth=0)
    ax.plot(
        x, mean, color=line.color, linestyle=line.dash, marker=line.marker, label=line.label,
        linewidth=1.1 if thin else None, markersize=(2.5 if thin else 4.5) if len(x) < 20 else 0,
    )  # fmt: skip


def state_axis(ax: Axes, n_layers: int) -> None:
    """Label the x axis with states 0 (embeddings) to n_layers."""
    layer_axis(ax, n_layers)
    ax.set_xlabel(STATE)


def layer_axis(ax: Axes, n_layers: int) -> None:
    """Label the x axis with layers 0 (embeddings) to n_layers."""
    ax.set_xlim(-0.25, n_layers + 0.25)
    ax.set_xticks(range(0, n_layers + 1, -(-(n_layers + 1) // 14)))
    ax.set_xlabel(LAYER)


def heatmap(ax: Axes, values: np.ndarray, layers: Sequence[int], edges: np.ndarray | None = None, cmap=HEAT, **limits):
    """Draw `values` [layer, position], the first layer at the bottom; NaN stays white.

    Args:
        ax: where to draw.
        values: [layer, position].
        layers: labels of the rows.
        edges: borders of the positions along x [position + 1]; by default each position is 1 wide.
        cmap: a matplotlib color map.
        limits: further arguments of `Axes.pcolormesh`, such as vmin and vmax.

    Returns:
        The mesh, for a color bar.
    """
    edges = np.arange(values.shape[1] + 1) - 0.5 if edges is None else edges
    rows = np.arange(len(layers) + 1) - 0.5
    # Pixels even in vector files: half a million small rectangles would stall a browser.
    mesh = ax.pcolormesh(edges, rows, values, cmap=cmap, rasterized=True, **limits)
    step = -(-len(layers) // 9)
    ax.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ax.set_ylabel("layer")
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(True)
    return mesh


def text(piece: str, most: int) -> str:
    """A token as matplotlib can draw it: no formulas or control characters, at most `most` long."""
    shown = "".join(c if c.isprintable() else "·" for c in piece.replace("▁", " ").strip() or "·")
    # matplotlib reads text between dollar signs as a formula.
    return (shown if len(shown) <= most else shown[: most - 1] + "…").replace("$", r"\$")


def position_ticks(ax: Axes, positions: list[int]) -> None:
    """Label the x axis with up to about 16 of the positions, evenly spaced."""
    step = max(1, len(positions) // 16)
    ax.set_xticks(range(0, len(positions), step), [str(p) for p in positions[::step]])
