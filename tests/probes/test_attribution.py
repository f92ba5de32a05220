"""Logit attribution against Hugging Face's own logits.

The parts sum to the logit, and each one is its explicit vector through the unembedding.
"""

import copy

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from mechvlm.decoder.attention import attention_rows
from mechvlm.families.record import part
from mechvlm.inputs.batches import as_batches
from mechvlm.intervals import mean_interval
from mechvlm.probes.logit_attribution import LogitAttributionResult

A, B = 7, 421


def hf_logits(vlm, inputs):
    with torch.no_grad():
        return vlm.hf(**vlm.encoding(inputs)).logits[:, -1]


def activations(vlm, inputs):
    """Activations at the last position by PyTorch's own hooks, by (name, layer).

    Every layer's z, attention output and MLP output, the embeddings and the last state.
    """
    got, handles = {}, []
    for i, layer in enumerate(part(vlm.hf, vlm.record.layers)):
        for name, module, take in [
            ("z", layer.self_attn.o_proj, lambda args, out: args[0]),
            ("attn_out", layer.self_attn, lambda args, out: out[0]),
            ("mlp_out", layer.mlp, lambda args, out: out),
            ("norm1", layer.input_layernorm, lambda args, out: args[0]),
        ]:

            def keep(module, args, out, key=(name, i), take=take):
                got[key] = take(args, out)[:, -1]

            handles.append(module.register_forward_hook(keep))
    norm = part(vlm.hf, vlm.record.norm)
    handles.append(norm.register_forward_hook(lambda m, args, out: got.__setitem__("last", args[0][:, -1])))
    with torch.no_grad():
        vlm.hf(**vlm.encoding(inputs))
    for handle in handles:
        handle.remove()
    got["embed"] = got["norm1", 0]
    return got


@pytest.mark.parametrize("versus", [None, B])
def test_the_sum_is_hugging_faces_logit(vlm, batch, versus):
    """To 1e-4, on padded examples, with grouped queries and biases among the families."""
    got = mv.logit_attribution(vlm, batch, A, versus)
    logits = hf_logits(vlm, batch)
    expected = logits[:, A] - (0 if versus is None else logits[:, versus])
    torch.testing.assert_close(got.total, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.logit, expected, rtol=1e-4, atol=1e-5)
    assert (got.embed + got.heads.sum((0, 2)) + got.attn_bias.sum(0) + got.mlps.sum(0)).allclose(got.total)
    assert got.answers == vlm.to_str_tokens(torch.tensor([A] * 3))
    assert got.versus == (() if versus is None else vlm.to_str_tokens(torch.tensor([versus] * 3)))


def test_every_part_is_its_explicit_vector(vlm, batch):
    """As ActivationCache.logit_attrs of TransformerLens does it.

    The vector, scaled like the last state, times the direction.
    """
    tokens = [A, B, 9]
    got = mv.logit_attribution(vlm, batch, tokens, [B, A, 33])
    acts = activations(vlm, batch)
    norm, w_u = part(vlm.hf, vlm.record.norm), part(vlm.hf, vlm.record.unembed).weight
    rms = (acts["last"].pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    direction = w_u[tokens] - w_u[[B, A, 33]]

    def logits_of(vectors):
        return (vectors / rms * norm.weight * direction).sum(-1)

    with torch.no_grad():
        torch.testing.assert_close(got.embed, logits_of(acts["embed"]), rtol=1e-4, atol=1e-5)
        for layer, block in enumerate(part(vlm.hf, vlm.record.layers)):
            torch.testing.assert_close(got.mlps[layer], logits_of(acts["mlp_out", layer]), rtol=1e-4, atol=1e-5)
            written = torch.zeros_like(acts["embed"])
            for head in range(vlm.n_heads):
                columns = slice(head * vlm.d_head, (head + 1) * vlm.d_head)
                vector = acts["z", layer][:, columns] @ block.self_attn.o_proj.weight[:, columns].T
                torch.testing.assert_close(got.heads[layer, :, head], logits_of(vector), rtol=1e-4, atol=1e-5)
                written += vector
            bias = acts["attn_out", layer] - written
            torch.testing.assert_close(got.attn_bias[layer], logits_of(bias), rtol=1e-3, atol=1e-5)
            everything = logits_of(acts["attn_out", layer] + acts["mlp_out", layer])
            torch.testing.assert_close(got.layer_totals[layer], everything, rtol=1e-4, atol=1e-5)


def test_what_came_from_the_image_and_from_the_rest(vlm, batch):
    """Each head's output source by source, α v W_O.

    Summed over the image's positions, and over all others.
    """
    import nnsight

    got = mv.logit_attribution(vlm, batch, A)
    with torch.no_grad(), vlm.trace(batch):
        parts = nnsight.save([])
        for layer in range(vlm.n_layers):
            parts.append(vlm.attention[layer])
    norm, w_u = part(vlm.hf, vlm.record.norm), part(vlm.hf, vlm.record.unembed).weight
    last = activations(vlm, batch)["last"]
    u = norm.weight * w_u[A] / (last.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    for layer, attention in enumerate(parts):
        alpha = attention_rows(attention)[:, :, -1]
        v = attention.v.repeat_interleave(vlm.n_heads // attention.v.shape[1], dim=1)
        for i, tokens in enumerate(batch.token_maps):
            for head in range(vlm.n_heads):
                with torch.no_grad():
                    by_source = alpha[i, head] * (v[i, head] @ vlm.W_O[layer][head] @ u[i])
                rest = sorted({*range(len(tokens))} - {*tokens.image.tolist()})
                for value, where in ((got.from_image, tokens.image), (got.from_rest, rest)):
                    torch.testing.assert_close(value[layer, i, head], by_source[where].sum(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(got.from_image + got.from_rest, got.heads)
    assert (got.from_image - got.heads).abs().max() > 1e-4


def test_an_unembedding_with_a_bias():
    hf, processor = llava()
    hf = copy.deepcopy(hf)
    hf.lm_head.bias = torch.nn.Parameter(torch.randn(hf.lm_head.weight.shape[0]))
    vlm = mv.load(hf, processor, check=False)
    inputs = vlm.inputs(noise_image(0), "what is this")
    got = mv.logit_attribution(vlm, inputs, A, B)
    assert got.bias.item() == pytest.approx(float((hf.lm_head.bias[A] - hf.lm_head.bias[B]).detach()))
    logits = hf_logits(vlm, inputs)
    torch.testing.assert_close(got.total, logits[:, A] - logits[:, B], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_in_bfloat16_the_sum_is_off_by_the_models_own_rounding(seed):
    """The parts are summed in float32, but the logit is bfloat16's.

    They differ by the rounding of that logit.
    """
    hf, processor = llava(kv_heads=2, bias=True)
    whole = mv.load(hf, processor)
    half = mv.load(copy.deepcopy(hf).to(torch.bfloat16), processor)
    inputs = whole.inputs(noise_image(seed), "what is this")
    exact, got = (mv.logit_attribution(v, inputs, A, B) for v in (whole, half))
    assert got.heads.dtype == torch.float32
    scale = float(torch.cat([exact.heads.flatten(), exact.mlps.flatten(), exact.embed]).abs().max())
    rounding = (got.logit - exact.logit).abs()
    assert (got.total - got.logit).abs() < rounding + 0.01 * scale
    assert (got.heads - exact.heads).abs().max() < 0.01 * scale
    assert (got.mlps - exact.mlps).abs().max() < 0.01 * scale


def test_batches_and_other_probes_in_one_forward_change_nothing(vlm, batch):
    whole = mv.logit_attribution(vlm, batch, [A, B, 9], B + 1)
    singles = mv.logit_attribution(vlm, [batch[0], batch[1], batch[2]], [A, B, 9], B + 1)
    forwards = []
    handle = part(vlm.hf, vlm.record.norm).register_forward_hook(lambda *_: forwards.append(1))
    _, norms, shared = mv.read(
        vlm, batch, mv.LogitLens(k=1, states=[0]), mv.NormAttention(), mv.LogitAttribution([A, B, 9], B + 1)
    )
    handle.remove()
    # The forward's own norm, the lens at layer 0, and the attribution's last logits.
    assert len(forwards) == 1 + 2
    assert torch.equal(norms.norm, mv.norm_attention(vlm, batch).norm)
    for other in (singles, shared):
        assert (other.answers, other.versus) == (whole.answers, whole.versus)
        for name in ("embed", "heads", "from_image", "attn_bias", "mlps", "logit", "total"):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=1e-3, atol=1e-5)


def test_the_default_answer_is_the_models_own(vlm, batch):
    logits = hf_logits(vlm, batch)
    got = mv.logit_attribution(vlm, batch)
    best = logits.max(-1)
    assert got.answers == vlm.to_str_tokens(best.indices)
    torch.testing.assert_close(got.logit, best.values, rtol=1e-4, atol=1e-5)


def test_table_and_file(vlm, batch, tmp_path):
    got = mv.logit_attribution(vlm, batch, A)
    frame = got.to_frame()
    sums = frame.groupby("example")["value"].sum()
    np.testing.assert_allclose(sums, got.total, rtol=1e-4, atol=1e-5)
    row = frame[(frame.part == "head") & (frame.layer == 2) & (frame["head"] == 2) & (frame.example == 1)].iloc[0]
    assert row.value == pytest.approx(float(got.heads[2, 1, 2]))
    assert row.from_image == pytest.approx(float(got.from_image[2, 1, 2]))
    assert frame[frame.part == "mlp"].from_image.isna().all()
    assert set(frame[frame.part == "embed"].layer) == {-1}
    assert set(frame[frame.part == "mlp"].layer) == {0, 1, 2}
    got.save(tmp_path / "x.safetensors")
    loaded = LogitAttributionResult.load(tmp_path / "x.safetensors")
    assert torch.equal(loaded.heads, got.heads)
    assert loaded.answers == got.answers


def test_intervals_are_over_examples(vlm, batch):
    got = mv.logit_attribution(vlm, batch, A)
    for name, shape in (("heads", (3, 4)), ("from_rest", (3, 4)), ("layer_totals", (3,)), ("total", ())):
        mean, low, high = got.interval(name)
        values = getattr(got, name)
        torch.testing.assert_close(mean, values.mean(1 if shape else 0))
        assert mean.shape == low.shape == high.shape == shape
        assert ((low < mean) & (mean < high)).all()
    with pytest.raises(ValueError, match=r"no part 'head'\. Parts: heads, from_image"):
        got.interval("head")


def test_bad_answers_are_named(vlm, batch):
    with pytest.raises(mv.InputError, match=r"2 answers were given for 6 examples.*over all batches"):
        mv.logit_attribution(vlm, [batch, batch], ["a", "b"])
    with pytest.raises(ValueError, match=r"`versus` begin with the same token in these examples, \[\(1, '.*red'\)\]"):
        mv.logit_attribution(vlm, batch, ["what", "red", "is"], ["red", "red", "red"])
    with pytest.raises(mv.InputError, match=r"or a list of such batches, not str"):
        as_batches(["red"])
    with pytest.raises(mv.InputError, match="not an empty list"):
        as_batches([])
    with pytest.raises(mv.InputError, match="99999999 is no token id"):
        mv.logit_attribution(vlm, batch, 99999999)


def test_the_picture_shows_the_parts_with_their_intervals(vlm, batch, tmp_path):
    got = mv.logit_attribution(vlm, batch, A)
    figure = Figure((12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    assert got.plot(left) is left
    lines = {bars.get_label(): bars for bars in left.containers}
    assert list(lines) == ["embedding", "attention to the image", "attention to the rest", "MLP"]
    mean, low, high = mean_interval(got.mlps.T)
    line, _, (bars,) = lines["MLP"].lines
    np.testing.assert_allclose(line.get_ydata(), mean)
    assert np.rint(line.get_xdata()).tolist() == list(range(len(mean)))
    assert lines["embedding"].lines[0].get_xdata().tolist() == [-1]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, np.stack([low, high], 1), rtol=1e-5, atol=1e-7)
    assert "logits" in left.get_ylabel()
    (below,) = (ax for ax in figure.axes if ax.get_ylabel() == "head")
    assert "layer" in below.get_xlabel()
    (mesh,) = [
        c for a in figure.axes for c in a.collections if type(c).__name__ == "QuadMesh" and a.get_ylabel() == "head"
    ]
    # [head layer]
    np.testing.assert_allclose(mesh.get_array(), got.heads.mean(1).T, rtol=1e-5, atol=1e-8)
    assert mesh.get_coordinates()[0, :, 0].tolist() == [-0.5, 0.5, 1.5, 2.5], "layer 0 lies over 0"
    assert not right.containers
    assert left.get_position().x1 < right.get_position().x0, "drawn within the room of the given axes"
    figure.savefig(tmp_path / "x.png")
    alone = mv.logit_attribution(vlm, batch[0], A).plot(Figure().add_axes((0.2, 0.2, 0.6, 0.6)))
    assert not any(bars.has_yerr for bars in alone.containers), "one example has no interval"
