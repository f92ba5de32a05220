"""Pictures of the causal experiments: means over examples with their 95 % bootstrap intervals."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from mechvlm.experiments.results import CausalTraceResult, InformationFlowResult, ObjectAblationResult
from mechvlm.intervals import Interval, mean_interval
from mechvlm.view.plots import LAYER, axes, draw, heatmap, style, text

# Okabe and Ito's. As many as have no common divisor with the dashes: 28 flows look different.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")
BARS = {
    "own": ("the object's own tokens", "#0072B2", ""),
    "random": ("random others", "#E69F00", "///"),
    "highest norm": ("others of highest norm", "#999999", "..."),
}
ZERO_WHITE = "RdBu_r"
CORRUPTED = {
    "noise": "noise on the image", "image": "image exchanged", "blank": "image greyed out", "words": "noise on the words",
}  # fmt: skip
TOTAL = 0.5
"""How wide the total effect's cell is; a group's is 1."""


@draw.register
def _(result: InformationFlowResult, ax: Axes | None = None) -> Axes:
    """The mean change of the answer's probability by the window's center, a line and its band for each flow.

    An answer of probability 0 has no relative change: its example is left out.
    """
    change, found = result.change, result.interval
    layers = np.arange(len(result.windows))
    step = -(-len(layers) // 14)
    with style():
        ax = axes(ax, width=7, height=4)
        ax.axhline(0, color="#444444", linewidth=0.8)
        for i, flow in enumerate(result.flows):
            color, mean = COLORS[i % len(COLORS)], found.mean[i].numpy()
            ax.fill_between(layers, found.low[i].numpy(), found.high[i].numpy(), color=color, alpha=0.15, linewidth=0)
            ax.plot(
                layers, mean, color=color, linestyle=DASHES[i % 4], marker=MARKERS[i % 4], label=_arrow(flow),
                markevery=step,
            )  # fmt: skip
        ax.set_xlim(-0.25, len(layers) - 0.75)
        ax.set_xticks(layers[::step])
        ax.set_xlabel("center of the window (layer of the decoder, 0 = first)")
        ax.set_ylabel(result.units)
        ax.legend(title="attention knocked out", title_fontsize=8, alignment="left")
        _heading(
            ax, f"Information flow, {_model(result.model)}: attention knocked out {_where(result.windows)}",
            f"{_count(change)}; lines are means, bands their {_LEVEL}" if change.shape[-1] > 1 else _ALONE,
        )  # fmt: skip
    return ax


@draw.register
def _(result: CausalTraceResult, ax: Axes | None = None) -> Axes:
    """The mean effect by layer and group, hatched where its interval holds 0; the last column is the total effect."""
    found, total = result.interval, mean_interval(result.total_effect)
    n_layers, n_groups = found.mean.shape
    # A gap, and then the total as one cell of the map's height: on the same colors, the most that can come back.
    gap, column = np.full((n_layers, 1), np.nan), np.full((n_layers, 1), float(total.mean))
    shown = np.concatenate([found.mean.numpy(), gap, column], axis=1)
    start, stop = n_groups - 0.3, n_groups - 0.3 + TOTAL
    edges = np.append(np.arange(n_groups + 1) - 0.5, [start, stop])
    most = float(np.nanmax(np.abs(shown), initial=1e-6))
    digits = min(max(2, 1 - int(np.floor(np.log10(most)))), 6)
    with style():
        ax = axes(ax, width=max(6.4, 3.2 + 0.8 * n_groups), height=1.9 + min(0.3 * n_layers, 2.4 + 0.15 * n_layers))
        mesh = heatmap(ax, shown, result.layers, edges, cmap=ZERO_WHITE, vmin=-most, vmax=most)
        extent = ax.get_window_extent()
        wide, high = extent.width / ax.figure.dpi / (stop + 0.5), extent.height / ax.figure.dpi / n_layers
        for row, group in np.ndindex(n_layers, n_groups):
            value, none = float(found.mean[row, group]), _holds_0(found, row, group)
            if none:
                _hatch(ax, group - 0.5, row - 0.5, 1, 1)
            if wide > 0.3 and high > 0.12 and not np.isnan(value):
                color = _ink(value / most, "#666666" if none else "#222222")
                ax.text(group, row, _number(value, digits), color=color, **CENTERED)
        if _holds_0(total):
            _hatch(ax, start, -0.5, TOTAL, n_layers)
        ends = "" if total.low.isnan() else f"\n[{_number(total.low, digits)}, {_number(total.high, digits)}]"
        ax.text(
            (start + stop) / 2, (n_layers - 1) / 2, _number(total.mean, digits) + ends, rotation=90,
            color=_ink(float(total.mean) / most, "#222222"), **CENTERED,
        )  # fmt: skip
        names = [text(group, 24) for group in result.groups]
        ax.set_xticks([*range(n_groups), (start + stop) / 2], [*names, "total effect"])
        ax.tick_params(axis="x", length=0)
        if max(map(len, names)) * 0.08 > wide:  # inches
            for label in ax.get_xticklabels():
                label.set(rotation=30, ha="right", rotation_mode="anchor")
        ax.spines[:].set_visible(False)
        ax.set_ylabel(LAYER)
        ax.set_xlabel(f"positions whose {result.at} was restored")
        several = f"{_count(result.effect)}, means; hatched: the {_LEVEL} holds 0"
        _heading(
            ax, f"Causal trace, {_model(result.model)}: {CORRUPTED[result.corrupt]}",
            f"{result.at} restored {_where(result.windows)}\n{several if len(result.p) > 1 else _ALONE}",
        )  # fmt: skip
        bar = ax.figure.colorbar(mesh, ax=ax, label=result.units, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.set_ylim(min(0, float(np.nanmin(shown, initial=0))), most)
    return ax


@draw.register
def _(result: ObjectAblationResult, ax: Axes | None = None) -> Axes:
    """The drop in naming accuracy by margin, a bar for each condition; over fewer examples where it says so."""
    found = result.interval
    seen = (~result.drop.isnan()).sum(-1)
    n_conditions, n_margins, n = result.drop.shape
    with style():
        ax = axes(ax, width=max(5.5, 1.8 + 1.5 * n_margins), height=3.9)
        width = 0.8 / n_conditions
        for i, condition in enumerate(result.conditions):
            label, color, hatch = BARS[condition]
            x = np.arange(n_margins) + (i - (n_conditions - 1) / 2) * width
            mean, low, high = (part[i].numpy() for part in found)
            ax.bar(x, mean, 0.9 * width, label=label, color=color, hatch=hatch, edgecolor="white", linewidth=0)
            ax.vlines(x, low, high, color="#222222", linewidth=1.2)
            tops = np.fmax(high, np.fmax(mean, 0))
            for at, value, top, count in zip(x, mean.tolist(), tops, seen[i].tolist(), strict=True):
                words = ("–" if np.isnan(value) else _number(value, 0)) + (f"\nn = {count}" if count < n else "")
                ax.annotate(
                    words, (at, 0 if np.isnan(value) else top), xytext=(0, 2), textcoords="offset points", ha="center",
                    va="bottom", fontsize=7, color="#222222",
                )  # fmt: skip
        ax.axhline(0, color="#444444", linewidth=0.8)
        ax.margins(y=0.12)
        ax.grid(False, axis="x")
        tokens = result.n_tokens.double().mean(-1).tolist()
        ax.set_xticks(
            range(n_margins), [f"{m}\n{k:.1f} tokens" for m, k in zip(result.margins, tokens, strict=True)]
        )  # fmt: skip
        ax.tick_params(axis="x", length=0)
        ax.set_xlabel("margin around the object (patches); tokens ablated (mean)")
        ax.set_ylabel(result.units)
        # Above the axes, where no bar is.
        ax.legend(ncols=n_conditions, loc="lower left", bbox_to_anchor=(-0.01, 1), borderpad=0)
        before = 100 * result.correct.double().mean()
        _heading(
            ax, f"Object ablation, {_model(result.model)}: naming accuracy before {before:.0f} %",
            f"n = {n} examples; bars are means, lines their {_LEVEL}" if n > 1 else _ALONE, above=18,
        )  # fmt: skip
    return ax


CENTERED: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
_LEVEL = "95 % bootstrap interval"
_ALONE = "n = 1 example, so no interval"


def _holds_0(found: Interval, *at: int) -> bool:
    return bool(found.low[at] <= 0 <= found.high[at])


def _count(values: Tensor) -> str:
    """How many examples have a value at all, of how many."""
    n = values.shape[-1]
    seen = int((~values.isnan()).flatten(0, -2).any(0).sum())
    return f"n = {n} examples" if seen == n else f"n = {seen} of {n} examples"


def _where(windows: tuple[tuple[int, int], ...]) -> str:
    """The width of the whole windows: at the ends of the decoder they are cut."""
    width = max(stop - start for start, stop in windows)
    return "at one layer" if width == 1 else f"in windows of {width} layers"


def _model(name: str) -> str:
    """The last part of a hub id or a path."""
    return text(name.rstrip("/").split("/")[-1], 40)


def _number(value: float | Tensor, digits: int) -> str:
    # Adding 0 makes a plain 0 of -0.
    return f"{round(float(value), digits) + 0.0:.{digits}f}".replace("-", "−")


def _ink(share: float, dark: str) -> str:
    """What can be read on a color that is this share of the darkest."""
    return "white" if abs(share) > 0.6 else dark


def _arrow(flow: str) -> str:
    return text(flow.replace("->", "→"), 60)


def _hatch(ax: Axes, x: float, y: float, width: float | int, height: int) -> None:
    ax.add_patch(Rectangle((x, y), width, height, fill=False, hatch="////", edgecolor="#d2d2d2", linewidth=0))


def _heading(ax: Axes, title: str, note: str, above: int = 6) -> None:
    """A title, and beneath it in plain letters what the reader must know of the numbers; `above` the axes, in points."""
    ax.set_title(title, pad=above + 2 + 10 * (note.count("\n") + 1))
    ax.annotate(
        note, (0, 1), xycoords="axes fraction", xytext=(0, above), textcoords="offset points", fontsize=8, color="#444444",
        va="bottom", linespacing=1.1,
    )  # fmt: skip
