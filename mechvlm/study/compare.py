"""compare(): the curves of several models on one axis, the relative depth."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from mechvlm.errors import InputError
from mechvlm.figures.style import Line, style
from mechvlm.study.curves import check_measures
from mechvlm.study.load import load_study
from mechvlm.study.record import StudyRecord, shortened_names
from mechvlm.study.report.captioned import (
    DOTTED,
    GREY,
    CaptionedFigure,
    describe_bands,
    describe_counts,
    draw_curve,
    legend,
    short_name,
)

DEFAULT_MEASURES = ("cosine_inter", "precision", "recall")
MODEL_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
MODEL_DASHES: tuple[str | tuple, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
MODEL_MARKERS = ("o", "s", "^", "D", "v")
MEASURE_TITLES = {
    "cosine_inter": "image – text similarity", "cosine_image": "similarity within image",
    "cosine_text": "similarity within text", "precision": "precision of decoded words", "recall": "recall of decoded words",
    "word_share": "share of image tokens that decode to a word",
}  # fmt: skip
CONTROLS = {
    "_baseline": ("baseline (different examples)", DOTTED),
    "_other": ("another image's captions", (0, (4, 1.5))),
    "_text": ("text tokens", (0, (4, 1.5, 1, 1.5))),
}
"""{ending of a control's measure: its name and dash}."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """The curves of several models by relative depth.

    Attributes:
        frame: label, depth, and the columns of `Study.curves`. The label is the model's name, with
            its study where several studies hold the model. depth = layer / n_layers, from 0
            (embeddings) to 1 (what the model itself unembeds); `layer` as in `Study.frame`.
        counts: one sentence per study: examples read and set aside, data and seed.
        notes: the differences between the studies that can matter; empty if there are none.
        seeds: of the studies' bootstraps, in the order of the studies.
    """

    frame: pd.DataFrame
    counts: tuple[str, ...]
    notes: tuple[str, ...]
    seeds: tuple[int, ...]

    def __repr__(self) -> str:
        labels = [label.rstrip("/").split("/")[-1] for label in self.frame["label"].unique()]
        return f"Comparison({len(labels)} curves a measure: {shortened_names(labels)}; {len(self.notes)} notes)"

    def plot(self, measures: Sequence[str] = DEFAULT_MEASURES) -> CaptionedFigure:
        """Draw the curves with their bands: a panel for each measure, and its controls beneath it.

        Each point is a state of a model (for shares a layer), at its own depth. Lines join the
        points; nothing is interpolated.

        Args:
            measures: of the column "measure" of `frame`.

        Raises:
            InputError: for a measure that `frame` does not hold.
        """
        check_measures(list(measures), self.frame)
        return compare_figure(self, list(measures))


def compare(studies: Sequence[StudyRecord | str | os.PathLike]) -> Comparison:
    """Compare the curves of several models by relative depth (layer / n_layers).

    The same model may be in several studies, such as studies of different data. Data sets and seeds
    may differ; the notes then say so. Layers of different models are not matched, and nothing is
    interpolated.

    Args:
        studies: studies, or folders of finished studies. A single study compares its own models.

    Raises:
        InputError: for no study, the same study twice, a folder without a finished study, or
            studies that cannot be compared: their prompts differ, or their measures were computed
            with different settings.

    Example:
        >>> comparison = compare(["results/llava", "results/instructblip"])
        >>> comparison.plot(["precision"]).save("compare.png")
    """
    if isinstance(studies, StudyRecord | str | os.PathLike):
        studies = [studies]
    records = [s if isinstance(s, StudyRecord) else StudyRecord(**load_study(Path(s))) for s in studies]
    if not records:
        raise InputError("Give one or more studies, or folders of studies, to compare.")
    _check_comparable(records)
    labels = _labels(records)
    parts = []
    for i, study in enumerate(records):
        curves = study.curves()
        n_layers = curves["model"].map({model: about["n_layers"] for model, about in study.models.items()})
        curves.insert(0, "label", curves["model"].map({model: labels[i, model] for model in study.models}))
        curves.insert(4, "depth", curves["layer"] / n_layers)
        parts.append(curves)
    return Comparison(
        frame=pd.concat(parts, ignore_index=True),
        counts=tuple(dict.fromkeys(describe_counts(study) for study in records)),
        notes=_notes(records, labels),
        seeds=tuple(study.settings["seed"] for study in records),
    )


def _check_comparable(studies: list[StudyRecord]) -> None:
    """Raise InputError for studies whose numbers mean different things."""
    first = studies[0]
    for number, other in enumerate(studies[1:], start=2):
        if any(other is earlier or _same_folder(earlier, other) for earlier in studies[: number - 1]):
            raise InputError(f"Study {number} ({_name(other, number)}) was given twice.")
        for setting, value, other_value in [
            ("prompt", first.settings["prompt"], other.settings["prompt"]),
            *((f"measure of {key}", *values) for key, values in _measure_settings(first, other).items()),
        ]:
            if value != other_value:
                raise InputError(
                    f"The studies {_name(first, 1)} and {_name(other, number)} cannot be compared: the {setting} is "
                    f"{value!r} in the one, and {other_value!r} in the other. Run both with the same."
                )


def _measure_settings(a: StudyRecord, b: StudyRecord) -> dict[str, tuple]:
    """The settings of each measure in both studies, but for phases, which are no curve."""
    settings_a, settings_b = (study.settings["measures"] for study in (a, b))
    keys = [key for key in {**settings_a, **settings_b} if key != "phases"]
    return {key: (_as_json(settings_a.get(key)), _as_json(settings_b.get(key))) for key in keys}


def _as_json(value):
    """The value as it comes back from a file: with lists for tuples."""
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _same_folder(a: StudyRecord, b: StudyRecord) -> bool:
    return a.out is not None and b.out is not None and a.out.resolve() == b.out.resolve()


def _name(study: StudyRecord, number: int) -> str:
    return str(study.out) if study.out is not None else f"{number} (not written)"


def _labels(studies: list[StudyRecord]) -> dict[tuple[int, str], str]:
    """{(study's place, model): label}.

    The label of a model in one study is its name. For a model in several studies, the first of data
    set, folder and number that tells the studies apart is added.
    """
    models = list(dict.fromkeys(model for study in studies for model in study.models))
    ways = (
        lambda i, model: short_name(model, models),
        lambda i, model: f"{short_name(model, models)}, {studies[i].dataset['name']}",
        lambda i, model: f"{short_name(model, models)}, {_folder(studies[i]) or f'study {i + 1}'}",
        lambda i, model: f"{short_name(model, models)}, study {i + 1}",
    )
    labels: dict[tuple[int, str], str] = {}
    for model in models:
        keys = [(i, model) for i, study in enumerate(studies) if model in study.models]
        candidates = ([way(*key) for key in keys] for way in ways)
        unique = next(names for names in candidates if len(set(names)) == len(keys))
        labels |= dict(zip(keys, unique, strict=True))
    return labels


def _folder(study: StudyRecord) -> str:
    return "" if study.out is None else study.out.resolve().name


def _notes(studies: list[StudyRecord], labels: dict[tuple[int, str], str]) -> tuple[str, ...]:
    notes = []
    if len({study.dataset["fingerprint"] for study in studies}) > 1:
        notes.append("The studies read different examples: curves may differ because the data do.")
    n_examples = {about["n_examples"] for study in studies for about in study.models.values()}
    if len(n_examples) > 1 and not notes:
        notes.append("The models did not read the same number of examples: some set more of them aside.")
    if len({about["dtype"] for study in studies for about in study.models.values()}) > 1:
        dtypes = [f"{label} in {studies[i].models[model]['dtype']}" for (i, model), label in labels.items()]
        notes.append(f"The models ran in different dtypes: {', '.join(dtypes)}.")
    return tuple(notes)


def compare_figure(comparison: Comparison, measures: list[str]) -> CaptionedFigure:
    """Draw the curves on one axis of relative depth."""
    frame, labels = comparison.frame, list(comparison.frame["label"].unique())
    looks = zip(labels, cycle(MODEL_COLORS), cycle(MODEL_DASHES), cycle(MODEL_MARKERS), strict=False)
    lines = {label: Line(label, color, dash, marker) for label, color, dash, marker in looks}
    with style():
        figure = Figure(
            (0.6 + 4.2 * len(measures), 5.4 + 0.2 * (len(labels) // 4)), layout=ConstrainedLayoutEngine(w_pad=0.09)
        )
        grid = figure.subplots(2, len(measures), squeeze=False, sharex=True, gridspec_kw={"height_ratios": [2.4, 1.5]})
        drawn_controls = set()
        for (top, bottom), measure in zip(grid.T, measures, strict=True):
            for label, line in lines.items():
                curves = frame[frame["label"] == label]
                draw_curve(top, curves[curves["measure"] == measure], line, x="depth")
                for ending, (_, dash) in CONTROLS.items():
                    rows = curves[curves["measure"] == _control(measure, ending)]
                    if rows["mean"].notna().any():
                        drawn_controls.add(ending)
                        control_line = line._replace(dash=dash, marker="", label="")
                        draw_curve(bottom, rows, control_line, x="depth", thin=True, bands=False)
            if measure.startswith("cosine"):
                top.set_ylabel("mean cosine")
            else:
                top.set_ylabel("image tokens' share" if "_share_" in measure else "share of words")
                top.set_ylim(-0.03, 1.03)
            # One scale for both, so that a measure and its controls can be compared by eye.
            bottom.set_ylim(top.set_ylim(_span(top, bottom)))
            bottom.set_ylabel("its controls")
            bottom.set_xlabel("relative depth (state / layers of the model)")
            bottom.set_xlim(-0.02, 1.02)
            top.set_title(MEASURE_TITLES.get(measure, measure))
        controls = [
            Line2D([], [], color=GREY, linestyle=dash, linewidth=1.1, label=name)
            for ending, (name, dash) in CONTROLS.items()
            if ending in drawn_controls
        ]
        legend(figure, grid[0, 0], extra=controls)
    seeds = sorted(set(comparison.seeds))
    return CaptionedFigure(figure, " ".join([
        "Several models by relative depth, from 0 (what enters the decoder) to 1 (what the model itself unembeds). Each point "
        "is a state of a model (for shares a layer), at its number / n_layers; the points are joined by lines and not "
        "interpolated. Beneath each "
        "measure are its controls, without bands. For similarities: the anisotropy baseline, the same mean over tokens of "
        "different examples. For words decoded from image tokens: another image's captions, and the words decoded from text "
        "tokens.",
        describe_bands(*seeds), *comparison.counts, *comparison.notes,
    ]))  # fmt: skip


def _control(measure: str, ending: str) -> str:
    """The measure of a control: "precision_other_single" for "precision_single" and "_other"."""
    name, single, _ = measure.partition("_single")
    return name + ending + single


def _span(*axes) -> tuple[float, float]:
    """The y limits that cover all axes."""
    low, high = zip(*(ax.get_ylim() for ax in axes), strict=True)
    return min(low), max(high)
