"""Norms and weights by head, by hand: with a large epsilon, uneven gains and grouped keys."""

import pytest
import torch

import mechvlm as mv
from helpers.models import llava
from helpers.uneven import uneven
from mechvlm.decoder.norms import Norm, rms
from mechvlm.decoder.projections import in_heads, out_heads


def test_the_divisor_holds_the_epsilon():
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert rms(x, 0.5).flatten().tolist() == pytest.approx([13**0.5, 0.5**0.5])


def test_a_normed_state_has_the_gain():
    norm = torch.nn.Module()
    norm.weight = torch.nn.Parameter(torch.tensor([2.0, 0.5]))
    x = torch.tensor([[3.0, -4.0]])
    want = torch.tensor([[6.0, -2.0]]) / 13**0.5
    torch.testing.assert_close(Norm(norm, None, 2, 0.5).in_float32(x), want)


def test_heads_are_blocks_of_rows_and_of_columns():
    weight = uneven(6, 4)  # two heads of three
    by_head = in_heads(weight, 3)
    assert by_head.shape == (2, 4, 3)
    assert torch.equal(by_head[1], weight[3:].T)
    weight = uneven(4, 6)
    by_head = out_heads(weight, 3)
    assert by_head.shape == (2, 3, 4)
    assert torch.equal(by_head[1], weight[:, 3:].T)


def test_query_heads_of_a_group_share_the_same_key():
    """Four query heads and two key heads: 0 and 1 share the first, 2 and 3 the second."""
    vlm = mv.load(*llava(kv_heads=2, bias=True))
    own = vlm.hf.model.language_model.layers[1].self_attn.k_proj.weight
    by_head = vlm.W_K[1]
    for head, block in enumerate((own[:8], own[:8], own[8:], own[8:])):
        assert torch.equal(by_head[head], block.T)
