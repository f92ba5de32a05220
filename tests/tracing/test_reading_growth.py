"""Reading keeps nothing of a batch that was read, over a thousand batches."""

import gc
from pathlib import Path

import pytest
from torch import Tensor

import mechvlm as mv
from helpers.images import noise_image

BATCHES, WARM = 1000, 100
MOST_GROWTH_MB = 16
"""Were a batch's rows, some 20 kB, kept of every batch, that would be 18 MB."""


def alive() -> tuple[float, int]:
    """The process's memory in MB, and how many tensors there are."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20, sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not report a process's memory")
def test_no_growth_over_a_thousand_batches_that_are_read(llava_vlm):
    inputs = llava_vlm.inputs([noise_image(0), noise_image(1)], "what is this")
    probes = mv.LogitLens(k=2, positions="all"), mv.Contextualization(), mv.NormAttention(), mv.AttentionShare()
    counts = []
    for number in range(BATCHES):
        mv.read(llava_vlm, inputs, *probes)
        if number in (WARM, BATCHES - 1):
            counts.append(alive())
    (memory, tensors), (memory_then, tensors_then) = counts
    assert tensors_then == tensors
    assert memory_then - memory < MOST_GROWTH_MB
