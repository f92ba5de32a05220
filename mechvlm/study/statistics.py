"""From a study's tables to tidy frames: one value a row, and of each curve the mean, the spread and the interval."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from mechvlm.errors import InputError
from mechvlm.intervals import mean_interval
from mechvlm.phases import Phases, fit_phases

if TYPE_CHECKING:
    from mechvlm.study.study import Study

LEVEL = 0.95
PAIRS = {"inter": "image and text tokens", "image": "image tokens", "text": "text tokens"}


def tidy(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Every measure of every example: model, example, layer, measure, value.

    Measures: `cosine_inter`, `cosine_image`, `cosine_text` (mean cosine, -1 to 1); `precision`, `recall` (share, 0 to 1) of
    the words on image tokens against the example's own captions, with their controls `precision_other`, `recall_other`
    (another image's captions) and `precision_text`, `recall_text` (words on text tokens). NaN is 0/0. In general a name
    ends in what departs from image tokens and own captions. `norm_share_last_text`, `norm_share_last_image`: the image
    tokens' share of the norms written to that destination (0 to 1), and `weight_share_...` of the raw weights.
    """
    cosine, lens, share = (tables[name] for name in ("contextualization", "lens", "attention_share"))
    named = [
        cosine.assign(measure="cosine_" + cosine["pair"]),
        lens.assign(measure=lens["measure"] + _ending(lens["tokens"], "image") + _ending(lens["captions"], "own")),
        share.assign(measure=share["measure"] + "_share_" + share["dest"]),
    ]
    columns = ["model", "example", "layer", "measure", "value"]
    return pd.concat([one[columns] for one in named], ignore_index=True)


def curves(study: "Study") -> pd.DataFrame:
    """Each measure's curve over layers: model, measure, layer, n, mean, sd, low, high.

    `n` examples have a value; `sd` is their standard deviation (Σ (x - mean)² / n), as the bands of the paper; low and high
    end the `LEVEL` percentile bootstrap interval of the mean over examples (`mechvlm.intervals.mean_interval`, with
    the study's seed), NaN for fewer than two. The anisotropy baselines, `cosine_inter_baseline` and so on, are of all
    examples together, and have neither spread nor interval.
    """
    seed, frame, parts = study.settings["seed"], study.frame(), []
    for model in study.models:
        mine = frame[frame["model"] == model]
        wide = mine.pivot(index="example", columns=["measure", "layer"], values="value").sort_index(axis=1)
        values = wide.to_numpy(dtype="float64", copy=True)
        seen = ~np.isnan(values)
        n = seen.sum(0)
        found = mean_interval(torch.from_numpy(values), LEVEL, seed=seed)
        with np.errstate(invalid="ignore"):
            sd = np.sqrt(np.where(seen, (values - found.mean.numpy()) ** 2, 0).sum(0) / n)
        part = wide.columns.to_frame(index=False).assign(
            n=n, mean=found.mean.numpy(), sd=sd, low=found.low.numpy(), high=found.high.numpy()
        )
        part.insert(0, "model", model)
        base = study.tables["baseline"]
        base = base[base["model"] == model].rename(columns={"value": "mean"})
        base = base.assign(measure="cosine_" + base["pair"] + "_baseline", n=study.models[model]["n_examples"])
        parts += [part, base.drop(columns="pair")]
    return pd.concat(parts, ignore_index=True)[["model", "measure", "layer", "n", "mean", "sd", "low", "high"]]


def phases_of(contextualization: pd.DataFrame, model: str, seed: int) -> Phases | None:
    """The phases of one model's curves; None for fewer than 3 states, which are no curve."""
    mine = contextualization[contextualization["model"] == model]
    inter, image, text = (
        mine[mine["pair"] == pair].pivot(index="example", columns="layer", values="value").to_numpy(dtype="float64")
        for pair in PAIRS
    )
    return fit_phases(inter, image=image, text=text, seed=seed) if inter.shape[1] >= 3 else None


def check_measures(asked: list[str], frame: pd.DataFrame) -> None:
    """Raises InputError for a measure that is not there."""
    there = list(frame["measure"].unique())
    unknown = [one for one in asked if one not in there]
    if unknown or not asked:
        raise InputError(f"There is no measure {', '.join(map(repr, unknown))} here. There are: {', '.join(there)}.")


def _ending(column: pd.Series, usual: str) -> pd.Series:
    return ("_" + column).where(column != usual, "")
