"""What figures are made of: colors, lines and bands, axes of layers and states, heat maps.

`style` is the look of reports and pages, the same for every reader. What `result.plot()` draws is
for the user's own paper or notebook, and keeps the user's rcParams (`mechvlm.figures.canvas`).

Colors are Okabe and Ito's, which the color-blind can tell apart. Lines also differ by their dashes
and markers, so that a figure survives a grey printer.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colorbar import Colorbar
from matplotlib.ticker import Formatter, MaxNLocator

from mechvlm.figures.settings import marker_size, pen, settings


class Line(NamedTuple):
    """How one kind of curve looks in every figure."""

    label: str
    color: str
    dash: str | tuple
    marker: str


LAYER = "layer (0 = first)"
STATE = "state (0 = embeddings)"
"""Names of the two axes along the decoder: layers 0 to n_layers - 1 read states 0 to n_layers - 1,
and write states 1 to n_layers."""
HEAT = "magma_r"
SIGNED = "RdBu_r"
"""Colors for values of either sign, white at 0; the color-blind can tell the ends apart."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's."""
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
    "axes.prop_cycle": mpl.rcParamsDefault["axes.prop_cycle"], "svg.hashsalt": "mechvlm", "svg.fonttype": "path",
}  # fmt: skip


def style() -> AbstractContextManager[None]:
    """Context in which figures have the look of reports; it changes nothing outside."""
    return settings(FIGURE_STYLE)


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
    color = hue(line.color)
    if spread is not None:
        # Standard deviations and not percentiles: when shares are mostly 0, their mean can lie
        # outside the percentiles.
        low, high = np.clip([mean - spread, mean + spread], *limits)
        ax.fill_between(x, low, high, color=color, alpha=PALE, linewidth=0)
    if interval is not None:
        ax.fill_between(x, *interval, color=color, alpha=DARK, linewidth=0)
    ax.plot(
        x, mean, color=color, linestyle=line.dash, marker=line.marker, label=line.label,
        linewidth=1.1 if thin else None, markersize=marker_size(thin) if len(x) < 20 else 0,
    )  # fmt: skip


def hue(color: str) -> str:
    """A color of `PALETTE`, or its counterpart where the user has a cycle of their own."""
    if color[1:3] == color[3:5] == color[5:7] < "80":  # a dark grey
        return pen(color)
    own = mpl.rcParams["axes.prop_cycle"]
    if own == mpl.rcParamsDefault["axes.prop_cycle"] or color not in PALETTE:
        return color
    colors = own.by_key().get("color", PALETTE)
    return colors[PALETTE.index(color) % len(colors)]


def layer_axis(ax: Axes, n_layers: int) -> None:
    """Label the x axis with layers 0 to n_layers - 1."""
    _number_axis(ax, n_layers, LAYER)


def state_axis(ax: Axes, n_layers: int) -> None:
    """Label the x axis with states 0 (embeddings) to n_layers."""
    _number_axis(ax, n_layers + 1, STATE)


def _number_axis(ax: Axes, count: int, label: str) -> None:
    ax.set_xlim(-0.25, count - 0.75)
    number_ticks(ax.xaxis, range(count))
    ax.set_xlabel(label)


class NumberNames(Formatter):
    """Names of the places 0, 1, ..."""

    def __init__(self, names: Sequence[object]):
        self.names = names

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The name of a place, "" of any other."""
        return str(self.names[round(x)]) if 0 <= x < len(self.names) else ""


def number_ticks(axis: Axis, names: Sequence[object]) -> None:
    """Name places 0, 1, ... of an axis, as many of them as have room whenever it is drawn."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(NumberNames(names))


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
    number_ticks(ax.yaxis, layers)
    ax.set_ylabel(LAYER)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(True)
    return mesh


def color_bar(ax: Axes, mesh, label: str, extend: str = "neither") -> Colorbar:
    """A color bar beside its map; with extend="max" its arrow says that cells lie beyond."""
    bar = ax.figure.colorbar(mesh, ax=ax, label=label, pad=0.02, extend=extend)
    bar.outline.set_visible(False)
    return bar


def no_ticks(ax: Axes) -> None:
    """Leave out what an image does not need: ticks, grid and frame."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def text(piece: str, most: int) -> str:
    """A token as matplotlib can draw it: no formulas or control characters, at most `most` long."""
    shown = "".join(c if c.isprintable() else "·" for c in piece.replace("▁", " ").strip() or "·")
    # matplotlib reads text between dollar signs as a formula.
    return (shown if len(shown) <= most else shown[: most - 1] + "…").replace("$", r"\$")


def position_ticks(ax: Axes, positions: list[int]) -> None:
    """Label the x axis with the positions, as many of them as have room."""
    number_ticks(ax.xaxis, positions)
