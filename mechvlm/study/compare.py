"""compare(): several models on one axis, by relative depth."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from mechvlm.errors import InputError
from mechvlm.study.drawn import Drawn, counts, short
from mechvlm.study.statistics import check_measures
from mechvlm.study.study import Study

MEASURES = ("cosine_inter", "precision", "recall")


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

    def plot(self, measures: Sequence[str] = MEASURES) -> Drawn:
        """The curves with their bands, a panel a measure, and the controls of each beneath it: a figure and its caption.

        Each model's own points, at their own depths: nothing is interpolated, and lines only join them.

        Raises:
            InputError: for a measure that `frame` does not hold.
        """
        from mechvlm.study.compare_figure import compare_figure

        check_measures(list(measures), self.frame)
        return compare_figure(self, list(measures))


def compare(studies: Sequence[Study | str | os.PathLike]) -> Comparison:
    """Several models on one axis: what each study found, by relative depth (layer / n_layers).

    Args:
        studies: studies, or the folders of written ones; of one study, its models are compared.

    The same model may come from several studies, of different data. Data sets and seeds may differ, and then the notes
    say so. Layers of different models are not matched, and nothing is interpolated.

    Raises:
        InputError: for no study, the same study twice, a folder that holds none, or studies that cannot be compared:
            with other prompts, or whose measures were made otherwise.
    """
    if isinstance(studies, Study | str | os.PathLike):
        studies = [studies]
    opened = [one if isinstance(one, Study) else Study.open(one) for one in studies]
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


def _check(studies: list[Study]) -> None:
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


def _unlike(one: Study, other: Study) -> dict[str, tuple]:
    """How the measures were made. Phases are no curve, and are not compared."""
    mine, theirs = (study.settings["measures"] for study in (one, other))
    keys = [key for key in {**mine, **theirs} if key != "phases"]
    # JSON has lists only.
    return {key: (_plain(mine.get(key)), _plain(theirs.get(key))) for key in keys}


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _same_folder(one: Study, other: Study) -> bool:
    return one.out is not None and other.out is not None and one.out.resolve() == other.out.resolve()


def _name(study: Study, number: int) -> str:
    return str(study.out) if study.out is not None else f"{number} (not written)"


def _labels(studies: list[Study]) -> dict[tuple[int, str], str]:
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


def _folder(study: Study) -> str:
    return "" if study.out is None else study.out.resolve().name


def _notes(studies: list[Study], labels: dict[tuple[int, str], str]) -> tuple[str, ...]:
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
