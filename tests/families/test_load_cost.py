"""What loading costs: forwards of a tiny image, and no copy of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mechvlm as mv
from helpers import families
from mechvlm.families.record import part
from mechvlm.vlm.records import record_of


@contextmanager
def counted(hf) -> Iterator[list[str]]:
    """The forwards that begin, and those that reach the decoder."""
    calls: list[str] = []
    layers = part(hf, "model.language_model.layers")
    hooks = [
        hf.register_forward_pre_hook(lambda *_: calls.append("model")),
        layers[0].register_forward_hook(lambda *_: calls.append("decoder")),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class Copies(TorchDispatchMode):
    """Operations that make a new tensor of a weight's shape out of it: a copy, a cast."""

    def __init__(self, hf):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in hf.parameters() if p.ndim > 1}
        self.made: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.weights:
            given = [x for x in args if isinstance(x, torch.Tensor) and x.shape == out.shape]
            if function.overloadpacket not in MATRIX_PRODUCTS and any(
                x.untyped_storage().data_ptr() in self.weights for x in given
            ):
                self.made.append(str(function))
        return out


MATRIX_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


@pytest.mark.parametrize("name", ["llava_phi3", "lighton_ocr"])
def test_deriving_costs_at_most_three_forwards_and_copies_no_weights(name):
    """A known class with unknown layers; and an unknown one, which is asked for places too."""
    hf, processor = families.build(name)
    pointers = [p.data_ptr() for p in hf.parameters()]
    with counted(hf) as calls, Copies(hf) as copies:
        record = record_of(hf, processor, name)
    assert record.derived
    assert calls.count("model") == {"llava_phi3": 1, "lighton_ocr": 3}[name]
    assert calls.count("decoder") == 1  # the other two end where the decoder begins
    assert not copies.made
    assert [p.data_ptr() for p in hf.parameters()] == pointers


def test_a_copy_would_be_seen():
    hf, _ = families.build("llava_phi3")
    with Copies(hf) as copies:
        _ = hf.lm_head.weight.detach(), hf.lm_head.weight.float().T
    assert not copies.made
    with Copies(hf) as copies:
        hf.lm_head.weight.clone()
    assert len(copies.made) == 1


def test_loading_a_known_class_costs_two_forwards():
    """One of mechvlm's and one of Hugging Face's own; a derived record is also run in batches."""
    for name, forwards in {"llava": 2, "llava_phi3": 1 + 2 + 2}.items():
        hf, processor = families.build(name)
        with counted(hf) as calls:
            mv.load(hf, processor)
        assert calls.count("model") == forwards, name
        assert calls.count("decoder") == forwards + (name == "llava_phi3")
