"""From shards to a study's tables, one shard at a time.

A large study so needs no more memory than a small one. Shards are taken in the order of their
examples: when and where they were made does not matter.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from mechvlm.probes.contextualization import MODALITY_PAIRS, anisotropy_baseline
from mechvlm.study.running.answer_rows import ANSWER_SCHEMAS
from mechvlm.study.running.atomic import read_about, read_table
from mechvlm.study.running.plan import GALLERY_EXAMPLES, Plan
from mechvlm.study.running.rows import SHARD_SCHEMAS
from mechvlm.study.running.shards import PAIR_SCHEMAS


def write_tables(plan: Plan, data: Path) -> None:
    """Write every table but "phases" into the folder `data`, as Parquet.

    The tables of pairs are written only where the plan has pairs, those of answers only where it
    reads answers.
    """
    shard_numbers = dict.fromkeys(("contextualization", "lens", "attention_share"), range(len(plan)))
    if plan.answers:
        shard_numbers |= dict.fromkeys(ANSWER_SCHEMAS, range(len(plan)))
    if plan.pairs:
        shard_numbers |= dict.fromkeys(PAIR_SCHEMAS, plan.pair_shards)
    schemas = SHARD_SCHEMAS | PAIR_SCHEMAS | ANSWER_SCHEMAS
    models = range(len(plan.names))
    for name, numbers in shard_numbers.items():
        with (data / f"{name}.parquet").open("wb") as file, pq.ParquetWriter(file, schemas[name]) as writer:
            for model in models:
                for number in numbers:
                    writer.write_table(read_table(plan.shard_folder(model, number), name))
    small = {
        "baseline": [_baseline(plan, model) for model in models],
        "norm_attention": [_norm_means(plan, model) for model in models],
        "answers": [read_table(plan.gallery_folder(model), "answers").to_pandas() for model in models],
        "words": [_words(plan, model) for model in models],
        "controls": [read_table(plan.gallery_folder(model), "controls").to_pandas() for model in models],
    }
    for name, parts in small.items():
        pd.concat(parts, ignore_index=True).to_parquet(data / f"{name}.parquet", index=False)


def skipped(plan: Plan) -> pd.DataFrame:
    """The examples that were set aside: model, example, reason.

    First those set aside before any model saw them, with "" for the model; then model by model.
    """
    before = pd.DataFrame(
        [("", aside.id, aside.reason) for aside in plan.data.set_aside],
        columns=["model", "example", "reason"],
        dtype="str",
    )
    shards = [plan.shard_folder(model, number) for model in range(len(plan.names)) for number in range(len(plan))]
    return pd.concat([before, *(read_table(shard, "skipped").to_pandas() for shard in shards)], ignore_index=True)


def first_ids(plan: Plan, model: int, n: int) -> list[str]:
    """The ids of the first n examples that the model could read."""
    return [id for shard in _first_shards(plan, model, n) for id in read_about(shard)["first"]][:n]


def n_read(plan: Plan, model: int) -> int:
    """The number of examples that the model could read."""
    return sum(read_about(plan.shard_folder(model, number))["read"] for number in range(len(plan)))


def _first_shards(plan: Plan, model: int, n: int) -> list[Path]:
    """The first shards, as many as hold n examples."""
    shards: list[Path] = []
    n_examples = 0
    for number in range(len(plan)):
        if n_examples >= n:
            break
        shards.append(plan.shard_folder(model, number))
        n_examples += len(read_about(shards[-1])["first"])
    return shards


def _words(plan: Plan, model: int) -> pd.DataFrame:
    words = pd.concat(
        [read_table(shard, "words").to_pandas() for shard in _first_shards(plan, model, GALLERY_EXAMPLES)],
        ignore_index=True,
    )
    return words[words["example"].isin(first_ids(plan, model, GALLERY_EXAMPLES))]


def _baseline(plan: Plan, model: int) -> pd.DataFrame:
    """The anisotropy baseline of all examples together: model, pair, state, value."""
    n = 0
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("sum_image", "sum_text", "same")}
    for number in range(len(plan)):
        table = read_table(plan.shard_folder(model, number), "context_sums").to_pydict()
        if not table["n"]:
            continue
        n += table["n"][0]
        for name in sums:
            # In float64, since there may be a hundred thousand examples to add.
            sums[name] = sums[name] + torch.tensor(table[name], dtype=torch.float64)
    # [pair state]
    value = anisotropy_baseline(sums["sum_image"], sums["sum_text"], sums["same"].T, n).float().numpy()
    n_states = value.shape[1]
    pairs, states = np.repeat(MODALITY_PAIRS, n_states), np.tile(np.arange(n_states), len(MODALITY_PAIRS))
    return pd.DataFrame({"model": plan.names[model], "pair": pairs, "state": states, "value": value.reshape(-1)})


def _norm_means(plan: Plan, model: int) -> pd.DataFrame:
    """Mean norm-based attention from each source up to each destination.

    `mechvlm.study.save` describes the table, "norm_attention". A processor may make more visual
    tokens of one image than of another: the mean is then over the examples with the most frequent
    layout of tokens, and `n` is their number.
    """
    counts: dict[tuple, int] = {}
    for number in range(len(plan)):
        table = read_table(plan.shard_folder(model, number), "norm_sums").select(["ids", "n"]).to_pydict()
        for ids, n in zip(table["ids"], table["n"], strict=True):
            counts[tuple(ids)] = counts.get(tuple(ids), 0) + n
    layout = max(counts, key=lambda ids: counts[ids])
    total: dict = {}
    for number in range(len(plan)):
        for row in read_table(plan.shard_folder(model, number), "norm_sums").to_pylist():
            if tuple(row["ids"]) != layout:
                continue
            sums = {key: np.array(row[key]) for key in ("norm", "weight")}
            total = {**row, **{key: total.get(key, 0) + value for key, value in sums.items()}}
    n_src, n = len(layout), counts[layout]
    shape = len(total["layers"]), len(total["dest"]), n_src
    norm, weight = (total[key].reshape(shape) / n for key in ("norm", "weight"))  # [layer dest src]
    frames = []
    for column, (name, dest) in enumerate(zip(total["names"], total["dest"], strict=True)):
        for row, layer in enumerate(total["layers"]):
            frame = pd.DataFrame(
                {
                    "model": plan.names[model], "dest": name, "dest_position": dest, "layer": layer, "src": range(n_src),
                    "piece": total["pieces"], "modality": total["modality"], "norm": norm[row, column],
                    "weight": weight[row, column], "n": n,
                }
            )  # fmt: skip
            frames.append(frame[frame["src"] <= dest])
    return pd.concat(frames, ignore_index=True)
