"""Norm-based attention of a study whose examples have several layouts of tokens."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.images import noise_image
from helpers.uneven import token_map, uneven
from mechvlm.datasets import Dataset, Example
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.study.running import merge
from mechvlm.study.running.plan import Plan
from mechvlm.study.running.rows import NormRows, as_tables

LAYERS, HEADS = 2, 3
NAMES = ("last_text", "last_image")
KINDS = {"short": "siits", "long": "siiitt"}
PADDED = 7


def result_of(kinds: list[str], seed: int) -> tuple[tuple, NormAttentionResult]:
    """Maps padded to one length, and uneven norms and weights (0 on padding)."""
    maps = tuple(token_map("." * (PADDED - len(kind)) + kind) for kind in kinds)
    norm = uneven(LAYERS, len(kinds), 2, PADDED, seed=seed)
    weight = uneven(LAYERS, len(kinds), HEADS, 2, PADDED, seed=seed + 1)
    dest = torch.stack([torch.tensor([m.last_text, m.last_image]) for m in maps])
    for row, tokens in enumerate(maps):
        padding = PADDED - len(tokens.all)
        norm[:, row, :, :padding] = weight[:, row, :, :, :padding] = 0
    value_norm = uneven(LAYERS, len(kinds), HEADS, PADDED, seed=seed + 2)
    return maps, NormAttentionResult(norm, weight, value_norm, (1, 2), dest, NAMES, "m")


BATCHES = [["short", "long"], ["long", "short"], ["long"]]
"""Kinds of the examples of three batches; each batch is a shard."""


@pytest.fixture
def shards():
    """The tables of each shard, and the maps and results that they were made of."""
    tables, read = [], []
    for number, batch in enumerate(BATCHES):
        rows = NormRows("m")
        maps, result = result_of([KINDS[name] for name in batch], seed=10 * number)
        ids = [f"{number}-{i}" for i in range(len(batch))]
        rows.add([Example(id, noise_image(0), ("a",)) for id in ids], maps, result)
        tables.append(as_tables({"norm_sums": rows.frame(), "attention_share": rows.share()}))
        read += [(name, i, maps[i], result, id) for i, (name, id) in enumerate(zip(batch, ids, strict=True))]
    return tables, read


def test_the_means_are_over_the_most_frequent_layout(shards, monkeypatch):
    tables, read = shards
    examples = tuple(Example(str(number), noise_image(0), ("a",)) for number in range(len(tables)))
    plan = Plan(Path("none"), ("m",), Dataset("made", examples, (), ""), "a", batch_size=1, shard_size=1, views=False)
    by_folder = {plan.shard_folder(0, number): tables[number] for number in range(len(plan))}
    monkeypatch.setattr(merge, "read_table", lambda folder, name: by_folder[folder][name])
    got = merge._norm_means(plan, 0)
    chosen = [(row, tokens, result) for name, row, tokens, result, _ in read if name == "long"]
    assert set(got["n"]) == {3}
    tokens = chosen[0][1]
    assert got.query("dest == 'last_text' and layer == 1")["piece"].tolist() == [
        tokens.strings[p] for p in tokens.all.tolist()
    ]
    values = got.set_index(["dest", "layer", "src"])
    for column, name in enumerate(NAMES):
        at = {"last_text": 5, "last_image": 3}[name]
        assert set(got.query("dest == @name")["dest_position"]) == {at}
        assert got.query("dest == @name and layer == 2")["src"].tolist() == list(range(at + 1))
        for layer in (1, 2):
            for src in range(at + 1):
                norm = np.mean([r.norm[layer - 1, row, column, int(t.all[src])].item() for row, t, r in chosen])
                weight = np.mean(
                    [r.weight[layer - 1, row, :, column, int(t.all[src])].mean().item() for row, t, r in chosen]
                )
                assert values.loc[(name, layer, src), "norm"] == pytest.approx(norm)
                assert values.loc[(name, layer, src), "weight"] == pytest.approx(weight)


def test_each_examples_share_is_its_own(shards):
    tables, read = shards
    shares = {
        (row["example"], row["dest"], row["measure"], row["layer"]): row["value"]
        for table in tables
        for row in table["attention_share"].to_pylist()
    }
    assert len(shares) == len(read) * 2 * 2 * LAYERS
    for _, row, tokens, result, id in read:
        image = tokens.image
        for column, dest in enumerate(NAMES):
            for layer in (1, 2):
                for measure, values in (
                    ("norm", result.norm[layer - 1, row, column]),
                    ("weight", result.weight[layer - 1, row, :, column].mean(0)),
                ):
                    share = values[image].sum() / values[tokens.all].sum()
                    assert shares[id, dest, measure, layer] == pytest.approx(share.item(), rel=1e-5)


def test_maps_of_the_same_tokens_share_a_layout():
    rows = NormRows("m")
    for seed in (0, 5):
        maps, result = result_of([KINDS["short"], KINDS["short"]], seed)
        rows.add([Example(str(seed + i), noise_image(0), ("a",)) for i in range(2)], maps, result)
    (layout,) = rows.sums.values()
    assert layout["n"] == 4


def test_layouts_of_one_length_stay_apart():
    """As many tokens, but other ones: the image in another place."""
    rows, examples = NormRows("m"), [Example(str(i), noise_image(0), ("a",)) for i in range(2)]
    maps, result = result_of(["siitts", "siitts"], seed=0)
    other = replace(maps[1], ids=maps[1].ids + 100)
    rows.add(examples, (maps[0], other), result)
    assert [layout["n"] for layout in rows.sums.values()] == [1, 1]
