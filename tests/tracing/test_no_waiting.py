"""Reading a forward waits for no copy from or to the device: a GPU's queue of work never runs dry.

No GPU is needed: the meta device stands for one. It holds no numbers, so that taking one raises.
"""

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from mechvlm.decoder import decoder, norms, projections
from mechvlm.probes.answer_reading import AnswerReading, OnPrompt
from mechvlm.study.running.rows import MeanOfHeads
from mechvlm.tracing import reading
from mechvlm.vlm.encoding import page_locked
from mechvlm.vlm.vlm import VLM

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


class Copies(TorchDispatchMode):
    """Counts the operations on tensors of two devices: copies, and indices that must be copied."""

    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = (value for value in tree_leaves((args, kwargs, out)) if isinstance(value, Tensor))
        # A single number travels with the operation itself.
        if len({tensor.device.type for tensor in tensors if tensor.ndim}) > 1:
            self.counts[func.name()] += 1
        return out


class AfterTheForward(Exception):
    pass


@pytest.fixture
def copies(monkeypatch) -> Iterator[Counter]:
    """Counts copies between devices in readings and probes; `read` ends where its forward ends."""
    counts: Counter[str] = Counter()
    measure, readings, tensor = reading.without_autocast, reading._readings, torch.tensor

    def measured(*args):
        with Copies(counts):
            monkeypatch.setattr(torch, "tensor", made)
            row = measure(*args)
            monkeypatch.setattr(torch, "tensor", tensor)
        counts["measured"] += 1
        return row

    def made(*args, device=None, **kwargs):
        counts["tensor"] += str(device or "cpu") != "cpu"
        return tensor(*args, device=device, **kwargs)

    def read(*args):
        several = readings(*args)
        while True:
            with Copies(counts):
                given = next(several, None)
            if given is None:
                return
            yield given

    def end(*_):
        raise AfterTheForward

    monkeypatch.setattr(reading, "without_autocast", measured)
    monkeypatch.setattr(reading, "_readings", read)
    monkeypatch.setattr(reading, "_require_whole", end)
    for room in (decoder, norms, projections):  # without weights a model would be on NDIF
        monkeypatch.setattr(room, "has_weights", lambda _: True)
    # transformers takes two numbers of its own a forward, for checks and the mask.
    monkeypatch.setattr("transformers.models.llava.modeling_llava.torch_compilable_check", lambda *_: None)
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *_, **__: False)
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
        yield counts


def test_nothing_is_copied_to_the_device_within_a_forward(copies):
    vlm = mv.load(*llava.__wrapped__(layers=2))  # a model of its own: it loses its weights
    inputs = vlm.inputs([noise_image(0), noise_image(1)], ["what is this", "what is this and that"])
    answered = inputs.answered("a red circle")
    vlm.hf.to("meta")
    shares = mv.AttentionShare(of="norm", boxes=[(0, 0, 200, 200)] * 2)
    with pytest.raises(AfterTheForward):
        mv.read(vlm, inputs, *PROBES, shares, mv.LocalizationHeads())
    assert copies.pop("measured") == 2 * 3 + 6 * 2  # two probes at 3 states, six at 2 layers
    assert not +copies
    with pytest.raises(AfterTheForward):
        mv.read(vlm, answered, OnPrompt(mv.NormAttention()), AnswerReading())
    del copies["measured"]
    assert not +copies


def test_a_plan_on_the_cpu_is_counted(copies, monkeypatch):
    monkeypatch.setattr(reading, "on_device", lambda plan, vlm: plan)
    vlm = mv.load(*llava.__wrapped__(layers=2))  # a model of its own: it loses its weights
    inputs = vlm.inputs(noise_image(0), "what is this")
    vlm.hf.to("meta")
    with pytest.raises(AfterTheForward):
        mv.read(vlm, inputs, mv.LogitLens(), mv.NormAttention())
    assert copies["aten::_to_copy"] >= 2 * 3 + 2  # two tensors a state, one a layer


def test_rows_are_copied_together_however_many_layers_there_are(monkeypatch):
    models = [mv.load(*llava(layers=layers)) for layers in (2, 3)]
    copied: list[VLM] = []
    cpu = Tensor.cpu
    for vlm in models:
        inputs = vlm.inputs(noise_image(0), "what is this")
        with monkeypatch.context() as patched:
            patched.setattr(Tensor, "cpu", lambda self, vlm=vlm: copied.append(vlm) or cpu(self))
            mv.read(vlm, inputs, *PROBES)
    assert copied.count(models[0]) == copied.count(models[1]) > 0


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_inputs_for_a_gpu_are_page_locked_and_their_copy_is_not_waited_for(llava_vlm, monkeypatch, device):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    locked: list[Tensor] = []
    moved: list[tuple] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: locked.append(self) or self.clone())
    ready = page_locked(inputs, SimpleNamespace(has_weights=True, device=torch.device(device)))
    assert len(locked) == (len(inputs.encoding) if device == "cuda" else 0)
    assert all(torch.equal(ready.encoding[key], value) for key, value in inputs.encoding.items())
    monkeypatch.setattr(VLM, "device", property(lambda self: torch.device(device)))
    monkeypatch.setattr(Tensor, "to", lambda self, *to, **how: moved.append((*to, how["non_blocking"])) or self)
    assert llava_vlm.encoding(ready).keys() == inputs.encoding.keys()
    assert moved == [(torch.device(device), device == "cuda")] * len(inputs.encoding)
