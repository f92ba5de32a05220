"""From shards to a study's tables, one shard at a time: memory holds no more of a large study than of a small one.

Shards are taken in the order of their examples, so it does not matter when they were made, or where.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from mechvlm.probes.contextualization import MODALITY_PAIRS, anisotropy_baseline
from mechvlm.study.running.atomic import read_about, read_table
from mechvlm.study.running.rows import SCHEMAS
from mechvlm.study.running.shards import GALLERY, PAIR_SCHEMAS, Plan


def write_tables(plan: Plan, data: Path) -> None:
    """Write every table but "phases" into the folder `data`, as Parquet; those of pairs only where there are pairs."""
    numbers = dict.fromkeys(("contextualization", "lens", "attention_share"), range(len(plan)))
    if plan.pairs:
        numbers |= dict.fromkeys(PAIR_SCHEMAS, plan.pair_numbers)
    schemas = SCHEMAS | PAIR_SCHEMAS
    for name in numbers:
        with (data / f"{name}.parquet").open("wb") as file, pq.ParquetWriter(file, schemas[name]) as writer:
            for model in range(len(plan.names)):
                for number in numbers[name]:
                    writer.write_table(read_table(plan.at(model, number), name))
    models = range(len(plan.names))
    small = {
        "baseline": [_baseline(plan, model) for model in models],
        "norm_attention": [_norms(plan, model) for model in models],
        "answers": [read_table(plan.gallery(model), "answers").to_pandas() for model in models],
        "words": [_words(plan, model) for model in models],
    }
    for name, parts in small.items():
        pd.concat(parts, ignore_index=True).to_parquet(data / f"{name}.parquet", index=False)


def skipped(plan: Plan) -> pd.DataFrame:
    """What was set aside, before any model saw it and then model by model: model, example, reason."""
    before = pd.DataFrame(
        [("", one.id, one.reason) for one in plan.data.set_aside], columns=["model", "example", "reason"], dtype="str"
    )
    shards = [plan.at(model, number) for model in range(len(plan.names)) for number in range(len(plan))]
    return pd.concat([before, *(read_table(shard, "skipped").to_pandas() for shard in shards)], ignore_index=True)


def shown(plan: Plan, model: int) -> list[str]:
    """The ids of the first examples that the model could read: the gallery's."""
    return [id for shard in _first_shards(plan, model) for id in read_about(shard)["first"]][:GALLERY]


def n_read(plan: Plan, model: int) -> int:
    """Examples that the model could read."""
    return sum(read_about(plan.at(model, number))["read"] for number in range(len(plan)))


def _first_shards(plan: Plan, model: int) -> list[Path]:
    """As many of the first shards as hold the gallery's examples: nearly always one."""
    shards, found = [], 0
    for number in range(len(plan)):
        if found >= GALLERY:
            break
        shards.append(plan.at(model, number))
        found += len(read_about(shards[-1])["first"])
    return shards


def _words(plan: Plan, model: int) -> pd.DataFrame:
    words = pd.concat(
        [read_table(shard, "words").to_pandas() for shard in _first_shards(plan, model)], ignore_index=True
    )
    return words[words["example"].isin(shown(plan, model))]


def _baseline(plan: Plan, model: int) -> pd.DataFrame:
    """The anisotropy baseline of all examples together: model, pair, layer, value."""
    n = 0
    sums = {name: torch.zeros(()).double() for name in ("sum_image", "sum_text", "same")}
    for number in range(len(plan)):
        table = read_table(plan.at(model, number), "context_sums").to_pydict()
        if not table["n"]:
            continue
        n += table["n"][0]
        for name in sums:
            # In float64: a hundred thousand examples are added.
            sums[name] = sums[name] + torch.tensor(table[name], dtype=torch.float64)
    value = anisotropy_baseline(sums["sum_image"], sums["sum_text"], sums["same"].T, n).float().numpy()
    n_layers = value.shape[1]
    pairs, layers = np.repeat(MODALITY_PAIRS, n_layers), np.tile(np.arange(n_layers), len(MODALITY_PAIRS))
    return pd.DataFrame({"model": plan.names[model], "pair": pairs, "layer": layers, "value": value.reshape(-1)})


def _norms(plan: Plan, model: int) -> pd.DataFrame:
    """Mean norm-based attention up to each destination: the table that `mechvlm.study.save` describes.

    Of the examples with the most frequent layout of tokens, where a processor makes more visual tokens of one image than of
    another; `n` says how many that is.
    """
    counts: dict[tuple, int] = {}
    for number in range(len(plan)):
        table = read_table(plan.at(model, number), "norm_sums").select(["ids", "n"]).to_pydict()
        for ids, n in zip(table["ids"], table["n"], strict=True):
            counts[tuple(ids)] = counts.get(tuple(ids), 0) + n
    layout = max(counts, key=lambda ids: counts[ids])
    best: dict = {}
    for number in range(len(plan)):
        for row in read_table(plan.at(model, number), "norm_sums").to_pylist():
            if tuple(row["ids"]) != layout:
                continue
            sums = {key: np.array(row[key]) for key in ("norm", "weight")}
            best = {**row, **{key: best.get(key, 0) + value for key, value in sums.items()}}
    n_src, n = len(layout), counts[layout]
    shape = len(best["layers"]), len(best["dest"]), n_src
    norm, weight = (best[key].reshape(shape) / n for key in ("norm", "weight"))
    frames = []
    for column, (name, dest) in enumerate(zip(best["names"], best["dest"], strict=True)):
        for row, layer in enumerate(best["layers"]):
            frame = pd.DataFrame(
                {
                    "model": plan.names[model], "dest": name, "dest_position": dest, "layer": layer, "src": range(n_src),
                    "piece": best["pieces"], "modality": best["modality"], "norm": norm[row, column],
                    "weight": weight[row, column], "n": n,
                }
            )  # fmt: skip
            frames.append(frame[frame["src"] <= dest])
    return pd.concat(frames, ignore_index=True)
