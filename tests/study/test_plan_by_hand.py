"""How a study's work is cut, and what its small files hold, by hand."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.images import noise_image
from helpers.studies import made_study
from mechvlm.datasets import Dataset, Example
from mechvlm.study.load import _skipped
from mechvlm.study.report.summary import phases_in_words
from mechvlm.study.running.plan import Plan, missing_shards
from mechvlm.study.running.settings import pair_shard_size, pairs_per_batch, shard_size
from mechvlm.study.save import _plain, run_record


def plan_of(folder: Path, n: int, shard: int, batch_size: int = 4, pairs: int = 0) -> Plan:
    """A plan of `n` examples, of which the first ones are the sides of pairs."""
    image = noise_image(0)
    examples = [Example(f"e{i}", image, ("a cat",)) for i in range(n)]
    for pair in range(pairs):
        for side in (0, 1):
            meta = {"pair": f"p{pair}", "side": side}
            examples[pair + side * pairs] = Example(f"p{pair}-{side}", image, ("a cat",), meta)
    return Plan(folder, ("m", "k"), Dataset("made", tuple(examples), (), ""), "a", batch_size, shard, views=False)


@pytest.mark.parametrize(("n", "shard"), [(7, 3), (6, 3), (1, 3), (8, 1)])
def test_every_example_is_in_one_shard(tmp_path, n, shard):
    plan = plan_of(tmp_path, n, shard)
    assert len(plan) == math.ceil(n / shard)
    assert [i for number in range(len(plan)) for i in plan.example_indices(number)] == list(range(n))
    folders = {plan.shard_folder(model, number) for model in range(2) for number in range(len(plan))}
    assert len(folders) == 2 * len(plan)
    assert list(plan.pair_shards) == []
    assert plan.n_readings == n


def test_every_pair_is_in_one_shard_of_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr("mechvlm.study.running.settings.PAIRS_PER_SHARD", 2)
    plan = plan_of(tmp_path, 13, 4, batch_size=8, pairs=5)
    assert [pair.id for pair in plan.pairs] == [f"p{i}" for i in range(5)]
    assert list(plan.pair_shards) == [4, 5, 6]
    assert [i for number in plan.pair_shards for i in plan.pair_indices(number)] == list(range(5))
    assert list(plan.example_indices(4)) == [0, 1, 5, 6], "both sides of the first two pairs"
    assert list(plan.example_indices(6)) == [4, 9]
    assert plan.n_readings == 13 + 2 * 5
    plan.shard_folder(0, 1).mkdir()
    plan.shard_folder(0, 5).mkdir()
    plan.shard_folder(1, 2).mkdir()
    assert missing_shards(plan, 0) == [0, 2, 3, 4, 6]
    assert missing_shards(plan, 1) == [0, 1, 3, 4, 5, 6]


@pytest.mark.parametrize(("batch", "size", "pairs", "pair_size"), [
    (1, 32, 1, 16), (4, 32, 1, 16), (5, 30, 1, 16), (12, 24, 3, 15), (32, 32, 8, 16), (100, 100, 25, 25),
])  # fmt: skip
def test_shards_hold_whole_batches(batch, size, pairs, pair_size):
    assert shard_size(batch) == size
    assert pairs_per_batch(batch) == pairs
    assert pair_shard_size(batch) == pair_size


def test_ids_that_look_like_numbers_or_nothing_stay_text(tmp_path):
    rows = [["", "007", "no"], ["m", "NA", 'a "quoted", reason'], ["None", "1.0", "nan"]]
    table = pd.DataFrame(rows, columns=["model", "example", "reason"])
    table.to_csv(tmp_path / "skipped.csv", index=False)
    assert _skipped(tmp_path / "skipped.csv").to_numpy().tolist() == rows


def test_numbers_as_json_holds_them():
    assert _plain(np.float32(0.5)) == 0.5
    assert type(_plain(np.int64(3))) is int
    assert _plain(float("nan")) is None
    assert _plain(np.float64("nan")) is None
    assert _plain("text") == "text"


def test_the_record_of_a_study():
    study = made_study({"shallow": 3, "deep": 12}, n=6, seed=5)
    study.skipped.loc[0] = ["deep", "e9", "unreadable"]
    record = run_record(study)
    assert (record["seed"], record["skipped"]) == (5, 1)
    assert [row["model"] for row in record["findings"]] == ["shallow", "deep"]
    summary = study.summary().set_index("model")
    for row in record["findings"]:
        for key in ("precision", "precision_0", "lowest", "highest_state", "recall_other_high"):
            assert row[key] == pytest.approx(summary.loc[row["model"], key])
    for model, phases in study.phases.items():
        written = record["phases"][model]
        assert written["boundaries"] == list(phases.boundaries)
        assert written["boundary_intervals"] == [list(ends) for ends in phases.boundary_intervals]
        assert written["support"] == phases.support
        assert written["directions"] == list(phases.directions)
        assert phases_in_words(phases) == (
            ", ".join(phases.directions) if None in phases.labels else
            f"{phases.labels[0].split()[0]}-{phases.labels[-1].split()[0]}" + (" only" if not phases.shows_pattern else "")
        )  # fmt: skip
