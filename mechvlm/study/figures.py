"""The four figures, from the tables alone: `redraw` makes them again without a model."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from mechvlm.phases import Phases
from mechvlm.view.plots import LINES, curve, heatmap, layer_axis, shade, style, text

NAMES = ("phases", "lens", "contextualization", "norm_attention")
BAND = "Lines are means over examples, bands their standard deviation to either side."
DESTINATIONS = {"last_text": "last text token", "last_image": "last image token"}
DOTTED = (0, (1, 1.5))
SOURCE = {"image": "#0072B2", "text": "#009E73", "special": "#888888"}


def draw_all(tables: dict[str, pd.DataFrame], found: dict[str, Phases | None]) -> dict[str, tuple[Figure, str]]:
    """Each figure and its caption, by name. Draw and save them within `mechvlm.view.plots.style()`."""
    return {
        "phases": phase_figure(tables["contextualization"], found),
        "lens": lens_figure(tables["lens"]),
        "contextualization": context_figure(tables["contextualization"], tables["baseline"]),
        "norm_attention": norm_figure(tables["norm_attention"]),
    }


def save_all(figures: dict[str, tuple[Figure, str]], folder: Path) -> None:
    """Each figure as PNG (200 dpi) and SVG."""
    folder.mkdir(exist_ok=True)
    with style(), warnings.catch_warnings():
        # A token of a script that the font lacks shows as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        for name, (figure, _) in figures.items():
            figure.savefig(folder / f"{name}.png")
            # No date, so that the same study gives the same file.
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def phase_figure(curves: pd.DataFrame, found: dict[str, Phases | None]) -> tuple[Figure, str]:
    """(1) The inter-modal curve of each model with the segments that its data support; intra-modal curves beneath."""
    models = list(found)
    with style():
        figure = Figure((1 + 4.6 * len(models), 5.2), layout="constrained")
        grid = figure.subplots(
            2, len(models), squeeze=False, sharex="col", gridspec_kw={"height_ratios": [3, 1.15], "hspace": 0.02}
        )
        for (top, low), model in zip(grid.T, models, strict=True):
            values, n = _by_pair(curves, model)
            layers, phases = range(n + 1), found[model]
            curve(top, layers, values["inter"], LINES["inter"])
            _headroom(top, 0.26)
            if phases is not None:
                top.plot(
                    layers,
                    phases.fit.numpy(),
                    color="#222222",
                    linestyle=(0, (4, 2)),
                    linewidth=1,
                    label="fitted segments",
                )
                shade(top, phases)
                shade(low, phases, names=False, heads=False)
                if not phases.shows_pattern:
                    _note(top, "does not show the paper's four phases")
            else:
                _note(top, "too few layers for phases")
            for pair in ("image", "text"):
                curve(low, layers, values[pair], LINES[pair], thin=True)
            layer_axis(low, n)
            top.set_title(f"{short(model, models)}  (n = {len(values['inter'])})")
        grid[0, 0].set_ylabel("image – text similarity\n(mean cosine)")
        grid[1, 0].set_ylabel("similarity within\n(mean cosine)")
        _legend(figure, grid[0, 0], grid[1, 0])
    level = next((f"{p.confidence:.0%}" for p in found.values() if p is not None), "")
    return figure, (
        "The four-phase diagram: mean cosine between image and text tokens by layer, eq. (1) of Wei et al. 2024, with "
        "the fewest rising and falling segments that predict held-out examples well. They are named I to IV where their "
        f"order fits the paper's. Bars at the bottom are {level} bootstrap intervals of the turning layers over examples. "
        f"Beneath, the similarity within each modality. {BAND}"
    )


def lens_figure(scores: pd.DataFrame) -> tuple[Figure, str]:
    """(2) Precision and recall of the words that visual tokens decode to, with the two controls."""
    models = list(scores["model"].unique())
    kinds = {("image", "own"): "own", ("image", "other"): "other", ("text", "own"): "prompt"}
    with style():
        figure = Figure((1 + 4.6 * len(models), 5.6), layout="constrained")
        grid = figure.subplots(2, len(models), squeeze=False, sharex="col", sharey="row")
        for column, model in zip(grid.T, models, strict=True):
            mine = scores[scores["model"] == model]
            n = int(mine["layer"].max())
            for ax, measure in zip(column, ("precision", "recall"), strict=True):
                part = mine[mine["measure"] == measure]
                for (tokens, captions), line in kinds.items():
                    rows = part[(part["tokens"] == tokens) & (part["captions"] == captions)]
                    if len(rows):
                        curve(ax, range(n + 1), _matrix(rows), LINES[line], limits=(0.0, 1.0))
                ax.set_ylim(-0.03, 1.03)
            layer_axis(column[1], n)
            column[0].set_title(f"{short(model, models)}  (n = {mine['example'].nunique()})")
        for row, measure in zip(grid, ("precision", "recall"), strict=True):
            row[0].set_ylabel(f"{measure} of decoded words")
        _legend(figure, grid[0, 0])
    return figure, (
        "Words decoded from visual tokens (logit lens, likeliest token of each position) against the captions, by "
        "layer: precision, the share of decoded words that the captions hold, and recall, the share of the captions' "
        "words that are decoded. Unique words, lemmatised, without stop words; where an example decodes no word at all it "
        "has no precision. Controls: the same words against another image's captions, and the words decoded from the "
        f"text positions of the prompt, template included. {BAND}"
    )  # fmt: skip


def context_figure(curves: pd.DataFrame, baseline: pd.DataFrame) -> tuple[Figure, str]:
    """(3) Inter-modal and both intra-modal similarities by layer, with the anisotropy baselines."""
    models = list(curves["model"].unique())
    with style():
        figure = Figure((1 + 4.6 * len(models), 3.9), layout="constrained")
        grid = figure.subplots(1, len(models), squeeze=False, sharey=True)
        for ax, model in zip(grid[0], models, strict=True):
            values, n = _by_pair(curves, model)
            for pair in ("inter", "image", "text"):
                curve(ax, range(n + 1), values[pair], LINES[pair])
                base = baseline[(baseline["model"] == model) & (baseline["pair"] == pair)].sort_values("layer")
                if base["value"].notna().any():
                    ax.plot(base["layer"], base["value"], color=LINES[pair].color, linestyle=DOTTED, linewidth=0.9)
            layer_axis(ax, n)
            ax.set_title(f"{short(model, models)}  (n = {len(values['inter'])})")
        grid[0, 0].set_ylabel("mean cosine")
        grid[0, 0].plot([], [], color="#555555", linestyle=DOTTED, linewidth=0.9, label="baseline (different examples)")
        _legend(figure, grid[0, 0])
    return figure, (
        "Contextualization by layer: mean pairwise cosine between image and text tokens, within image tokens, and "
        "within text tokens, each vector's cosine to itself included as in the paper. Dotted, the anisotropy baseline of "
        f"each: the same mean over tokens of different examples. {BAND}"
    )


def norm_figure(norms: pd.DataFrame) -> tuple[Figure, str]:
    """(4) Norm-based attention of the last text and the last image token to the tokens before them; raw weights too."""
    models = list(norms["model"].unique())
    rows = [(model, dest) for model in models for dest in DESTINATIONS if len(_rows(norms, model, dest))]
    with style():
        heights = [0.95 + 0.12 * min(norms[norms["model"] == model]["layer"].nunique(), 40) for model, _ in rows]
        figure = Figure((11.5, sum(heights) + 0.5), layout="constrained")
        grid = figure.subplots(len(rows), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
        for (left, right), (model, dest) in zip(grid, rows, strict=True):
            mine = _rows(norms, model, dest)
            n = int(mine["n"].iloc[0])
            for ax, measure in ((left, "norm"), (right, "weight")):
                values = mine.pivot(index="layer", columns="src", values=measure)
                sources = mine.drop_duplicates("src").sort_values("src")
                edges = _edges(sources["modality"].tolist())
                mesh = heatmap(ax, values.to_numpy(), values.index.tolist(), edges, vmin=0)
                _sources(ax, sources, edges)
                bar = figure.colorbar(mesh, ax=ax, pad=0.012, aspect=12)
                bar.set_label("norm written" if measure == "norm" else "raw weight", fontsize=8)
                bar.outline.set_visible(False)
            left.set_title(f"{short(model, models)}: {DESTINATIONS[dest]}  (n = {n})")
            right.set_title("raw attention weight, mean over heads", fontweight="normal")
    return figure, (
        "Norm-based attention (Kobayashi et al. 2020) of the last text token and of the last image token to the tokens "
        "before them, layer by layer, mean over examples: the norm of what each source writes, heads summed first, in "
        "units of the residual stream. Right, the raw attention weights, mean over heads. The strip under each map says "
        "which sources are image (blue, drawn narrower), text (green) and special tokens (grey). Each map has its own "
        "color scale."
    )


def short(model: str, among: list[str]) -> str:
    """The last part of a hub id or a path, where that tells the models apart."""
    tails = [m.rstrip("/").split("/")[-1] for m in among]
    tail = model.rstrip("/").split("/")[-1]
    return text(tail if tails.count(tail) == 1 and tail else model, 40)


def _by_pair(curves: pd.DataFrame, model: str) -> tuple[dict[str, np.ndarray], int]:
    mine = curves[curves["model"] == model]
    return {pair: _matrix(part) for pair, part in mine.groupby("pair")}, int(mine["layer"].max())


def _matrix(rows: pd.DataFrame) -> np.ndarray:
    """[example, layer]"""
    return rows.pivot(index="example", columns="layer", values="value").to_numpy(dtype=float)


def _rows(norms: pd.DataFrame, model: str, dest: str) -> pd.DataFrame:
    return norms[(norms["model"] == model) & (norms["dest"] == dest)]


def _headroom(ax: Axes, share: float) -> None:
    """Room above the curves for the phases' names, and a little below for the boundaries' bars."""
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.08 * (high - low), high + share * (high - low))


def _note(ax: Axes, words: str) -> None:
    ax.annotate(
        words, (0.5, 0), xycoords="axes fraction", xytext=(0, 14), textcoords="offset points", ha="center", fontsize=8,
        style="italic", color="#8A1C1C", bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5},
    )  # fmt: skip


def _legend(figure: Figure, *axes: Axes) -> None:
    handles = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    figure.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=5)


def _edges(kinds: list[str]) -> np.ndarray:
    """Borders of the columns: visual tokens narrow, so that they take half the width at most and text can be read."""
    visual = np.array([kind == "image" for kind in kinds])
    others = max(int((~visual).sum()), 8)
    return np.concatenate([[0], np.where(visual, min(1.0, others / max(visual.sum(), 1)), 1.0).cumsum()])


def _sources(ax: Axes, sources: pd.DataFrame, edges: np.ndarray) -> None:
    """A strip under the map for the kinds of source, and each text token's name where there is room for it."""
    kinds, pieces = sources["modality"].tolist(), sources["piece"].tolist()
    ticks, labels = [], []
    room = sum(kind != "image" for kind in kinds) <= 48
    # Inches below the map, whatever its height.
    below = ax.figure.dpi_scale_trans + ScaledTranslation(0, 0, ax.transAxes)  # type: ignore[arg-type]
    strip = blended_transform_factory(ax.transData, below)
    for first, last, kind in _runs(kinds):
        left, right = edges[first], edges[last + 1]
        color = SOURCE.get(kind, "#888888")
        ax.add_patch(
            Rectangle((left, -0.09), right - left, 0.06, transform=strip, clip_on=False, color=color, linewidth=0)
        )
        if first:
            ax.axvline(left, color="#555555", linewidth=0.6)
        if kind == "image" or not room:
            ticks.append((left + right) / 2)
            labels.append(f"{last - first + 1} {kind}" if kind != "image" else f"{last - first + 1} image tokens")
        else:
            ticks += ((edges[first : last + 1] + edges[first + 1 : last + 2]) / 2).tolist()
            labels += [text(piece, 10) for piece in pieces[first : last + 1]]
    ax.set_xticks(ticks, labels, fontsize=6.5)
    for tick in ax.get_xticklabels():
        if not tick.get_text().endswith("image tokens"):
            tick.set_rotation(90)
    ax.tick_params(axis="x", length=0, pad=9)


def _runs(kinds: list[str]) -> Iterator[tuple[int, int, str]]:
    first = 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[first]:
            yield first, i - 1, kinds[first]
            first = i
