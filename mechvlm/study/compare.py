"""compare(): several models on one axis, by relative depth."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.captioned import DOTTED, GREY, CaptionedFigure, bands, counts, legend, line_of, short

COMPARED = ("cosine_inter", "precision", "recall")
MODEL_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
MODEL_DASHES: tuple[str | tuple, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
MODEL_MARKERS = ("o", "s", "^", "D", "v")
MEASURE_TITLES = {
    "cosine_inter": "image – text similarity", "cosine_image": "similarity within image",
    "cosine_text": "similarity within text", "precision": "precision of decoded words", "recall": "recall of decoded words",
}  # fmt: skip
CONTROLS = {
    "_baseline": ("baseline (different examples)", DOTTED),
    "_other": ("another image's captions", (0, (4, 1.5))),
    "_text": ("text tokens", (0, (4, 1.5, 1, 1.5))),
}


@dataclass(frozen=True)
class Comparison:
    """The curves of several models by relative depth.

    Attributes:
        frame: label (the model, and its study where that is needed to tell them apart), and the columns of `Study.curves`
            with depth = layer / n_layers, 0 (embeddings) to 1 (what the model itself unembeds).
        counts: a sentence a study: examples read, set aside, data and seed.
        notes: in what the studies differ, where that can matter; empty where they do not.
        seeds: of the studies' bootstraps, in their order.
    """

    frame: pd.DataFrame = field(repr=False)
    counts: tuple[str, ...]
    notes: tuple[str, ...]
    seeds: tuple[int, ...]

    def plot(self, measures: Sequence[str] = COMPARED) -> CaptionedFigure:
        """The curves with their bands, a panel a measure, and the controls of each beneath it: a figure and its caption.

        Each model's own points, at their own depths: nothing is interpolated, and lines only join them.

        Raises:
            InputError: for a measure that `frame` does not hold.
        """
        check_measures(list(measures), self.frame)
        return compare_figure(self, list(measures))


def compare(studies: Sequence[StudyRecord | str | os.PathLike]) -> Comparison:
    """Several models on one axis: what each study found, by relative depth (layer / n_layers).

    Args:
        studies: studies, or the folders of written ones; of one study, its models are compared.

    The same model may come from several studies, of different data. Data sets and seeds may differ, and then the notes
    say so. Layers of different models are not matched, and nothing is interpolated.

    Raises:
        InputError: for no study, the same study twice, a folder that holds none, or studies that cannot be compared:
            with other prompts, or whose measures were made otherwise.
    """
    if isinstance(studies, StudyRecord | str | os.PathLike):
        studies = [studies]
    opened = [one if isinstance(one, StudyRecord) else StudyRecord(**load_study(Path(one))) for one in studies]
    if not opened:
        raise InputError("Give one or more studies, or folders of studies, to compare.")
    _check(opened)
    labels = _labels(opened)
    parts = []
    for i, study in enumerate(opened):
        curves = study.curves()
        n_layers = curves["model"].map({model: about["n_layers"] for model, about in study.models.items()})
        curves.insert(0, "label", curves["model"].map({model: labels[i, model] for model in study.models}))
        curves.insert(4, "depth", curves["layer"] / n_layers)
        parts.append(curves)
    return Comparison(
        frame=pd.concat(parts, ignore_index=True),
        counts=tuple(dict.fromkeys(counts(study) for study in opened)),
        notes=_notes(opened, labels),
        seeds=tuple(study.settings["seed"] for study in opened),
    )


def _check(studies: list[StudyRecord]) -> None:
    """Raises InputError for studies whose numbers do not mean the same."""
    first = studies[0]
    for number, other in enumerate(studies[1:], start=2):
        if any(other is one or (one.out is not None and _same_folder(one, other)) for one in studies[: number - 1]):
            raise InputError(f"Study {number} ({_name(other, number)}) was given twice.")
        for what, mine, theirs in [
            ("prompt", first.settings["prompt"], other.settings["prompt"]),
            *((f"measure of {key}", *pair) for key, pair in _unlike(first, other).items()),
        ]:
            if mine != theirs:
                raise InputError(
                    f"The studies {_name(first, 1)} and {_name(other, number)} cannot be compared: the {what} is {mine!r} in "
                    f"the one, and {theirs!r} in the other. Run both with the same."
                )


def _unlike(one: StudyRecord, other: StudyRecord) -> dict[str, tuple]:
    """How the measures were made. Phases are no curve, and are not compared."""
    mine, theirs = (study.settings["measures"] for study in (one, other))
    keys = [key for key in {**mine, **theirs} if key != "phases"]
    # JSON has lists only.
    return {key: (_plain(mine.get(key)), _plain(theirs.get(key))) for key in keys}


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _same_folder(one: StudyRecord, other: StudyRecord) -> bool:
    return one.out is not None and other.out is not None and one.out.resolve() == other.out.resolve()


def _name(study: StudyRecord, number: int) -> str:
    return str(study.out) if study.out is not None else f"{number} (not written)"


def _labels(studies: list[StudyRecord]) -> dict[tuple[int, str], str]:
    """By study and model. The model alone where it is in one study; else with its data, its folder, or a number."""
    every = [model for study in studies for model in study.models]
    among = list(dict.fromkeys(every))
    ways = (
        lambda i, model: short(model, among),
        lambda i, model: f"{short(model, among)}, {studies[i].dataset['name']}",
        lambda i, model: f"{short(model, among)}, {_folder(studies[i]) or f'study {i + 1}'}",
        lambda i, model: f"{short(model, among)}, study {i + 1}",
    )
    labels: dict[tuple[int, str], str] = {}
    for model in among:
        keys = [(i, model) for i, study in enumerate(studies) if model in study.models]
        named = next(found for way in ways if len(set(found := [way(*key) for key in keys])) == len(keys))
        labels |= dict(zip(keys, named, strict=True))
    return labels


def _folder(study: StudyRecord) -> str:
    return "" if study.out is None else study.out.resolve().name


def _notes(studies: list[StudyRecord], labels: dict[tuple[int, str], str]) -> tuple[str, ...]:
    notes = []
    if len({study.dataset["fingerprint"] for study in studies}) > 1:
        notes.append("The studies read different examples: a difference between curves may be one between data.")
    read = Counter(about["n_examples"] for study in studies for about in study.models.values())
    if len(read) > 1 and not notes:
        notes.append("The models did not read the same number of examples: some set more aside.")
    if len({about["dtype"] for study in studies for about in study.models.values()}) > 1:
        dtypes = [f"{label} in {studies[i].models[model]['dtype']}" for (i, model), label in labels.items()]
        notes.append(f"Precision differs: {', '.join(dtypes)}.")
    return tuple(notes)


def compare_figure(found: "Comparison", measures: list[str]) -> CaptionedFigure:
    """The curves on one axis of relative depth."""
    frame, labels = found.frame, list(found.frame["label"].unique())
    looks = zip(labels, cycle(MODEL_COLORS), cycle(MODEL_DASHES), cycle(MODEL_MARKERS), strict=False)
    lines = {label: Line(label, color, dash, marker) for label, color, dash, marker in looks}
    with style():
        figure = Figure(
            (0.6 + 4.2 * len(measures), 5.4 + 0.2 * (len(labels) // 4)), layout=ConstrainedLayoutEngine(w_pad=0.09)
        )
        grid = figure.subplots(2, len(measures), squeeze=False, sharex=True, gridspec_kw={"height_ratios": [2.4, 1.5]})
        used = set()
        for (top, low), measure in zip(grid.T, measures, strict=True):
            for label, line in lines.items():
                mine = frame[frame["label"] == label]
                line_of(top, mine[mine["measure"] == measure], line, x="depth")
                for ending, (_, dash) in CONTROLS.items():
                    rows = mine[mine["measure"] == _control(measure, ending)]
                    if rows["mean"].notna().any():
                        used.add(ending)
                        line_of(
                            low, rows, line._replace(dash=dash, marker="", label=""), x="depth", thin=True, bands=False
                        )
            if measure.startswith("cosine"):
                top.set_ylabel("mean cosine")
            else:
                top.set_ylabel("image tokens' share" if "_share_" in measure else "share of words")
                top.set_ylim(-0.03, 1.03)
            low.set_ylim(top.set_ylim(_span(top, low)))
            low.set_ylabel("its controls")
            low.set_xlabel("relative depth (layer / layers of the model)")
            low.set_xlim(-0.02, 1.02)
            top.set_title(MEASURE_TITLES.get(measure, measure))
        controls = [
            Line2D([], [], color=GREY, linestyle=dash, linewidth=1.1, label=name)
            for ending, (name, dash) in CONTROLS.items()
            if ending in used
        ]
        legend(figure, grid[0, 0], extra=controls)
    seeds = sorted(set(found.seeds))
    return CaptionedFigure(figure, " ".join([
        "Several models by relative depth, 0 what enters the decoder and 1 what the model itself unembeds: each model's own "
        "layers at layer / n_layers, joined by lines and not interpolated. Beneath each measure its controls, without bands: "
        "for similarities the anisotropy baseline, the same mean over tokens of different examples; for words decoded from "
        "image tokens another image's captions, and the words decoded from text tokens.",
        bands(*seeds), *found.counts, *found.notes,
    ]))  # fmt: skip


def _control(measure: str, ending: str) -> str:
    """A measure's control: of `precision_single` it is called `precision_other_single`."""
    name, single, _ = measure.partition("_single")
    return name + ending + single


def _span(*axes) -> tuple[float, float]:
    """The limits that hold all axes: a control is read on its measure's scale."""
    low, high = zip(*(ax.get_ylim() for ax in axes), strict=True)
    return min(low), max(high)
