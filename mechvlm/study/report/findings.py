"""What each figure of the report found, in one sentence with its interval, and how it was read."""

import pandas as pd

from mechvlm.experiments.contextualization_controls_result import CONTROL_NAMES
from mechvlm.intervals import N_RESAMPLES
from mechvlm.measures.phases import Phases
from mechvlm.study.curves import CONFIDENCE
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.answer_figure import answer_sentence
from mechvlm.study.report.captioned import short_name
from mechvlm.study.report.pairs import pair_summary, percent_interval
from mechvlm.study.report.summary import phases_in_words, summary

Facts = list[tuple[str, str]]


def findings(study: StudyRecord) -> dict[str, str]:
    """One sentence for each figure that the study has, by the figure's name.

    A mean stands with its 95 % bootstrap interval over examples, in brackets.
    """
    rows, curves = summary(study).set_index("model"), study.curves()
    sentences = {
        "phases": _joined(study, lambda model: _phases(study, model)),
        "lens": _joined(study, lambda model: _words(rows.loc[model])),
        "contextualization": _joined(study, lambda model: _cosines(rows.loc[model])),
        "norm_attention": _joined(study, lambda model: _shares(curves[curves["model"] == model])),
    }
    if len(pairs := pair_summary(study)):
        sentences["pairs"] = _joined(study, lambda model: _scores(pairs[pairs["model"] == model]))
    if sentence := answer_sentence(study):
        sentences["answers"] = sentence
    return sentences


def facts(study: StudyRecord) -> dict[str, Facts]:
    """For each figure its examples, its controls, and how its intervals were made."""
    n = ", ".join(
        f"{short_name(model, list(study.models))} {about['n_examples']:,}" for model, about in study.models.items()
    )
    of_pairs = ", ".join(
        f"{short_name(model, list(study.models))} {rows['n'].iloc[0]:,} pairs"
        for model, rows in pair_summary(study).groupby("model", sort=False)
    )
    kinds = [c for c in study.controls.values() if c is not None]
    names = [name for kind, name in CONTROL_NAMES.items() if any(kind in c.controls for c in kinds)]
    controls = {
        "phases": "; ".join(["the same mean over tokens of different examples (dotted)", *names]),
        "lens": "state 0; the same words against another image's captions; words on the prompt's text tokens",
        "contextualization": "the same mean over tokens of different examples (dotted)",
        "norm_attention": "raw attention weights; uniform attention",
        "pairs": "the other caption of the pair, which holds the same words; for the scores, guessing",
        "answers": "raw attention weights; function words beside object words and colors",
    }
    return {
        name: [
            ("n", of_pairs if name == "pairs" else n),
            ("controls", control),
            (
                "intervals",
                f"{100 * CONFIDENCE:.0f} % bootstrap of the mean, {N_RESAMPLES:,} resamples of the "
                f"{'pairs' if name == 'pairs' else 'examples'}",
            ),
            ("seed", str(study.settings["seed"])),
        ]
        for name, control in controls.items()
    }


def _joined(study: StudyRecord, clause) -> str:
    """A clause for each model, behind its name where there are several, in one sentence."""
    models = list(study.models)
    parts = {model: part for model in models if (part := clause(model))}
    if len(models) == 1:
        sentence = "; ".join(parts.values())
        return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""
    return "; ".join(f"{short_name(model, models)}: {part}" for model, part in parts.items()) + "." * bool(parts)


def _phases(study: StudyRecord, model: str) -> str:
    phases, controls = study.phases[model], study.controls.get(model)
    if phases is None:
        return "the model has too few layers for a curve to turn"
    if not phases.shows_pattern:
        return f"the curve does not show the paper's four phases: it is {_course(phases)}"
    if controls is None or controls.n_examples < 2:
        return "the curve shows the paper's four phases in order; no controls were read"
    beyond = "each beyond its controls" if controls.shows_pattern else "but not each beyond its controls"
    return f"the curve shows the paper's four phases in order, {beyond}"


def _course(phases: Phases) -> str:
    """How the curve goes: "flat", or its directions, one after the other."""
    course = phases_in_words(phases)
    return course if course == "flat" else f"a {', then a '.join(phases.directions)}"


def _words(row: pd.Series) -> str:
    if pd.isna(row["precision"]):
        return "no visual token decodes to a word"
    return (
        f"at state {row['best_state']} of {row['layers']}, {_mean(row, 'precision')} of the words that visual tokens "
        f"decode to are in the image's own captions, and {_mean(row, 'precision_other')} in another image's"
    )


def _cosines(row: pd.Series) -> str:
    return (
        f"image and text are least alike at state {row['lowest_state']} (mean cosine {_mean(row, 'lowest')}) and most at state "
        f"{row['highest_state']} ({_mean(row, 'highest')})"
    )


def _shares(curves: pd.DataFrame) -> str:
    norm, weight = (
        curves[curves["measure"] == f"{measure}_share_last_text"].set_index("layer") for measure in ("norm", "weight")
    )
    norm = norm[norm["mean"].notna()]
    if norm.empty:
        return ""
    layer = norm["mean"].idxmax()
    return (
        f"the last text token reads most from the image at layer {layer}: {_of(norm.loc[layer])} of its norms, and "
        f"{_of(weight.loc[layer])} of its raw weights"
    )


def _scores(rows: pd.DataFrame) -> str:
    return ", ".join(
        f"{row.percent:.1f} %{percent_interval(row.low, row.high)} of the pairs are right by the {row.score} score "
        f"(chance {row.chance:.1f} %)"
        for row in rows.itertuples()
    )


def _mean(row: pd.Series, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2f}" + ("" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]")


def _of(row: pd.Series) -> str:
    return f"{row['mean']:.2f}" + ("" if pd.isna(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]")
