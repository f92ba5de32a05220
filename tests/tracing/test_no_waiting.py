"""Reading a forward takes no number from the device: a GPU's queue of work never runs dry."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.probes.answer_reading import AnswerReading, OnPrompt
from mechvlm.study.running.rows import MeanOfHeads
from mechvlm.tracing import reading

TAKING = ("item", "cpu", "numpy", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero")
"""Methods that wait until a GPU has computed the tensor."""
WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
"""The operations by which a number, or a shape that depends on numbers, leaves the device."""


class Waits(TorchDispatchMode):
    """Counts the operations that would wait for a device."""

    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITING:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch) -> Counter:
    """Counts what probes take from tensors inside the trace; plans are on the CPU in any case."""
    counts: Counter[str] = Counter()
    planned: set[int] = set()
    inside = False
    measure = reading.without_autocast

    def storages(value) -> set[int]:
        if isinstance(value, Tensor):
            return {value.untyped_storage().data_ptr()}
        return set().union(*map(storages, value)) if isinstance(value, tuple | list) else set()

    def watched(method, plan, given):
        nonlocal inside
        planned.update(storages(plan))
        inside = True
        try:
            with Waits(counts):
                return measure(method, plan, given)
        finally:
            inside = False

    monkeypatch.setattr(reading, "without_autocast", watched)
    for name in TAKING:
        original = getattr(Tensor, name)

        def counted(self, *args, original=original, name=name, **kwargs):
            if inside and self.untyped_storage().data_ptr() not in planned:
                counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    return counts


PROBES = (
    mv.LogitLens(k=2, positions="all"), mv.Contextualization(), mv.NormAttention(), MeanOfHeads(), mv.AttentionShare(),
    mv.NormAttention("all pairs"),
)  # fmt: skip


def test_the_studys_probes_take_nothing_from_the_device(llava_vlm, waits):
    inputs = llava_vlm.inputs([noise_image(0), noise_image(1)], ["what is this", "what is this and that"])
    mv.read(llava_vlm, inputs, *PROBES)
    assert not waits
    answered = inputs.answered("a red circle")
    mv.read(llava_vlm, answered, OnPrompt(mv.NormAttention()), AnswerReading())
    assert not waits


def test_a_number_that_is_taken_is_counted(llava_vlm, waits):
    class Taking:
        def prepare(self, vlm, inputs):
            return None

        def at_state(self, plan, state):
            return {"norm": torch.tensor(float(state.resid.norm()))}

        def result(self, plan, rows, vlm, inputs):
            return len(rows)

    mv.read(llava_vlm, llava_vlm.inputs(noise_image(0), "what is this"), Taking())
    assert waits["__float__"] >= llava_vlm.n_layers + 1
