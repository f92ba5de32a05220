"""The simulated study against arithmetic by hand, and against a study's measured speed."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import mechvlm as mv

sys.path.insert(0, str(Path(mv.__file__).parents[1] / "scripts"))

import simulate_scaling
from scaling_simulator import Clock, Cores, Costs, simulate

NOTHING = Costs(
    prepare=0, device=0, join=0, rows=0, shard=0, call=0, write=0, sync=0, shard_bytes=1000, on_cores=False
)  # fmt: skip


def test_cores_are_shared_evenly():
    """Three jobs of 1, 1 and 2 seconds on two cores: the short ones end after 1.5, the other 2.5.

    At two thirds of a core each, 1 second of work takes 1.5. Then the long job has a core alone,
    and 1 second left.
    """
    clock, ended = Clock(), {}
    cores = Cores(clock, 2)

    def job(name, seconds):
        yield cores.work(seconds)
        ended[name] = clock.now

    for name, seconds in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        clock.start(job(name, seconds))
    clock.run()
    assert ended == {"a": pytest.approx(1.5), "b": pytest.approx(1.5), "c": pytest.approx(2.5)}
    assert cores.busy == pytest.approx(4.0)


def test_a_device_without_a_host_sets_the_speed():
    costs = replace(NOTHING, device=0.1)
    for workers, nodes in ((0, 1), (1, 1), (8, 1), (64, 8)):
        speed = simulate(costs, 32 * 64 * 2, workers, nodes, cores=8)
        assert speed.rate == pytest.approx(10 * max(1, workers))
        assert speed.device == pytest.approx(1)


def test_one_shard_by_hand():
    """Batches of 16, two a shard: what stands in turn with the device, and what beside it.

    On a cluster 0.5 s of the call, 1.6 for the first inputs, two batches of 3.2 + 0.16, the last
    rows 0.8, the shard 2, then 0.3 + 0.2 to write it. The second inputs and the first rows are made
    beside the device.
    """
    costs = Costs(
        prepare=0.1, device=0.2, join=0.01, rows=0.05, shard=2, call=0.5, write=0.3, sync=0.2, shard_bytes=1000
    )  # fmt: skip
    for shards in (1, 3):
        seconds = 32 * shards / simulate(costs, 32 * shards, 1, 1, cores=8).rate
        until_taken = 0.5 + 1.6 + 2 * (3.2 + 0.16) + 0.8 + 2
        assert seconds == pytest.approx(shards * until_taken + 0.5)
    # One process prepares the second shard's inputs, and writes the first, while it reads.
    alone = 96 / simulate(costs, 96, 0, 1, cores=8).rate
    assert alone == pytest.approx(1.6 + 6 * (3.2 + 0.16) + 0.8 + 2 + 0.3 + 0.2)


def test_the_slowest_part_is_the_bottleneck():
    """Inputs that take longer than the device; a writer that takes longer than all workers."""
    slow_inputs = replace(NOTHING, prepare=0.3, device=0.1)
    assert simulate(slow_inputs, 32 * 50, 0, 1, cores=8).rate == pytest.approx(1 / 0.3, rel=0.02)
    slow_writer = replace(NOTHING, device=0.1, write=0.5, sync=0.5)
    speed = simulate(slow_writer, 32 * 64 * 20, 64, 8, cores=8)
    assert speed.rate == pytest.approx(32, rel=0.05)  # a shard a second
    assert speed.writer == pytest.approx(1, rel=0.05)
    assert speed.traffic == pytest.approx(1000, rel=0.05)
    on_two_cores = replace(NOTHING, device=0.1, on_cores=True)
    assert simulate(on_two_cores, 32 * 64, 4, 1, cores=2).rate == pytest.approx(20)


def test_the_simulation_against_a_measured_study():
    """With tiny-llava on two cores: what a second worker brings, to a tenth."""
    record = json.loads(simulate_scaling.RECORD.read_text())
    costs = Costs(**record["costs"])
    measured = record["examples a second"]["2"] / record["examples a second"]["1"]
    one, two = (simulate(costs, simulate_scaling.SCENES, n, 1, record["cores"]).rate for n in (1, 2))
    assert two / one == pytest.approx(measured, rel=0.1)


def test_the_flops_on_paper():
    """LLaVA-1.5-13B by hand, in TFLOPs."""
    tera = {part: n / 1e12 for part, n in simulate_scaling.flops().items()}
    assert tera == pytest.approx(
        {
            "decoder": 15.7, "attention": 0.3, "CLIP and projector": 0.4, "logit lens": 8.3,
            "norm-based attention: vectors": 1.3, "norm-based attention: Gram matrices": 0.4,
        },
        abs=0.06,
    )  # fmt: skip
