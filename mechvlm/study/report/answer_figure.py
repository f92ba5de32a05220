"""Figure of a study's answers: what their tokens were read from, and when they were decided."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from mechvlm.figures.style import Line, banded, layer_axis, state_axis
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.captioned import CaptionedFigure, describe_bands, describe_counts, panel_title, short_name

GROUP_LINES = {
    "object": Line("object words", "#0072B2", "-", "o"),
    "color": Line("colors", "#D55E00", "--", "s"),
    "function": Line("function words", "#009E73", "-.", "^"),
}
SHARE_LINES = {
    "norm_share_by_token": Line("by norm written", "#0072B2", "-", "o"),
    "weight_share_by_token": Line("by raw attention weight", "#E69F00", "--", "s"),
}


def answer_figure(study: StudyRecord) -> CaptionedFigure:
    """Four panels for each model: shares and decisions by token, and both by group of words."""
    curves, models = study.answer_curves(), list(study.models)
    figure = Figure((13, 0.6 + 2.9 * len(models)), layout=ConstrainedLayoutEngine(w_pad=0.09))
    for row, model in zip(figure.subplots(len(models), 4, squeeze=False), models, strict=True):
        own, n_layers = curves[curves["model"] == model], study.models[model]["n_layers"]
        shares, decided, by_layer, by_state = row
        for measure, line in SHARE_LINES.items():
            _draw(shares, own[own["measure"] == measure], line, 1.0)
        _draw(decided, own[own["measure"] == "decided_by_token"], Line("", "#0072B2", "-", "o"), float(n_layers))
        for group, line in GROUP_LINES.items():
            part = own[own["group"] == group]
            _draw(by_layer, part[part["measure"] == "norm_share_by_layer"], line, 1.0)
            _draw(by_state, part[part["measure"] == "probability_by_state"], line, 1.0)
        for ax in (shares, by_layer, by_state):
            ax.set_ylim(-0.03, 1.03)
        decided.set_ylim(-0.3, n_layers + 0.3)
        for ax in (shares, decided):
            ax.set_xlabel("token of the answer (0 = first)")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        layer_axis(by_layer, n_layers)
        state_axis(by_state, n_layers)
        shares.set_ylabel("image tokens' share")
        decided.set_ylabel("state that decided the token")
        by_layer.set_ylabel("image tokens' share of norms")
        by_state.set_ylabel("probability of the written token")
        shares.set_title(panel_title(study, model))
        for ax, corner in ((shares, "upper right"), (by_state, "upper left")):
            if ax.get_legend_handles_labels()[0]:
                ax.legend(loc=corner)
    return CaptionedFigure(figure, (
        "The models' own answers, read in the forward that holds prompt and answer. A token was written at the position before "
        "it. First: the image tokens' share of what that position reads, mean over layers, by token of the answer. Second: the "
        "first state from which on the logit lens has the written token as the likeliest. Third and fourth: the share by layer "
        "and the written token's probability by state, for object words (words that the image's captions hold, but for stop "
        "words, colors, numbers and places), colors and function words (stop words). Answers end at different tokens: later "
        f"ones are means over fewer examples. {describe_bands(study.settings['seed'], spread=False)} {describe_counts(study)}"
    ))  # fmt: skip


def answer_sentence(study: StudyRecord) -> str:
    """The share of attention on the image while each group of words was written; "" for none."""
    if not has_answers(study):
        return ""
    curves, models = study.answer_curves("norm_share"), list(study.models)
    sentences = []
    for model in models:
        own = curves[curves["model"] == model].set_index("group")
        parts = [
            f"{own.loc[group, 'mean']:.2f}{_interval(own.loc[group])} {words}"
            for group, words in (
                ("object", "for object words"),
                ("color", "for colors"),
                ("function", "for function words"),
            )
            if group in own.index
        ]
        if parts:
            sentences.append(
                f"While {short_name(model, models)} wrote its answers, the image tokens' share of norm-based attention was "
                f"{', '.join(parts)} (mean over layers)."
            )
    return " ".join(sentences)


def has_answers(study: StudyRecord) -> bool:
    """Whether any answer was read."""
    return len(study.tables.get("answer_tokens", ())) > 0


def _interval(row: pd.Series) -> str:
    return "" if pd.isna(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"


def _draw(ax: Axes, rows: pd.DataFrame, line: Line, highest: float) -> None:
    rows = rows[rows["mean"].notna()].sort_values("at")
    if not len(rows):
        return
    ends = (rows["low"].to_numpy(), rows["high"].to_numpy()) if rows["low"].notna().any() else None
    banded(ax, rows["at"].to_numpy(), rows["mean"].to_numpy(), line, interval=ends, limits=(0.0, highest))
