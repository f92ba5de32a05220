"""A study in one row a model: what the terminal prints, and the report begins with."""

import pandas as pd

from mechvlm.study.study import Study


def summary(study: Study) -> pd.DataFrame:
    """One row a model.

    Columns: `model`; `layers`; `n`, examples read; `skipped`; `best_layer`, where the mean precision of the words on
    visual tokens is highest; `precision`, `precision_0`, `precision_other` there, at layer 0, and there against another
    image's captions; `recall`, `recall_0`, `recall_other`, all three the same at the layer of the best recall, which is
    `recall_layer`; `lowest`, `lowest_layer`, `highest`, `highest_layer` of the mean inter-modal cosine; `phases`, what
    the curve does; `shows_pattern`; `seconds`. NaN where there is nothing to take a mean of.
    """
    return pd.DataFrame([_row(study, model) for model in study.models])


def _row(study: Study, model: str) -> dict:
    about, found = study.models[model], study.phases[model]
    inter = (
        study.tables["contextualization"].query("model == @model and pair == 'inter'").groupby("layer")["value"].mean()
    )
    row = {
        "model": model,
        "layers": about["n_layers"],
        "n": about["n_examples"],
        "skipped": int((study.skipped["model"] == model).sum()),
        **_best(study.tables["lens"], model, "precision", "best_layer"),
        **_best(study.tables["lens"], model, "recall", "recall_layer"),
        "lowest": float(inter.min()),
        "lowest_layer": int(inter.idxmin()),
        "highest": float(inter.max()),
        "highest_layer": int(inter.idxmax()),
        "phases": course(found),
        "shows_pattern": found is not None and found.shows_pattern,
        "seconds": about["seconds"],
    }
    return row


def course(found) -> str:
    """What a curve does, in a word or four: "I-IV", "II-IV (no I)", or its directions where no phase can be named."""
    if found is None:
        return "too few layers"
    if not found.n_segments:
        return "flat"
    numerals = [label.split()[0] for label in found.labels if label]
    if len(numerals) == found.n_segments:
        return f"{numerals[0]}-{numerals[-1]}" + ("" if found.shows_pattern else " only")
    return ", ".join(found.directions)


def _best(scores: pd.DataFrame, model: str, measure: str, name: str) -> dict:
    mine = scores.query("model == @model and measure == @measure and tokens == 'image'")
    own, other = (mine[mine["captions"] == c].groupby("layer")["value"].mean() for c in ("own", "other"))
    nothing = float("nan")
    if own.isna().all():
        return {name: None, measure: nothing, f"{measure}_0": nothing, f"{measure}_other": nothing}
    best = int(own.idxmax())
    return {
        name: best,
        measure: float(own[best]),
        f"{measure}_0": float(own[0]),
        f"{measure}_other": float(other.get(best, nothing)),
    }
