"""One look for every figure, and `draw(result)` for every result.

A figure that `draw` makes is pyplot's, as with pandas: a notebook shows it at the end of its cell, `plt.show()` in a window,
and a script that makes many closes them with `plt.close`. On given axes pyplot is not needed and not loaded.

Colors are Okabe and Ito's, which differ for the color-blind; lines differ by their dashes and markers too, so that a
figure survives a grey printer.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from functools import singledispatch
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from mechvlm.phases import Phases
from mechvlm.probes.contextualization import ContextualizationResult
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.probes.query_reading import QueryReadingResult

LAYER = "layer (0 = embeddings)"
STYLE = {
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
PHASES = {"I": "#DCE9F5", "II": "#FBE6D4", "III": "#DDF0E6", "IV": "#EFE3F3"}
HEAT = "magma_r"
PALE, DARK = 0.13, 0.35
"""Opacity of a band of standard deviations, and of one of intervals of the mean."""


@contextmanager
def style():
    """Figures made and drawn within have this package's look; nothing outside changes."""
    # Not mpl.rc_context, which undoes everything: a notebook's backend, loaded by the first figure, turns on interactive mode
    # for good, and without it no later figure is shown.
    before = {key: mpl.rcParams[key] for key in STYLE}
    mpl.rcParams.update(STYLE)
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


@singledispatch
def draw(result, ax: Axes | None = None) -> Axes:
    """A result drawn with matplotlib, on `ax` or a new figure; gives the axes.

    Raises:
        TypeError: for something that has no picture.
    """
    known = ", ".join(sorted(kind.__name__ for kind in draw.registry if kind is not object))
    raise TypeError(f"There is no plot of a {type(result).__name__}. Drawn are: {known}.")


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


@draw.register
def _(result: ContextualizationResult, ax: Axes | None = None) -> Axes:
    with style():
        ax = axes(ax)
        n = result.inter.shape[0] - 1
        for pair in ("inter", "image", "text"):
            curve(ax, range(n + 1), getattr(result, pair).numpy().T, LINES[pair])
        layer_axis(ax, n)
        ax.set_ylabel("mean cosine" + (" less baseline" if result.adjusted else ""))
        ax.set_title(f"Contextualization, {result.model}")
        ax.legend()
    return ax


@draw.register
def _(result: LogitLensResult, ax: Axes | None = None) -> Axes:
    """Top token of each position at each layer, on the color of its probability; without words over 80 positions."""
    with style():
        n_layers, n_points, _ = result.tokens.shape
        ax = axes(ax, width=min(2 + 0.5 * n_points, 24), height=1.6 + 0.28 * n_layers)
        top = result.probs[:, :, 0].numpy()
        mesh = ax.imshow(top, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
        if n_points <= 80:
            for row, points in enumerate(result.pieces()):
                for col, pieces in enumerate(points):
                    light = top[row, col] > 0.6
                    ax.text(
                        col, row, text(pieces[0], 8 if n_points <= 48 else 6), ha="center", va="center", fontsize=6,
                        color="white" if light else "#222222",
                    )  # fmt: skip
        ax.set_yticks(range(n_layers), [str(layer) for layer in result.layers])
        _position_ticks(ax, result.position.tolist())
        ax.set_ylabel(LAYER)
        ax.set_xlabel("position")
        dropped = "" if n_points <= 80 else f" (words left out: {n_points} positions)"
        ax.set_title(f"Logit lens: likeliest token, {result.model}{dropped}")
        ax.grid(False)
        ax.figure.colorbar(mesh, ax=ax, label="probability", pad=0.01)
    return ax


@draw.register
def _(result: NormAttentionResult, ax: Axes | None = None) -> Axes:
    """The first destination's sources by layer, mean over examples."""
    with style():
        n_layers, _, _, n_src = result.norm.shape
        ax = axes(ax, width=8, height=1.6 + 0.22 * n_layers)
        mesh = heatmap(ax, result.norm[:, :, 0].mean(1).numpy(), list(result.layers))
        _position_ticks(ax, list(range(n_src)))
        ax.set_xlabel("source position")
        ax.set_title(f"Norm-based attention of {result.names[0]}, {result.model}")
        ax.figure.colorbar(mesh, ax=ax, label="norm written (residual-stream units)", pad=0.01)
    return ax


@draw.register
def _(result: QueryReadingResult, ax: Axes | None = None) -> Axes:
    """Where each query of the first example reads: small maps in one tiling, in the order of the queries."""
    with style():
        maps = result.map[0].numpy()
        n, rows, cols = maps.shape
        across = int(np.ceil(np.sqrt(n)))
        down = int(np.ceil(n / across))
        tiled = np.full((down * (rows + 1) - 1, across * (cols + 1) - 1), np.nan)
        for i, one in enumerate(maps):
            top, left = (i // across) * (rows + 1), (i % across) * (cols + 1)
            tiled[top : top + rows, left : left + cols] = one
        ax = axes(ax, width=6, height=5.2)
        mesh = ax.imshow(tiled, cmap=HEAT, vmin=0, interpolation="nearest")
        for i in range(n):
            ax.text(
                (i % across) * (cols + 1) - 0.4, (i // across) * (rows + 1) - 0.4, str(i), fontsize=6, va="top",
                color="#0072B2", weight="bold",
            )  # fmt: skip
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
        ax.set_title(f"Where each query reads, example 0, {result.model}")
        ax.figure.colorbar(mesh, ax=ax, label="attention weight (mean over layers and heads)", pad=0.02)
    return ax


@draw.register
def _(result: Phases, ax: Axes | None = None) -> Axes:
    with style():
        ax = axes(ax)
        n = len(result.mean) - 1
        shade(ax, result)
        line = LINES["inter"]
        marker = line.marker if n < 20 else ""
        ax.plot(range(n + 1), result.mean.numpy(), color=line.color, marker=marker, label="mean", zorder=3)
        ax.plot(range(n + 1), result.fit.numpy(), color="#222222", linestyle="--", linewidth=1, label="fitted segments")
        layer_axis(ax, n)
        ax.set_ylabel("image – text similarity (mean cosine)")
        ax.legend(loc="lower right")
    return ax


def shade(ax: Axes, found: Phases, names: bool = True, heads: bool = True) -> None:
    """The segments as ground, their phases above them where the data show which, boundaries with their intervals."""
    for i, ((first, last), label, direction) in enumerate(
        zip(found.intervals, found.labels, found.directions, strict=True)
    ):
        color = PHASES[label.split()[0]] if label else ("#F4F4F4", "#EBEBEB")[i % 2]
        ax.axvspan(first, last, color=color, linewidth=0, zorder=0)
        if not heads:
            continue
        head = label.split()[0] if label else {"rise": "↗", "fall": "↘"}[direction]
        ax.annotate(
            head, ((first + last) / 2, 1), xycoords=ax.get_xaxis_transform(), xytext=(0, -3), ha="center", va="top",
            textcoords="offset points", fontsize=11 if label else 9, weight="bold", color="#333333",
        )  # fmt: skip
        if label and names and last - first > 0.1 * len(found.mean):
            words = label.split(maxsplit=1)[1].replace(" ", "\n").replace("-", "-\u200b")
            ax.annotate(
                words, ((first + last) / 2, 1), xycoords=ax.get_xaxis_transform(), xytext=(0, -18), ha="center",
                va="top", textcoords="offset points", fontsize=6.5, color="#444444", linespacing=1.05,
            )  # fmt: skip
    for at, (low, high) in zip(found.boundaries, found.boundary_intervals, strict=True):
        ax.axvline(at, color="#333333", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        if heads and not np.isnan(low):
            ax.errorbar(
                [at], [0.025], xerr=[[at - low], [high - at]], transform=ax.get_xaxis_transform(), color="#333333",
                marker="|", markersize=6, capsize=3, linewidth=1.4, zorder=4,
            )  # fmt: skip


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


def _position_ticks(ax: Axes, positions: list[int]) -> None:
    step = max(1, len(positions) // 16)
    ax.set_xticks(range(0, len(positions), step), [str(p) for p in positions[::step]])


# Other files draw more results, with what stands above: they are imported last, and add themselves to `draw`.
from mechvlm.view import attribution_plots, causal_plots, pair_plots  # noqa: E402, F401
