"""Figure 4: norm-based attention, raw attention weights, and the image tokens' share of both."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from mechvlm.figures.scale import clipped
from mechvlm.figures.style import DARK, PALE, Line, heatmap, number_ticks, text
from mechvlm.figures.token_axis import column_edges, runs_of
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.captioned import (
    DOTTED,
    GREY,
    CaptionedFigure,
    describe_bands,
    describe_counts,
    legend,
    short_name,
)

DESTINATIONS = {"last_text": "last text token", "last_image": "last image token"}
SOURCE_COLORS = {"image": "#0072B2", "text": "#009E73", "special": "#888888"}
SHARES = {
    "norm": Line("by norm written", "#0072B2", "-", "o"),
    "weight": Line("by raw attention weight", "#E69F00", "--", "s"),
}


def norm_figure(study: StudyRecord) -> CaptionedFigure:
    """Norm-based attention of the last text and the last image token, with two controls.

    A row for each model and destination: heat maps [layer, source] of norms and raw weights, and
    the image tokens' share.
    """
    norms, models = study.tables["norm_attention"], list(study.models)
    rows = [(model, dest) for model in models for dest in DESTINATIONS if len(_norms_of(norms, model, dest))]
    heights = [1.15 + 0.12 * min(norms[norms["model"] == model]["layer"].nunique(), 40) for model, _ in rows]
    figure = Figure((12.5, sum(heights) + 0.9), layout=ConstrainedLayoutEngine(w_pad=0.11))
    grid = figure.subplots(
        len(rows), 3, squeeze=False, gridspec_kw={"height_ratios": heights, "width_ratios": [1, 1, 0.36]}
    )
    beyonds: list[str] = []
    for (left, middle, right), (model, dest) in zip(grid, rows, strict=True):
        values = _norms_of(norms, model, dest)
        sources = values.drop_duplicates("src").sort_values("src")
        edges, names = column_edges(sources["modality"].tolist()), [text(piece, 16) for piece in sources["piece"]]
        for ax, measure, label in ((left, "norm", "norm written"), (middle, "weight", "raw weight")):
            table = values.pivot(index="layer", columns="src", values=measure)
            layers, scale = table.index.tolist(), clipped(table.to_numpy())
            mesh = heatmap(ax, scale.values, layers, edges, cmap=scale.colors, vmin=0, vmax=scale.most)
            _label_sources(ax, sources, edges)
            if beyond := scale.sentence(layers, names.__getitem__):
                beyonds.append(f"{short_name(model, models)}, {DESTINATIONS[dest]}, {label}: {beyond}.")
            bar = figure.colorbar(mesh, ax=ax, pad=0.012, aspect=12, extend=scale.extend)
            bar.set_label(label, fontsize=8)
            bar.outline.set_visible(False)
        _draw_shares(right, study, model, dest, uniform=1 - (sources["modality"] != "image").mean())
        left.set_title(f"{short_name(model, models)}: {DESTINATIONS[dest]}  (n = {int(values['n'].iloc[0])})")
        middle.set_title(f"raw weight, mean over heads (uniform: {1 / len(sources):.2g})", fontweight="normal")
        right.set_title("image tokens' share", fontweight="normal")
    legend(figure, grid[0, 2])
    return CaptionedFigure(figure, (
        "Norm-based attention (Kobayashi et al. 2020) of the last text token and of the last image token to the tokens "
        "before them, by layer: the norm of what each source writes, heads summed first, in units of the residual stream; "
        "mean over the n examples whose tokens lie at the same positions. Controls: the raw attention weights, mean over "
        "heads, and uniform attention, which gives each of N sources the weight 1 / N. The panels on the right show the image "
        "tokens' share of the sum over all sources in each example, by norms, by weights, and under uniform attention. The "
        "strip under each map marks image tokens (blue, drawn narrower), text tokens (green) and special tokens (grey). Each "
        f"map has its own color scale{_clipped_sentence(beyonds)}. "
        f"{describe_bands(study.settings['seed'])} {describe_counts(study)}"
    ))  # fmt: skip


def _clipped_sentence(beyonds: list[str]) -> str:
    """Of a caption: which cells are beyond the scales, such as those of an attention sink."""
    if not beyonds:
        return ""
    return f"; it ends where a few cells are far beyond the others, and its arrow stands for these. {' '.join(beyonds)[:-1]}"


def _draw_shares(ax: Axes, study: StudyRecord, model: str, dest: str, uniform: float) -> None:
    """Draw the image tokens' share along the rows of the maps: mean, spread and interval.

    `uniform` is the share under uniform attention.
    """
    curves = study.curves()
    for measure, line in SHARES.items():
        is_share = (curves["model"] == model) & (curves["measure"] == f"{measure}_share_{dest}")
        curve = curves[is_share].sort_values("layer")
        rows = np.arange(len(curve))
        for low, high, alpha in (
            (curve["mean"] - curve["sd"], curve["mean"] + curve["sd"], PALE), (curve["low"], curve["high"], DARK),
        ):  # fmt: skip
            ax.fill_betweenx(rows, low, high, color=line.color, alpha=alpha, linewidth=0)
        ax.plot(
            curve["mean"].to_numpy(), rows, color=line.color, linestyle=line.dash, marker=line.marker, label=line.label,
            markersize=3.5 if len(rows) < 20 else 0, linewidth=1.3,
        )  # fmt: skip
    ax.plot(
        np.full(len(rows), uniform), rows, color=GREY, linestyle=DOTTED, linewidth=1.3, label="under uniform attention"
    )
    ax.set_xlim(-0.04, 1.04)
    ax.set_ylim(-0.5, len(rows) - 0.5)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    number_ticks(ax.yaxis, curve["layer"].tolist())


def _norms_of(norms: pd.DataFrame, model: str, dest: str) -> pd.DataFrame:
    return norms[(norms["model"] == model) & (norms["dest"] == dest)]


def _label_sources(ax: Axes, sources: pd.DataFrame, edges: np.ndarray) -> None:
    """Draw a strip under the map for the kinds of source, and each text token if there is room."""
    kinds, pieces = sources["modality"].tolist(), sources["piece"].tolist()
    ticks, labels = [], []
    has_room = sum(kind != "image" for kind in kinds) <= 48
    # x in columns of the map, y in inches below it, so that the strip is as high under every map.
    below = ax.figure.dpi_scale_trans + ScaledTranslation(0, 0, ax.transAxes)  # type: ignore[arg-type]
    strip = blended_transform_factory(ax.transData, below)
    for first, last, kind in runs_of(kinds):
        left, right = edges[first], edges[last + 1]
        color = SOURCE_COLORS.get(kind, "#888888")
        ax.add_patch(
            Rectangle((left, -0.09), right - left, 0.06, transform=strip, clip_on=False, color=color, linewidth=0)
        )
        if first:
            ax.axvline(left, color="#555555", linewidth=0.6)
        if kind == "image" or not has_room:
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
