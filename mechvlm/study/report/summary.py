"""A study's findings in one row per model, for the terminal and the top of the report."""

import pandas as pd

from mechvlm.measures.phases import Phases
from mechvlm.study.record import StudyRecord


def summary(study: StudyRecord) -> pd.DataFrame:
    """One row per model.

    Columns:
        `model`: its name.
        `layers`: the number of layers.
        `n`: the number of examples read.
        `skipped`: the number of examples that this model set aside.
        `best_state`: the state with the highest mean precision of the words on visual tokens.
        `precision`, `precision_other`: the mean there, and there against another image's captions.
        `precision_0`: the mean precision at state 0, the embeddings.
        `word_share`, `word_share_0`: the mean share of the image tokens that decode to a word, of
            which alone precision is, at `best_state` and at state 0; NaN for studies of earlier
            versions, which did not keep it.
        `recall_state`, `recall`, `recall_other`, `recall_0`: the same for recall, at the state with
            the highest mean recall.
        `lowest`, `lowest_state`, `highest`, `highest_state`: the extremes of the mean inter-modal
            cosine, and their states.
        `phases`: the course of the curve, as in `phases_in_words`.
        `shows_pattern`: whether the curve shows the paper's four phases, and each exceeds its
            controls where these were read.
        `controls`: what of the phases exceeds the controls, as `ControlExcess.in_short` says it.
        `seconds`: the time that the model took.

    A mean over no example is NaN. Each mean except those of state 0 has its 95 % bootstrap interval
    over examples in `precision_low`, `precision_high` and so on, as in `Study.curves`. The interval
    is that of the named state; it does not account for the state's choice on the same examples.
    """
    curves = study.curves()
    return pd.DataFrame([_row(study, model, curves[curves["model"] == model]) for model in study.models])


def _row(study: StudyRecord, model: str, curves: pd.DataFrame) -> dict:
    about, phases, controls = study.models[model], study.phases[model], study.controls.get(model)
    inter, share = _by_state(curves, "cosine_inter"), _by_state(curves, "word_share")
    precision = _best(curves, "precision", "best_state")
    lowest, highest = int(inter["mean"].idxmin()), int(inter["mean"].idxmax())
    return {
        "model": model,
        "layers": about["n_layers"],
        "n": about["n_examples"],
        "skipped": int((study.skipped["model"] == model).sum()),
        **precision,
        **_mean_and_interval("word_share", share, precision["best_state"]),
        "word_share_0": float(share["mean"].get(0, float("nan"))),
        **_best(curves, "recall", "recall_state"),
        **_mean_and_interval("lowest", inter, lowest),
        "lowest_state": lowest,
        **_mean_and_interval("highest", inter, highest),
        "highest_state": highest,
        "phases": phases_in_words(phases),
        "shows_pattern": phases is not None and (phases if controls is None else controls).shows_pattern,
        "controls": "not read" if controls is None else controls.in_short,
        "seconds": about["seconds"],
    }


def phases_in_words(phases: Phases | None) -> str:
    """The course of a curve: its phases ("I-IV", "II-IV only"), or its directions ("rise, fall").

    Directions where not every segment can be named.
    """
    if phases is None:
        return "too few layers"
    if not phases.n_segments:
        return "flat"
    numerals = [label.split()[0] for label in phases.labels if label]
    if len(numerals) == phases.n_segments:
        return f"{numerals[0]}-{numerals[-1]}" + ("" if phases.shows_pattern else " only")
    return ", ".join(phases.directions)


def _best(curves: pd.DataFrame, measure: str, state_column: str) -> dict:
    """The columns of "precision" or "recall"; the best state goes into `state_column`."""
    own, other = _by_state(curves, measure), _by_state(curves, f"{measure}_other")
    best = None if own["mean"].isna().all() else int(own["mean"].idxmax())
    return {
        state_column: best,
        **_mean_and_interval(measure, own, best),
        f"{measure}_0": float("nan") if best is None else float(own["mean"][0]),
        **_mean_and_interval(f"{measure}_other", other, best),
    }


def _by_state(curves: pd.DataFrame, measure: str) -> pd.DataFrame:
    return curves[curves["measure"] == measure].set_index("layer").sort_index()


def _mean_and_interval(name: str, curve: pd.DataFrame, state: int | None) -> dict[str, float]:
    """The mean at a state and the ends of its interval; NaN when the curve has no such state."""
    values = curve.loc[state, ["mean", "low", "high"]] if state in curve.index else [float("nan")] * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(float, values), strict=True))
