"""Logits with a factor and a cap, by hand: 10 tanh(u / 20) of the unembedding's output u."""

import math

import pytest
import torch

from mechvlm.decoder.unembedding import Unembedding

WEIGHT = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]])
STATE = torch.tensor([[2.0, 1.0]])
OUTPUT = [4.0, 5.0, 1.0]


def unembedding(scale: float = 1.0, cap: float | None = None, dtype: torch.dtype = torch.float32) -> Unembedding:
    linear = torch.nn.Linear(2, 3, bias=False).requires_grad_(False)
    linear.weight.copy_(WEIGHT)
    return Unembedding(linear.to(dtype), None, 2, scale, cap)


def capped(u: float) -> float:
    return 10 * math.tanh(0.5 * u / 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_have_the_factor_and_then_the_cap(dtype):
    unembed = unembedding(0.5, 10.0, dtype)
    want = pytest.approx([capped(u) for u in OUTPUT], rel=1e-5)
    assert unembed.in_float32(STATE.to(dtype))[0].tolist() == want
    assert unembed(STATE.to(dtype))[0].tolist() == pytest.approx([capped(u) for u in OUTPUT], rel=1e-2)
    assert unembed.uncapped(STATE.to(dtype))[0].tolist() == [2.0, 2.5, 0.5]


def test_an_output_and_its_logits_undo_each_other():
    u = torch.tensor([-20.0, 0.25, 7.0])
    for scale, cap in ((1.0, None), (0.25, None), (1.0, 10.0), (0.25, 10.0)):
        unembed = unembedding(scale, cap)
        torch.testing.assert_close(unembed.output_for(unembed.logits_of(u)), u, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("largest", [10.0, -10.0, 11.0])
def test_a_logit_that_the_cap_lets_none_have_is_refused(largest):
    with pytest.raises(ValueError, match=f"up to {abs(largest):g} were assigned; this model caps them below 10"):
        unembedding(1.0, 10.0).output_for(torch.tensor([0.0, largest]))
