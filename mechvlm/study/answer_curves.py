"""Curves of a study's answers: by token of the answer, and by the group of its words.

Every value is first the mean over an example's own tokens and layers, and then over examples.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch

from mechvlm.intervals import mean_interval

_CURVE_COLUMNS = ["model", "measure", "group", "at", "n", "mean", "sd", "low", "high"]


def answer_curves(tables: dict[str, pd.DataFrame], seed: int) -> pd.DataFrame:
    """The curve of each measure: model, measure, group, at, n, mean, sd, low, high.

    `n` examples have a value; `sd` is their standard deviation, `low` and `high` the ends of the
    mean's 95 % bootstrap interval over them. `at` is the number of the token, layer or state.

    Measures:
        `norm_share_by_token`, `weight_share_by_token`: the image's share while each token of the
            answer was written, mean over layers; `at` is the token.
        `decided_by_token`: the first state from which on the lens has the written token as the
            likeliest, up to the last state; `at` is the token. None where it is not the likeliest
            at the end.
        `norm_share_by_layer`, `weight_share_by_layer`: the same shares by layer, mean over the
            tokens of a group.
        `probability_by_state`: of the written token, by the lens, mean over the tokens of a group.
        `norm_share`, `weight_share`: mean over the layers and the tokens of a group; `at` is 0.

    `group` is that of the token's word; "" for measures by token, which take all tokens.

    Raises:
        KeyError: for tables of a study without answers.
    """
    groups = tables["answer_tokens"][["model", "example", "token", "group"]]
    shares, lens = tables["answer_attention"], tables["answer_lens"]
    keys = ["model", "example", "token"]
    by_token = shares.groupby(keys, observed=True)[["norm", "weight"]].mean().reset_index()
    grouped_shares, grouped_lens = (part.merge(groups.dropna(subset="group"), on=keys) for part in (shares, lens))
    parts = []
    for share in ("norm", "weight"):
        parts.append(_curve(by_token, f"{share}_share_by_token", "token", share))
        parts.append(_curve(grouped_shares, f"{share}_share_by_layer", "layer", share))
        parts.append(_curve(grouped_shares.assign(all=0), f"{share}_share", "all", share))
    parts.append(_curve(decided(lens), "decided_by_token", "token", "decided"))
    parts.append(_curve(grouped_lens, "probability_by_state", "state", "probability"))
    return pd.concat([_with_intervals(part, seed) for part in parts], ignore_index=True)[_CURVE_COLUMNS]


def decided(lens: pd.DataFrame) -> pd.DataFrame:
    """The state at which each token was decided: model, example, token, decided.

    It is the first from which on, up to the last state, the token has rank 1; NaN where it has not
    at the last.
    """
    keys, last = ["model", "example", "token"], lens.groupby("model", observed=True)["state"].transform("max")
    later = lens[lens["rank"] > 1].groupby(keys, observed=True)["state"].max()
    tokens = lens.assign(last=last).groupby(keys, observed=True)["last"].first()
    first = later.reindex(tokens.index).fillna(-1) + 1
    return first.where(first <= tokens).rename("decided").reset_index()


def _curve(values: pd.DataFrame, measure: str, axis: str, column: str) -> pd.DataFrame:
    """Means of each example: model, measure, group, at, example, value."""
    values = values if "group" in values else values.assign(group="")
    means = values.groupby(["model", "group", axis, "example"], observed=True)[column].mean().reset_index()
    return means.rename(columns={axis: "at", column: "value"}).assign(measure=measure)


def _with_intervals(means: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Means over examples, with spread and interval, for each model and group by itself."""
    rows: list[dict[str, Any]] = []
    for (model, group, measure), part in means.groupby(["model", "group", "measure"], observed=True, sort=False):
        wide = part.pivot(index="example", columns="at", values="value")
        values = wide.to_numpy(dtype="float64", copy=True)  # [example, at]
        interval = mean_interval(torch.from_numpy(values), seed=seed)
        n = (~np.isnan(values)).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            sd = np.sqrt(np.nansum((values - interval.mean.numpy()) ** 2, 0) / n)
        columns = zip(wide.columns, n, sd, *(x.numpy() for x in interval), strict=True)
        for at, count, spread, mean, low, high in columns:
            row = {"model": model, "measure": measure, "group": group, "at": int(at), "n": int(count)}
            rows.append(row | {"mean": mean, "sd": spread, "low": low, "high": high})
    return pd.DataFrame(rows, columns=_CURVE_COLUMNS)
