"""A study in one row a model: what the terminal prints, and the report begins with."""

import pandas as pd

from mechvlm.study.record import StudyRecord


def summary(study: StudyRecord) -> pd.DataFrame:
    """One row a model.

    Columns: `model`; `layers`; `n`, examples read; `skipped`; `best_layer`, where the mean precision of the words on
    visual tokens is highest; `precision`, `precision_0`, `precision_other` there, at layer 0, and there against another
    image's captions; `recall`, `recall_0`, `recall_other`, all three the same at the layer of the best recall, which is
    `recall_layer`; `lowest`, `lowest_layer`, `highest`, `highest_layer` of the mean inter-modal cosine; `phases`, what
    the curve does; `shows_pattern`; `seconds`. NaN where there is nothing to take a mean of.

    Each of these means (not those of layer 0) has its 95 % bootstrap interval over examples, `precision_low` to
    `precision_high` and so on, as `Study.curves` has it. It is that of the layer named, and does not know that the layer was
    picked on the same examples.
    """
    curves = study.curves()
    return pd.DataFrame([_row(study, model, curves[curves["model"] == model]) for model in study.models])


def _row(study: StudyRecord, model: str, curves: pd.DataFrame) -> dict:
    about, found = study.models[model], study.phases[model]
    inter = _by_layer(curves, "cosine_inter")
    return {
        "model": model,
        "layers": about["n_layers"],
        "n": about["n_examples"],
        "skipped": int((study.skipped["model"] == model).sum()),
        **_best(curves, "precision", "best_layer"),
        **_best(curves, "recall", "recall_layer"),
        **_ends("lowest", inter, int(inter["mean"].idxmin())),
        "lowest_layer": int(inter["mean"].idxmin()),
        **_ends("highest", inter, int(inter["mean"].idxmax())),
        "highest_layer": int(inter["mean"].idxmax()),
        "phases": course(found),
        "shows_pattern": found is not None and found.shows_pattern,
        "seconds": about["seconds"],
    }


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


def _best(curves: pd.DataFrame, measure: str, name: str) -> dict:
    own, other = _by_layer(curves, measure), _by_layer(curves, f"{measure}_other")
    nothing = float("nan")
    at = None if own["mean"].isna().all() else int(own["mean"].idxmax())
    return {
        name: at,
        **_ends(measure, own, at),
        f"{measure}_0": nothing if at is None else float(own["mean"][0]),
        **_ends(f"{measure}_other", other, at),
    }


def _by_layer(curves: pd.DataFrame, measure: str) -> pd.DataFrame:
    return curves[curves["measure"] == measure].set_index("layer").sort_index()


def _ends(name: str, curve: pd.DataFrame, layer: int | None) -> dict[str, float]:
    """A mean and the ends of its interval; NaN where the curve has no such layer."""
    values = curve.loc[layer, ["mean", "low", "high"]] if layer in curve.index else [float("nan")] * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(float, values), strict=True))
