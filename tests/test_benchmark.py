"""Benchmark: the other ways give mechvlm's numbers, and regressions are reported. No timing."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import mechvlm as mv

sys.path.insert(0, str(Path(mv.__file__).parents[1] / "scripts"))

import benchmark
import benchmark_models
import benchmark_rivals as rivals
from benchmark_measure import peaks, times


@pytest.mark.long
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_the_other_ways_give_the_same_numbers(family):
    vlm, hf = benchmark_models.build(family, layers=2, width=256)
    prompts = [benchmark_models.QUESTION, benchmark_models.QUESTION + " w1 w2"]
    inputs = vlm.inputs([benchmark_models.noise(i) for i in range(2)], prompts)
    tokens = inputs.token_maps[1]
    assert (len(tokens), len(tokens.image)) == {"llava": (620, 576), "instructblip": (74, 32)}[family]
    ours = rivals.read(vlm, inputs)
    for theirs in (
        rivals.hugging_face(hf, vlm, inputs),
        rivals.transformer_lens(vlm.bridge(), vlm, inputs),
        rivals.plain_hooks(hf, vlm, inputs),
    ):
        for name, a, b in zip(ours._fields, ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    # The bare model shares mechvlm's weights, but not its modules.
    for (name, bare), (_, traced) in zip(hf.named_modules(), vlm.hf.named_modules(), strict=True):
        assert bare is not traced, name
        for own, shared in zip(bare.parameters(recurse=False), traced.parameters(recurse=False), strict=True):
            assert own.data_ptr() == shared.data_ptr(), name


def test_pair_by_pair_against_a_calculation_by_hand():
    # [1, 2 heads, dest, src]
    alpha = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]]])
    v = torch.tensor([[[[3.0], [1.0]], [[4.0], [2.0]]]])
    # Head 0 writes along the first axis, head 1 along the second. To destination 0, source 0 writes
    # (3, 4). To destination 1, source 0 writes (3 / 2, 0) and source 1 writes (1 / 2, 2).
    expected = torch.tensor([[[5.0, 0.0], [1.5, 4.25**0.5]]])
    torch.testing.assert_close(rivals.pair_by_pair(alpha, v, torch.eye(2)), expected)


def test_moved_ratios_are_reported():
    record = {"t": {"read": 1.0, "pairs": 20.0, "gone": 3.0, "tracing": 0.002, "fat": 1.0, "fat, memory": 1.02}}
    rows = [
        {"case": "read", "seconds": 1.0, "of a bare forward": 9.0, "of its floor": 1.2},
        {"case": "pairs", "seconds": 1.0, "times as long": 30.0},
        {"case": "new", "seconds": 1.0, "of its floor": 1.0},
        {"case": "tracing", "seconds": 0.01, "of a bare forward": 0.004},
        {"case": "fat", "seconds": 1.0, "of its floor": 1.0, "peak of bare": 1.3},
    ]
    assert benchmark.moved("t", rows, record) == [
        ("read: of its floor 1.000 -> 1.200 (worse)", True), ("pairs: times as long 20.000 -> 30.000 (better)", False),
        ("fat, memory: peak of bare 1.020 -> 1.300 (worse)", True),
    ]  # fmt: skip
    rows[0]["of its floor"] = 1.09
    assert len(benchmark.moved("t", rows, record)) == 2
    assert benchmark.moved("another machine", rows, record) == []


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"of its floor": 1.04, "bar": 1.05}, None),
        ({"of its floor": 1.06, "bar": 1.05}, "x: of its floor 1.060, the bar is 1.050"),
        ({"of its floor": 1.06, "bar": None}, None),
        ({"peak of bare": 1.3, "memory bar": 1.25}, "x: peak of bare 1.300, the bar is 1.250"),
        ({"of a bare forward": 0.04, "share bar": 0.03}, "x: of a bare forward 0.040, the bar is 0.030"),
        ({"seconds": 2.0, "limit": 1.0}, "x: seconds 2.000, the bar is 1.000"),
        ({"times as long": 14.0, "least": 15}, "x: times as long 14.000, the bar is 15.000"),
        ({"times as long": 16.0, "least": 15}, None),
        ({"of as many bare forwards": 0.51, "most": 0.5}, "x: of as many bare forwards 0.510, the bar is 0.500"),
    ],
)
def test_a_missed_bar_is_reported(row, sentence):
    assert benchmark.missed({"case": "x", "seconds": 0.0, **row}) == sentence


def test_times_skip_the_warm_up_turn_and_peaks_see_an_allocation():
    turns = []
    times({"case": lambda: turns.append(1)}, repeats=3)
    assert len(turns) == 4
    order = []
    times({name: partial(order.append, name) for name in "rabc"}, repeats=1, reference="r")
    assert order == ["r", "a", "b", "r", "c"]
    memory = peaks({"large": lambda: torch.ones(50_000_000), "small": lambda: torch.ones(1)}, "cpu", 1)
    if memory["large"] is not None:  # None where the system does not report it
        assert 190e6 < memory["large"].above < 260e6
        assert memory["small"].above < 50e6
