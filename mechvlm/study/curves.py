"""From a study's tables to tidy frames: one value a row, and of each curve the mean, the spread and the interval."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.api.types import union_categoricals

from mechvlm.errors import InputError
from mechvlm.intervals import mean_interval
from mechvlm.measures.phase_fit import fit_phases
from mechvlm.measures.phases import Phases
from mechvlm.probes.contextualization import MODALITY_PAIRS

CONFIDENCE = 0.95


def tidy(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Every measure of every example: model, example, layer, measure, value.

    Measures: `cosine_inter`, `cosine_image`, `cosine_text` (mean cosine, -1 to 1); `precision`, `recall` (share, 0 to 1) of
    the words on image tokens against the example's own captions, with their controls `precision_other`, `recall_other`
    (another image's captions) and `precision_text`, `recall_text` (words on text tokens). NaN is 0/0. In general a name
    ends in what departs from image tokens and own captions. `norm_share_last_text`, `norm_share_last_image`: the image
    tokens' share of the norms written to that destination (0 to 1), and `weight_share_...` of the raw weights.
    """
    cosine, lens, share = (tables[name] for name in ("contextualization", "lens", "attention_share"))
    measures = [
        _names(cosine, ["pair"], lambda pair: f"cosine_{pair}"),
        _names(
            lens, ["measure", "tokens", "captions"],
            lambda measure, tokens, captions: measure + _ending(tokens, "image") + _ending(captions, "own"),
        ),
        _names(share, ["measure", "dest"], lambda measure, dest: f"{measure}_share_{dest}"),
    ]  # fmt: skip
    parts = (cosine, lens, share)
    return pd.DataFrame(
        {
            **{key: _union(part[key].astype("category") for part in parts) for key in ("model", "example")},
            "layer": np.concatenate([part["layer"] for part in parts]),
            "measure": _union(measures),
            "value": np.concatenate([part["value"] for part in parts]),
        }
    )


def curves(tables: dict[str, pd.DataFrame], models: dict[str, dict[str, Any]], seed: int) -> pd.DataFrame:
    """Each measure's curve over layers: model, measure, layer, n, mean, sd, low, high.

    `n` examples have a value; `sd` is their standard deviation (Σ (x - mean)² / n), as the bands of the paper; low and high
    end the `CONFIDENCE` percentile bootstrap interval of the mean over examples (`mechvlm.intervals.mean_interval`, with
    the study's seed), NaN for fewer than two. The anisotropy baselines, `cosine_inter_baseline` and so on, are of all
    examples together, and have neither spread nor interval.
    """
    frame, parts = tidy(tables), []
    for model, about in models.items():
        wide = _wide(frame[frame["model"] == model])
        values = wide.to_numpy(dtype="float64", copy=True)
        seen = ~np.isnan(values)
        n = seen.sum(0)
        found = mean_interval(torch.from_numpy(values), CONFIDENCE, seed=seed)
        with np.errstate(invalid="ignore"):
            sd = np.sqrt(np.where(seen, (values - found.mean.numpy()) ** 2, 0).sum(0) / n)
        part = wide.columns.to_frame(index=False).assign(
            n=n, mean=found.mean.numpy(), sd=sd, low=found.low.numpy(), high=found.high.numpy()
        )
        part.insert(0, "model", model)
        base = tables["baseline"]
        base = base[base["model"] == model].rename(columns={"value": "mean"})
        base = base.assign(measure="cosine_" + base["pair"] + "_baseline", n=about["n_examples"])
        parts += [part, base.drop(columns="pair")]
    return pd.concat(parts, ignore_index=True)[["model", "measure", "layer", "n", "mean", "sd", "low", "high"]]


def phases_of(contextualization: pd.DataFrame, model: str, seed: int) -> Phases | None:
    """The phases of one model's curves; None for fewer than 3 states, which are no curve."""
    mine = contextualization[contextualization["model"] == model]
    inter, image, text = (_by_example(mine[mine["pair"] == pair]).to_numpy(dtype="float64") for pair in MODALITY_PAIRS)
    return fit_phases(inter, image=image, text=text, seed=seed) if inter.shape[1] >= 3 else None


def check_measures(asked: list[str], frame: pd.DataFrame) -> None:
    """Raises InputError for a measure that is not there."""
    there = list(frame["measure"].unique())
    unknown = [one for one in asked if one not in there]
    if unknown or not asked:
        raise InputError(f"There is no measure {', '.join(map(repr, unknown))} here. There are: {', '.join(there)}.")


def _union(parts: Iterable[pd.Series | pd.Categorical]) -> pd.Categorical:
    return union_categoricals(list(parts), sort_categories=True)


def _names(table: pd.DataFrame, columns: list[str], name: Callable[..., str]) -> pd.Categorical:
    """The name of each row's measure: made for each combination of `columns`, of which there are few, and not for each row."""
    groups = table.groupby(columns, observed=True, sort=False)
    names = [name(*one) for one in table[columns].drop_duplicates().itertuples(index=False)]
    return pd.Categorical.from_codes(groups.ngroup(), names)


def _ending(word: str, usual: str) -> str:
    return "" if word == usual else f"_{word}"


def _wide(frame: pd.DataFrame) -> pd.DataFrame:
    """One model's values: a row an example, a column a measure and layer. Measure by measure, which takes less memory."""
    parts = {measure: _by_example(rows) for measure, rows in frame.groupby("measure", observed=True)}
    return pd.concat(parts, axis=1, names=["measure", "layer"]).sort_index().sort_index(axis=1)


def _by_example(rows: pd.DataFrame) -> pd.DataFrame:
    """Example by layer, sorted by the example's id."""
    return rows.pivot(index="example", columns="layer", values="value")
