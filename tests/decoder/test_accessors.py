"""Accessors equal Hugging Face's own outputs, and assignments replace what they name."""

import nnsight
import pytest
import torch

from mechvlm.families.record import part

SITES = ["resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]


def read_all(vlm, inputs):
    """Every accessor at every layer, and the logits."""
    with torch.no_grad(), vlm.trace(inputs):
        got = nnsight.save({})
        for layer in range(vlm.n_layers):
            for site in SITES:
                got[site, layer] = getattr(vlm, site)[layer].clone()
        got["logits"] = vlm.logits
    return got


def eager(vlm, inputs):
    """Hugging Face's own forward, with eager attention so that it returns its weights."""
    text = part(vlm.hf, vlm.record.layers)[0].self_attn.config
    before = text._attn_implementation
    text._attn_implementation = "eager"
    try:
        with torch.no_grad():
            out = vlm.hf(**vlm.encoding(inputs), output_hidden_states=True, output_attentions=True)
    finally:
        text._attn_implementation = before
    return out.logits, getattr(out, "language_model_outputs", None) or out


def hooked(vlm, inputs):
    """The same activations by PyTorch's hooks, without nnsight."""
    got, handles = {}, []
    for i, layer in enumerate(part(vlm.hf, vlm.record.layers)):
        attention = layer.self_attn

        def keep(key, take):
            return lambda module, args, out: got.__setitem__(key, take(args, out))

        for name, module, take in [
            ("q", attention.q_proj, lambda args, out: out), ("k", attention.k_proj, lambda args, out: out),
            ("v", attention.v_proj, lambda args, out: out), ("z", attention.o_proj, lambda args, out: args[0]),
            ("attn_out", attention, lambda args, out: out[0]), ("mlp_out", layer.mlp, lambda args, out: out),
            ("resid_mid", layer.post_attention_layernorm, lambda args, out: args[0]),
        ]:  # fmt: skip
            handles.append(module.register_forward_hook(keep((name, i), take)))
    with torch.no_grad():
        vlm.hf(**vlm.encoding(inputs))
    for handle in handles:
        handle.remove()
    return got


def test_accessors_equal_hugging_face(vlm, batch):
    got = read_all(vlm, batch)
    with torch.no_grad():
        out = vlm.hf(**vlm.encoding(batch), output_hidden_states=True)
    hidden = (getattr(out, "language_model_outputs", None) or out).hidden_states
    torch.testing.assert_close(got["logits"], out.logits, rtol=0, atol=0)
    for layer in range(vlm.n_layers):
        assert torch.equal(got["resid_pre", layer], hidden[layer])
        if layer + 1 < vlm.n_layers:  # the last hidden state is normed
            assert torch.equal(got["resid_post", layer], hidden[layer + 1])


def test_parts_equal_plain_hooks(vlm, batch):
    got, ref = read_all(vlm, batch), hooked(vlm, batch)
    for (name, layer), value in ref.items():
        assert torch.equal(got[name, layer].flatten(2), value.flatten(2)), (name, layer)


def test_pattern_equals_eager_attention(vlm, batch):
    got = read_all(vlm, batch)
    _, ref = eager(vlm, batch)
    real = batch.encoding["attention_mask"].bool()
    for layer in range(vlm.n_layers):
        # Rows of padding mean nothing in any implementation.
        pattern, expected = (x.transpose(1, 2)[real] for x in (got["pattern", layer], ref.attentions[layer]))
        torch.testing.assert_close(pattern, expected, rtol=0, atol=1e-6)


def test_pattern_rows_are_rows_of_the_pattern(vlm, batch):
    last = [m.last for m in batch.token_maps]
    with torch.no_grad(), vlm.trace(batch):
        shared = nnsight.save(vlm.pattern[1, [-1, last[0] - 2]])
        by_example = nnsight.save(vlm.pattern[2, torch.tensor([[p] for p in last])])
    full = read_all(vlm, batch)
    torch.testing.assert_close(shared, full["pattern", 1][:, :, [last[0], last[0] - 2]], rtol=0, atol=1e-6)
    torch.testing.assert_close(by_example, full["pattern", 2][:, :, [last[0]]], rtol=0, atol=1e-6)


def test_residual_stream_is_the_sum_of_what_was_written(vlm, batch):
    got = read_all(vlm, batch)
    total = got["resid_pre", 0]
    for layer in range(vlm.n_layers):
        total = total + got["attn_out", layer]
        assert torch.equal(total, got["resid_mid", layer])
        total = total + got["mlp_out", layer]
        assert torch.equal(total, got["resid_post", layer])


def test_weights_rebuild_the_activations(vlm, single):
    got = read_all(vlm, single)
    block = part(vlm.hf, vlm.record.layers)[1]
    x = block.input_layernorm(got["resid_pre", 1])
    repeat = vlm.n_heads // vlm.n_kv_heads
    for name, weights in (("q", vlm.W_Q), ("k", vlm.W_K), ("v", vlm.W_V)):
        assert weights[1].shape == (vlm.n_heads, vlm.d_model, vlm.d_head)
        rebuilt = torch.einsum("bpd,hde->bphe", x, weights[1])
        bias = getattr(block.self_attn, f"{name}_proj").bias
        expected = got[name, 1] if name == "q" else got[name, 1].repeat_interleave(repeat, 2)
        if bias is not None:
            b = bias.view(-1, vlm.d_head)
            rebuilt = rebuilt + (b if name == "q" else b.repeat_interleave(repeat, 0))
        torch.testing.assert_close(rebuilt, expected, rtol=0, atol=1e-5)
    out = torch.einsum("bphe,hed->bpd", got["z", 1], vlm.W_O[1])
    if block.self_attn.o_proj.bias is not None:
        out = out + block.self_attn.o_proj.bias
    torch.testing.assert_close(out, got["attn_out", 1], rtol=0, atol=1e-5)
    ids = single.encoding["input_ids"]
    text = single.tokens.text
    assert torch.equal(vlm.W_E[ids[0, text]], got["resid_pre", 0][0, text])
    assert vlm.W_U.shape == (vlm.d_model, vlm.d_vocab)


@pytest.mark.parametrize("site", [*SITES, "logits"])
def test_assigning_what_is_there_changes_nothing(vlm, batch, site):
    got = read_all(vlm, batch)
    with torch.no_grad(), vlm.trace(batch):
        if site == "logits":
            vlm.logits = got["logits"]
        else:
            getattr(vlm, site)[1] = got[site, 1]
        logits = nnsight.save(vlm.logits)
    real = batch.encoding["attention_mask"].bool()
    # Only a pattern is recomputed. Everything else is bit for bit the same.
    torch.testing.assert_close(logits[real], got["logits"][real], rtol=0, atol=1e-5 if site == "pattern" else 0)


@pytest.mark.parametrize("site", SITES)
def test_an_assignment_changes_the_rest_of_its_forward_and_no_other(vlm, single, site):
    before = read_all(vlm, single)
    with torch.no_grad(), vlm.trace(single):
        getattr(vlm, site)[1] = torch.zeros_like(before[site, 1])
        after = nnsight.save({})
        after["resid_post"] = vlm.resid_post[1].clone()
        after["logits"] = vlm.logits
    expected = {
        "mlp_out": before["resid_mid", 1],
        "resid_post": torch.zeros_like(before["resid_post", 1]),
    }
    if site in expected:
        assert torch.equal(after["resid_post"], expected[site])
    if site == "resid_mid":  # the zero state plus the MLP's output for it
        layer = part(vlm.hf, vlm.record.layers)[1]
        with torch.no_grad():
            mlp_of_zeros = layer.mlp(layer.post_attention_layernorm(torch.zeros_like(before["resid_mid", 1])))
        assert torch.equal(after["resid_post"], mlp_of_zeros)
    assert not torch.allclose(after["logits"], before["logits"])
    assert torch.equal(read_all(vlm, single)["logits"], before["logits"])


def test_a_pattern_of_one_source_writes_its_value(vlm, single):
    with torch.no_grad(), vlm.trace(single):
        n = vlm.resid_pre[0].shape[1]
        onto_first = torch.zeros(1, vlm.n_heads, n, n)
        onto_first[..., 0] = 1
        v = nnsight.save(vlm.v[0])
        vlm.pattern[0] = onto_first
        z = nnsight.save(vlm.z[0])
    expected = v[:, :1].repeat_interleave(vlm.n_heads // vlm.n_kv_heads, 2).expand_as(z)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-6)


def test_resid_mid_is_replaced_in_place_and_a_clone_keeps_its_values(vlm, single):
    with torch.no_grad(), vlm.trace(single):
        clean = nnsight.save(vlm.resid_mid[1].clone())
        vlm.resid_mid[1] = clean * 2
        changed = nnsight.save(vlm.resid_mid[1])
    assert torch.equal(changed, clean * 2)


def test_gradients_pass_through_an_assignment(vlm, single):
    """d logit / d state of a state read as `resid_mid * 1` equals the finite difference."""
    with vlm.trace(single):
        state = vlm.resid_mid[1] * 1
        nnsight.save(state)
        vlm.resid_mid[1] = state
        logit = nnsight.save(vlm.logits[0, -1, 5])
    (grad,) = torch.autograd.grad(logit, state)
    assert grad.abs().sum() > 0
    direction = torch.randn(state.shape, generator=torch.Generator().manual_seed(0))
    shifted_logits = []
    for sign in (1, -1):
        with torch.no_grad(), vlm.trace(single):
            vlm.resid_mid[1] = state.detach() + sign * 1e-2 * direction
            shifted_logits.append(nnsight.save(vlm.logits[0, -1, 5]))
    slope = (shifted_logits[0] - shifted_logits[1]) / 2e-2
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=2e-2, atol=1e-4)


def test_layers_out_of_range_are_named(vlm, single):
    with pytest.raises(IndexError, match=r"W_V\[3\]: the decoder has layers 0 to 2"):
        vlm.W_V[3]
    with pytest.raises(IndexError, match=r"resid_post\[7\]"):
        vlm.resid_post[7]


def test_padding_does_not_move_an_example(vlm, batch):
    """A padded example reads as it does alone: left padding only shifts its positions."""
    got = read_all(vlm, batch)
    for row, tokens in enumerate(batch.token_maps):
        alone = read_all(vlm, vlm.inputs(batch.images[row][0], batch.prompts[row]))
        real = tokens.all
        for site in ("resid_post", "attn_out", "mlp_out"):
            torch.testing.assert_close(got[site, 2][row, real], alone[site, 2][0], rtol=0, atol=2e-5)


def test_generation_equals_hugging_face(vlm, single):
    with torch.no_grad():
        out = vlm.hf.generate(**vlm.encoding(single), max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = vlm.tokenizer.decode(out[0, len(single.tokens) :], skip_special_tokens=True).strip()
    assert vlm.generate(single, max_new_tokens=4) == [expected]
