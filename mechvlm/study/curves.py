"""Tidy frames from a study's tables: every value in a row of its own, and curves over layers.

A curve is the mean of one measure over examples, by layer, with its spread and its interval.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.api.types import union_categoricals

from mechvlm.errors import InputError
from mechvlm.intervals import mean_interval
from mechvlm.measures.control_excess import ControlExcess
from mechvlm.measures.phase_fit import fit_phases
from mechvlm.measures.phases import Phases
from mechvlm.probes.contextualization import MODALITY_PAIRS

CONFIDENCE = 0.95
"""Of the bootstrap intervals of all curves."""


def tidy(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Every measure of every example: model, example, layer, measure, value.

    Measures:
        `cosine_inter`, `cosine_image`, `cosine_text`: mean cosine, -1 to 1.
        `precision`, `recall`: of the words on image tokens against the example's own captions;
            shares, 0 to 1, NaN for 0/0.
        `precision_other`, `recall_other`: a control, against another image's captions.
        `precision_text`, `recall_text`: a control, of the words on text tokens.
        `word_share`, `word_share_text`: the share of the image tokens, and of the text tokens, that
            decode to a word, of which alone precision is. Studies of earlier versions lack it.
        `norm_share_last_text`, `norm_share_last_image`: the image tokens' share (0 to 1) of the
            norms written to that destination.
        `weight_share_last_text`, `weight_share_last_image`: their share of the raw weights.

    `layer` is the layer of the shares, and the state of all else: state l is what layer l reads.
    A measure of words is named after its tokens, unless they are image tokens, and after its
    captions, unless they are the example's own.
    """
    cosine, lens, share = (tables[name] for name in ("contextualization", "lens", "attention_share"))
    measures = [
        _measure_names(cosine, ["pair"], lambda pair: f"cosine_{pair}"),
        _measure_names(
            lens, ["measure", "tokens", "captions"],
            lambda measure, tokens, captions: measure + _ending(tokens, "image") + _ending(captions, "own"),
        ),
        _measure_names(share, ["measure", "dest"], lambda measure, dest: f"{measure}_share_{dest}"),
    ]  # fmt: skip
    parts = (cosine, lens, share)
    return pd.DataFrame(
        {
            **{key: _concatenate(part[key].astype("category") for part in parts) for key in ("model", "example")},
            "layer": np.concatenate([cosine["state"], lens["state"], share["layer"]]),
            "measure": _concatenate(measures),
            "value": np.concatenate([part["value"] for part in parts]),
        }
    )


def curves(tables: dict[str, pd.DataFrame], models: dict[str, dict[str, Any]], seed: int) -> pd.DataFrame:
    """The curve of each measure over layers: model, measure, layer, n, mean, sd, low, high.

    `n` is the number of examples with a value. `sd` is their standard deviation,
    √(Σ (x - mean)² / n), as in the bands of the paper. `low` and `high` are the ends of the
    percentile bootstrap interval (`CONFIDENCE`) of the mean over examples, with the study's seed
    (`mechvlm.intervals.mean_interval`); NaN for fewer than two examples. The anisotropy baselines
    (`cosine_inter_baseline`, ...) are computed from all examples together, and have neither spread
    nor interval.
    """
    frame, parts = tidy(tables), []
    for model, about in models.items():
        wide = _wide(frame[frame["model"] == model])
        values = wide.to_numpy(dtype="float64", copy=True)  # [example, measure and layer]
        has_value = ~np.isnan(values)
        n = has_value.sum(0)
        interval = mean_interval(torch.from_numpy(values), CONFIDENCE, seed=seed)
        with np.errstate(invalid="ignore"):
            sd = np.sqrt(np.where(has_value, (values - interval.mean.numpy()) ** 2, 0).sum(0) / n)
        part = wide.columns.to_frame(index=False).assign(
            n=n, mean=interval.mean.numpy(), sd=sd, low=interval.low.numpy(), high=interval.high.numpy()
        )
        part.insert(0, "model", model)
        baseline = tables["baseline"]
        baseline = baseline[baseline["model"] == model].rename(columns={"value": "mean", "state": "layer"})
        baseline = baseline.assign(measure="cosine_" + baseline["pair"] + "_baseline", n=about["n_examples"])
        parts += [part, baseline.drop(columns="pair")]
    return pd.concat(parts, ignore_index=True)[["model", "measure", "layer", "n", "mean", "sd", "low", "high"]]


def phases_of(contextualization: pd.DataFrame, model: str, seed: int) -> Phases | None:
    """The phases of one model's curves; None for fewer than 3 states, too few for a curve."""
    rows = contextualization[contextualization["model"] == model]
    inter, image, text = (
        _by_example(rows[rows["pair"] == pair], "state").to_numpy(dtype="float64") for pair in MODALITY_PAIRS
    )
    return fit_phases(inter, image=image, text=text, seed=seed) if inter.shape[1] >= 3 else None


def controls_of(tables: dict[str, pd.DataFrame], model: str, phases: Phases | None) -> ControlExcess | None:
    """One model's phases, held to its controls; None for a study or a model without.

    Raises:
        ValueError: for controls of other examples or states than the curves'.
    """
    rows = tables.get("controls", pd.DataFrame(columns=["model"]))
    rows = rows[rows["model"] == model]
    if rows.empty or phases is None:
        return None
    curves = tables["contextualization"]
    curves = curves[(curves["model"] == model) & (curves["pair"] == "inter")]
    curves = curves[curves["example"].isin(rows["example"])].astype({"example": str})
    inter = _by_example(curves, "state")
    controls = {kind: _by_example(part, "state") for kind, part in rows.groupby("control", sort=False)}
    for kind, values in controls.items():
        if not (values.index.equals(inter.index) and values.columns.equals(inter.columns)):
            raise ValueError(f"the control {kind!r} is of other examples or states than the curves")

    def as_tensor(values: pd.DataFrame) -> torch.Tensor:
        return torch.from_numpy(values.to_numpy(dtype="float64", copy=True)).T  # [state example]

    return ControlExcess(phases, as_tensor(inter), {kind: as_tensor(values) for kind, values in controls.items()})


def check_measures(measures: list[str], frame: pd.DataFrame) -> None:
    """Raise InputError for an empty list, or a measure that `frame` does not hold."""
    known = list(frame["measure"].unique())
    if not measures:
        raise InputError(f"Name at least one measure. There are: {', '.join(known)}.")
    unknown = [measure for measure in measures if measure not in known]
    if unknown:
        raise InputError(f"There is no measure {', '.join(map(repr, unknown))} here. There are: {', '.join(known)}.")


def _concatenate(parts: Iterable[pd.Series | pd.Categorical]) -> pd.Categorical:
    return union_categoricals(list(parts), sort_categories=True)


def _measure_names(table: pd.DataFrame, columns: list[str], name: Callable[..., str]) -> pd.Categorical:
    """The measure of each row: `name` of the row's `columns`.

    `name` is called once for each combination of the columns, of which there are few.
    """
    groups = table.groupby(columns, observed=True, sort=False)
    names = [name(*keys) for keys in table[columns].drop_duplicates().itertuples(index=False)]
    return pd.Categorical.from_codes(groups.ngroup(), names)


def _ending(word: str, usual: str) -> str:
    return "" if word == usual else f"_{word}"


def _wide(frame: pd.DataFrame) -> pd.DataFrame:
    """One model's values: rows are examples, columns are (measure, layer)."""
    # Pivoting measure by measure takes less memory than pivoting all at once.
    parts = {measure: _by_example(rows) for measure, rows in frame.groupby("measure", observed=True)}
    return pd.concat(parts, axis=1, names=["measure", "layer"]).sort_index().sort_index(axis=1)


def _by_example(rows: pd.DataFrame, number: str = "layer") -> pd.DataFrame:
    """Values [example, layer or state], sorted by the examples' ids; `number` is their column."""
    return rows.pivot(index="example", columns=number, values="value")
