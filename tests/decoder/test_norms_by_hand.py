"""Norms and weights by head, by hand: with a large epsilon, uneven gains and grouped keys."""

import pytest
import torch

import mechvlm as mv
from helpers.models import llava
from helpers.uneven import uneven
from mechvlm.decoder.norms import Norm, fold, rms
from mechvlm.decoder.projections import in_columns, out_heads, write_columns


def test_the_divisor_holds_the_epsilon():
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert rms(x, 0.5).flatten().tolist() == pytest.approx([13**0.5, 0.5**0.5])


def test_a_normed_state_has_the_gain():
    norm = torch.nn.RMSNorm(2, eps=0.5)
    norm.weight = torch.nn.Parameter(torch.tensor([2.0, 0.5]))
    x = torch.tensor([[3.0, -4.0]])
    want = torch.tensor([[6.0, -2.0]]) / 13**0.5
    torch.testing.assert_close(Norm(norm, None, 2, 0.5).in_float32(x), want)


class OnePlus(torch.nn.Module):
    """Gemma's: the gain is 1 + weight."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * (1 + self.weight)


def test_a_gain_of_one_plus_the_weight():
    norm = Norm(OnePlus(torch.tensor([1.0, -0.5])), None, 2, 0.5)
    assert norm.gain.tolist() == pytest.approx([2.0, 0.5])
    assert norm.bias.tolist() == [0, 0]
    assert not norm.centres


def test_a_layer_norm_subtracts_the_mean_and_has_a_bias():
    layer_norm = torch.nn.LayerNorm(4, eps=0.5)
    layer_norm.weight = torch.nn.Parameter(torch.tensor([2.0, 0.5, 1.0, 4.0]))
    layer_norm.bias = torch.nn.Parameter(torch.tensor([0.1, 0.2, -0.3, 0.0]))
    norm = Norm(layer_norm, None, 4, 0.5)
    assert norm.gain.tolist() == pytest.approx([2.0, 0.5, 1.0, 4.0])
    assert norm.bias.tolist() == pytest.approx([0.1, 0.2, -0.3, 0.0])
    assert norm.centres
    x = torch.tensor([[5.0, 1.0, 1.0, 1.0]])  # mean 2: less it [3 -1 -1 -1], whose mean square is 3
    assert norm.rms(x).item() == pytest.approx(3.5**0.5)
    assert norm.in_float32(x).tolist()[0] == pytest.approx(
        [6 / 3.5**0.5 + 0.1, -0.5 / 3.5**0.5 + 0.2, -1 / 3.5**0.5 - 0.3, -4 / 3.5**0.5]
    )


def test_reading_a_norm_in_half_precision_rounds_nothing_more():
    norm = torch.nn.LayerNorm(8)
    norm.weight = torch.nn.Parameter(uneven(8))
    norm = norm.bfloat16()
    assert torch.equal(Norm(norm, None, 8, 1e-5).gain.bfloat16(), norm.weight)
    assert norm.weight.dtype == torch.bfloat16


def test_heads_are_blocks_of_rows_and_of_columns():
    weight = uneven(6, 4)  # two heads of three
    by_head = in_columns(weight.T, None, None, 3)
    assert by_head.shape == (4, 2, 3)
    assert torch.equal(by_head[:, 1], weight[3:].T)
    weight = uneven(4, 6)
    by_head = out_heads(weight, 3)
    assert by_head.shape == (2, 3, 4)
    assert torch.equal(by_head[1], weight[:, 3:].T)


def test_heads_out_of_a_fused_matrix():
    """Columns q0 k0 v0 q1 k1 v1, of width 2, and q q k v side by side."""
    x = torch.arange(12.0)[None]
    assert in_columns(x, (2, 6), 2, 2).tolist() == [[[2, 3], [8, 9]]]
    assert in_columns(x, (0, 2), 2, 2).tolist() == [[[0, 1], [2, 3]]]
    assert in_columns(x, (8, 2), 1, 2).tolist() == [[[8, 9]]]
    new = write_columns(x, (2, 6), torch.tensor([[[-1.0, -2.0], [-3.0, -4.0]]]))
    assert new.tolist() == [[0, 1, -1, -2, 4, 5, 6, 7, -3, -4, 10, 11]]
    assert x.tolist() == [list(range(12))]


def test_query_heads_of_a_group_share_the_same_key():
    """Four query heads and two key heads: 0 and 1 share the first, 2 and 3 the second."""
    vlm = mv.load(*llava(kv_heads=2, bias=True))
    own = vlm.hf.model.language_model.layers[1].self_attn.k_proj.weight
    by_head = vlm.W_K[1]
    for head, block in enumerate((own[:8], own[:8], own[8:], own[8:])):
        assert torch.equal(by_head[head], block.T)


@pytest.mark.parametrize("kind", [OnePlus, torch.nn.RMSNorm])
def test_a_folded_gain_leaves_the_logits(kind):
    """Of a norm that multiplies with its weight, and of one that multiplies with 1 + weight."""
    weight = uneven(4, seed=1)
    norm = kind(weight) if kind is OnePlus else torch.nn.RMSNorm(4, eps=0.5)
    norm.weight = torch.nn.Parameter(weight)
    unembed = torch.nn.Linear(4, 6, bias=False)
    x = 3 * uneven(2, 4, seed=2) - 1
    want, plain = unembed(norm(x)), x / (x.pow(2).mean(-1, keepdim=True) + 0.5).sqrt()
    fold(norm, unembed, 0.5)
    torch.testing.assert_close(norm(x), plain)
    torch.testing.assert_close(unembed(norm(x)), want)
