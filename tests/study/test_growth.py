"""A study's memory stays where it is over a thousand batches."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mechvlm as mv
from helpers.models import llava
from mechvlm.datasets import Dataset, Example
from mechvlm.study.running import shards
from mechvlm.study.running.plan import Plan
from mechvlm.study.running.workers import LocalWorker

BATCHES, WARM = 1000, 300
MOST_GROWTH_MB = 16
"""Every tenth batch of this size that stayed would be 40 MB."""


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not report a process's memory")
def test_no_growth_over_a_thousand_batches(tmp_path, monkeypatch):
    """The forward is done once, and stands for all others; all else is the study's own work."""
    vlm = mv.load(*llava(layers=2))
    images = [np.random.default_rng(i).integers(0, 255, (300, 300, 3), dtype=np.uint8) for i in range(4)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    examples = tuple(
        Example(f"e{i}", tmp_path / f"{i % len(images)}.png", ("a dog", f"a picture {i}")) for i in range(BATCHES)
    )
    plan = Plan(tmp_path / "shards", ("m",), Dataset("made", examples, (), ""), "what is this", 1, 32, views=False)
    read_once = shards.read_batch
    results: list = []
    memory: dict[int, float] = {}

    def read(vlm, inputs, *probes):
        results[:] = results or [read_once(vlm, inputs, *probes)]
        return results[0]

    def progress(done: int) -> None:
        if done in (WARM, BATCHES):
            memory[done] = resident_mb()

    monkeypatch.setattr(shards, "read_batch", read)
    before = threading.active_count()
    with LocalWorker(plan, [vlm], {}, {}) as local:
        local.load(0, lambda: None)
        local.make_shards(0, list(range(len(plan))), progress)
    assert len(list((tmp_path / "shards").iterdir())) == len(plan) == 32
    assert memory[BATCHES] - memory[WARM] < MOST_GROWTH_MB
    assert threading.active_count() == before
