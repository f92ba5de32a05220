"""Norm-based attention against the vectors themselves.

They are formed one by one from Hugging Face's eager weights.
"""

from typing import ClassVar

import nnsight
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mechvlm as mv
from mechvlm.families.record import part
from mechvlm.probes import norm_attention as norm_module
from mechvlm.probes import value_gram as gram_module
from mechvlm.probes.value_gram import norm_attention_sum, value_gram


def written(vlm, inputs, layer):
    """α [batch head dest src], and the vectors α_h[dest, src] f_h(x_src) with d_model as last axis.

    From Hugging Face's eager weights, vector by vector.
    """
    text = part(vlm.hf, vlm.record.layers)[0].self_attn
    values = []
    handle = part(vlm.hf, vlm.record.layers)[layer].self_attn.v_proj.register_forward_hook(
        lambda m, args, out: values.append(out)
    )
    before, text.config._attn_implementation = text.config._attn_implementation, "eager"
    with torch.no_grad():
        out = vlm.hf(**vlm.encoding(inputs), output_attentions=True)
    text.config._attn_implementation = before
    handle.remove()
    alpha = (getattr(out, "language_model_outputs", None) or out).attentions[layer]
    w_o = part(vlm.hf, vlm.record.layers)[layer].self_attn.o_proj.weight
    group = vlm.n_heads // vlm.n_kv_heads  # heads that share a key and value
    vectors = []
    for h in range(vlm.n_heads):
        g = h // group
        v = values[0][..., g * vlm.d_head : (g + 1) * vlm.d_head]
        f = v @ w_o[:, h * vlm.d_head : (h + 1) * vlm.d_head].T
        vectors.append(alpha[:, h, :, :, None] * f[:, None])
    return alpha, torch.stack(vectors, 1).detach()


def test_norm_attention_equals_the_vectors(vlm, batch):
    got = mv.norm_attention(vlm, batch)
    assert got.names == ("last_text", "last_image")
    for layer in range(vlm.n_layers):
        alpha, vectors = written(vlm, batch, layer)
        for i, tokens in enumerate(batch.token_maps):
            for d, dest in enumerate((tokens.last_text, tokens.last_image)):
                want = vectors[i, :, dest]
                torch.testing.assert_close(got.weight[layer, i, :, d], alpha[i, :, dest], rtol=0, atol=1e-6)
                torch.testing.assert_close(got.norm_head[layer, i, :, d], want.norm(dim=-1), rtol=1e-4, atol=1e-7)
                torch.testing.assert_close(got.norm[layer, i, d], want.sum(0).norm(dim=-1), rtol=1e-3, atol=1e-7)


def test_all_pairs_hold_the_rows(vlm, single):
    rows, pairs = mv.norm_attention(vlm, single), mv.norm_attention(vlm, single, dst="all pairs")
    at = [single.tokens.last_text, single.tokens.last_image]
    torch.testing.assert_close(pairs.norm[:, :, at], rows.norm, rtol=1e-4, atol=1e-7)
    _, vectors = written(vlm, single, 1)
    torch.testing.assert_close(pairs.norm[1, 0], vectors[0].sum(0).norm(dim=-1), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("padded", [True, False])
def test_all_pairs_in_chunks_equal_the_vectors(vlm, single, batch, monkeypatch, padded):
    """With padding and without a mask, at every destination that is no padding."""
    monkeypatch.setattr(norm_module, "items_per_chunk", lambda size, device: 3)
    inputs = batch if padded else single
    got = mv.norm_attention(vlm, inputs, dst="all pairs")
    alpha, vectors = written(vlm, inputs, 0)
    for i, tokens in enumerate(inputs.token_maps):
        real = tokens.modality != mv.Modality.PADDING
        torch.testing.assert_close(got.weight[0, i, :, real], alpha[i, :, real], rtol=0, atol=1e-6)
        want = vectors[i].sum(0).norm(dim=-1)
        torch.testing.assert_close(got.norm[0, i, real], want[real], rtol=1e-3, atol=1e-7)


def test_all_pairs_of_a_padded_batch_are_0_at_padding(vlm, batch):
    got = mv.norm_attention(vlm, batch, dst="all pairs")
    for row, tokens in enumerate(batch.token_maps):
        padding = tokens.modality == mv.Modality.PADDING
        assert got.norm[:, row, padding].abs().sum() == 0
        assert got.weight[:, row, :, :, padding].abs().sum() == 0
        future = torch.ones(len(tokens), len(tokens)).triu(1).bool()
        assert got.norm[:, row][:, future].abs().sum() == 0
        alone = mv.norm_attention(vlm, vlm.inputs(batch.images[row][0], batch.prompts[row]), dst="all pairs")
        real = tokens.all
        torch.testing.assert_close(got.norm[:, row][:, real][..., real], alone.norm[:, 0], rtol=1e-3, atol=1e-6)


def test_the_sources_writes_add_up_to_the_output(vlm, single):
    _, vectors = written(vlm, single, 1)
    with torch.no_grad(), vlm.trace(single):
        out = nnsight.save(vlm.attn_out[1])
    bias = part(vlm.hf, vlm.record.layers)[1].self_attn.o_proj.bias
    total = vectors.sum((1, 3)) + (0 if bias is None else bias.detach())
    torch.testing.assert_close(total, out, rtol=0, atol=1e-5)


def test_gram_by_hand():
    """Two heads that write (3, 0) and (0, 4): summed 5; opposite vectors cancel."""
    alpha = torch.ones(1, 2, 1, 1)
    for f, norm in ([[3.0, 0.0], [0.0, 4.0]], 5), ([[3.0, 0.0], [-3.0, 0.0]], 0):
        f = torch.tensor([[f]])
        assert norm_attention_sum(alpha, f @ f.transpose(-1, -2)).item() == pytest.approx(norm)
    v, w_o = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[1.0, 0.0, 3.0, 0.0], [0.0, 1.0, 0.0, 5.0]])
    # Two heads that share one value: they write (1, 2) and (3, 10).
    assert value_gram(v, w_o).tolist() == [[[[5.0, 23.0], [23.0, 109.0]]]]


@pytest.mark.parametrize("cached", [1, 2**12, 2**30])
@pytest.mark.parametrize("columns", [3, 100])
@pytest.mark.parametrize("d_model", [100, 13], ids=["by vectors", "by weights"])
def test_the_gram_in_chunks_is_that_of_the_whole(cached, columns, d_model, monkeypatch):
    """With fewer points than d_model, by the vectors f; with more, by the products of weights."""
    monkeypatch.setattr(gram_module, "NUMBERS_IN_CACHE", cached)
    monkeypatch.setattr(gram_module, "COLUMNS_AT_ONCE", columns)
    torch.manual_seed(0)
    v, w_o = torch.randn(2, 2, 7, 8), torch.randn(d_model, 32)  # 4 heads, 2 key-value heads
    f = torch.einsum("bhse,dhe->bshd", v.repeat_interleave(2, dim=1), w_o.view(d_model, 4, 8))
    wanted = torch.einsum("bshd,bsgd->bshg", f, f)
    torch.testing.assert_close(value_gram(v, w_o), wanted, rtol=1e-5, atol=1e-3)
    with torch.no_grad():  # every chunk of f then goes into the same memory
        torch.testing.assert_close(value_gram(v, w_o), wanted, rtol=1e-5, atol=1e-3)
    value_gram(v, w_o.requires_grad_()).sum().backward()
    assert w_o.grad.abs().sum() > 0


def drawn(dtype, n_src, seed=0):
    """Values, W_O and weights α at random, and in float64 their vectors f and the norms of α f."""
    torch.manual_seed(seed)
    v, w_o = torch.randn(1, 4, n_src, 16).to(dtype), torch.randn(64, 64).to(dtype)
    f = torch.einsum("bhse,dhe->bshd", v.double(), w_o.double().view(64, 4, 16))
    alpha = torch.rand(1, 4, 3, n_src)
    return v, w_o, alpha, f, torch.einsum("bhts,bshd->btsd", alpha.double(), f).norm(dim=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_src", [20, 200], ids=["by vectors", "by weights"])
def test_half_precision_is_summed_in_float32(dtype, n_src):
    """Norms within 1e-5 of those in float64 of the same numbers: nothing is rounded on the way."""
    v, w_o, alpha, _, wanted = drawn(dtype, n_src)
    got = norm_attention_sum(alpha, value_gram(v, w_o))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)


class TensorFloat32(TorchDispatchMode):
    """Products as a GPU takes them in TF32: factors rounded to 10 bits, sums in float32."""

    products: ClassVar[dict[str, slice]] = {
        "mm": slice(0, 2), "bmm": slice(0, 2), "addmm": slice(1, 3), "baddbmm": slice(1, 3),
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.n_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        factors = self.products.get(func._schema.name.removeprefix("aten::").rstrip("_"))
        if factors is not None:
            self.n_products += 1
            args = (*args[: factors.start], *map(self.rounded, args[factors]), *args[factors.stop :])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        """To the nearest, ties to even."""
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_src", [20, 200], ids=["by vectors", "by weights"])
def test_tf32_costs_a_thousandth_of_what_the_heads_write(dtype, n_src):
    for seed in range(5):
        v, w_o, alpha, f, wanted = drawn(dtype, n_src, seed)
        written = torch.einsum("bhts,bsh->bts", alpha.double(), f.norm(dim=-1))
        with torch.no_grad(), TensorFloat32() as mode:
            off = (norm_attention_sum(alpha, value_gram(v, w_o)) - wanted).abs() / written
        assert mode.n_products >= 3, "the products of values, of vectors, and of weights"
        assert 1e-5 < off.max() < 1e-3


def test_half_precision_is_exact_in_tf32():
    """So of its products only those of the vectors round."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(1000).to(dtype).float()
        assert torch.equal(TensorFloat32.rounded(x), x)
    x = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-20, -1 - 2.0**-10])
    assert TensorFloat32.rounded(x).tolist() == [1, 1 + 2.0**-9, 1 + 2.0**-10, -1 - 2.0**-10]


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_grouped_queries_cost_no_copies_of_their_values(kv_heads):
    """f takes d_head products for each of 8 query heads, whose W_O differ, whoever shares a value.

    By hand. (The counter does not see the Gram matrices, which are added up in place.)
    """
    n_src, n_heads, d_head, d_model = 20, 8, 4, 32
    v, w_o = torch.randn(1, kv_heads, n_src, d_head), torch.randn(d_model, n_heads * d_head)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        value_gram(v, w_o)
    assert counter.get_flop_counts()["Global"] == {torch.ops.aten.bmm: 2 * n_src * n_heads * d_head * d_model}


def test_norm_probes_of_one_read_share_the_gram(vlm, single, monkeypatch):
    calls = []
    counted = lambda *parts: calls.append(1) or value_gram(*parts)  # noqa: E731
    monkeypatch.setattr(gram_module, "value_gram", counted)
    one, both = mv.read(vlm, single, mv.NormAttention("last"), mv.NormAttention(("last", "last_image")))
    assert len(calls) == vlm.n_layers
    torch.testing.assert_close(one.norm[:, :, 0], both.norm[:, :, 0])


def test_destinations_by_name_and_number(vlm, single):
    by_name = mv.norm_attention(vlm, single, dst="last")
    by_number = mv.norm_attention(vlm, single, dst=single.tokens.last)
    assert torch.equal(by_name.norm, by_number.norm)
    with pytest.raises(ValueError, match="dst is empty"):
        mv.norm_attention(vlm, single, dst=())
    with pytest.raises(ValueError, match="nowhere"):
        mv.norm_attention(vlm, single, dst="nowhere")


def test_the_model_keeps_its_attention_implementation(vlm, single):
    config = part(vlm.hf, vlm.record.layers)[0].self_attn.config
    assert config._attn_implementation == "sdpa"
    mv.norm_attention(vlm, single)
    assert config._attn_implementation == "sdpa"


def test_rows_reach_to_the_furthest_examples_destination():
    assert norm_module.plan_of(torch.tensor([[1, 5], [3, 2]])).furthest == (3, 5)
