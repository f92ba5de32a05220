"""Reweighted attention: the formula on the weights of the model's own forward, and its effect."""

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.forwards import forward
from helpers.images import noise_image
from helpers.models import llava
from mechvlm.tracing.interventions import knock_out
from mechvlm.tracing.reweighting import reweight


@pytest.fixture(params=["sdpa", "eager"])
def attention(request, vlm):
    vlm.hf.set_attn_implementation(request.param)
    yield request.param
    vlm.hf.set_attn_implementation("sdpa")


def weights_and_values(vlm, inputs, layer, change=lambda: None):
    """Weights [batch head dest src] and values that a layer's heads read, and their outputs z."""
    with torch.no_grad(), vlm.trace(inputs):
        change()
        parts = vlm.attention[layer]
        v = nnsight.save(parts.v.clone())
        pattern = nnsight.save(vlm.pattern[layer])
        z = nnsight.save(vlm.z[layer].clone())
    return pattern, v.repeat_interleave(pattern.shape[1] // v.shape[1], 1), z


def naive(weights, src, scale, temperature):
    """One row of weights [src], changed by hand."""
    new = [float(w) ** (1 / temperature) * (scale if s in src else 1) for s, w in enumerate(weights)]
    return torch.tensor([w / sum(new) for w in new])


def hold(vlm, inputs, layer, src, dst, heads, scale, temperature):
    """The rows of `dst` are the formula's, all others as they were, and z reads by them."""
    sources = None if src is None else src
    before, v, z_before = weights_and_values(vlm, inputs, layer)
    after, _, z = weights_and_values(
        vlm, inputs, layer, lambda: reweight(vlm, sources, dst, layer, heads, scale, temperature)
    )
    want = before.clone()
    for head in range(before.shape[1]) if heads is None else heads:
        for d in dst:
            want[0, head, d] = naive(before[0, head, d], [] if src is None else src, scale, temperature)
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(z, (want @ v).transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert (z[0, dst] - z_before[0, dst]).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("scale", "temperature", "heads"), [(2.5, 1.0, None), (0.3, 1.0, [0, 3]), (3.0, 0.7, None), (1.0, 2.0, [2])]
)
def test_weights_are_those_of_the_formula(vlm, single, attention, scale, temperature, heads):
    tokens = single.tokens
    src = None if scale == 1 else tokens.image[:5].tolist()
    hold(vlm, single, 1, src, [tokens.last - 1, tokens.last], heads, scale, temperature)


@pytest.mark.parametrize("name", ["paligemma2", "llava_mistral", "gemma3"])
@pytest.mark.families
def test_caps_and_sliding_windows(name):
    hf, processor = families.build(name)
    vlm = mv.load(hf, processor)
    inputs = vlm.inputs(families.picture(60, 44, seed=0), "what is this")
    last = inputs.tokens.last
    for layer in range(vlm.n_layers):
        near = [last - 2, last - 1]  # inside of every window
        hold(vlm, inputs, layer, near, [last], None, 2.5, 1.0)
        hold(vlm, inputs, layer, near, [last], [1], 0.4, 0.6)
    if name == "llava_mistral":  # a window of 8 in every layer
        with pytest.raises(ValueError, match="no destination attends to any of these sources"):
            forward(vlm, inputs, lambda: reweight(vlm, inputs.tokens.image[0], last, 1, scale=2.0))


@pytest.mark.families
def test_sinks_keep_their_score():
    """With a sink the row and its sink are the softmax; a temperature is refused."""
    hf, processor = families.build("llava_gpt_oss")
    vlm = mv.load(hf, processor)
    inputs = vlm.inputs(families.picture(60, 44, seed=0), "what is this")
    last = inputs.tokens.last
    src = [last - 2, last - 1]
    before, v, _ = weights_and_values(vlm, inputs, 1)
    after, _, z = weights_and_values(vlm, inputs, 1, lambda: reweight(vlm, src, last, 1, scale=3.0))
    new = before[0, :, last].clone()
    sink = 1 - new.sum(-1, keepdim=True)
    assert sink.min() > 1e-3
    new[:, src] *= 3
    new = new / (new.sum(-1, keepdim=True) + sink)
    torch.testing.assert_close(after[0, :, last], new, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(z[0, last], torch.einsum("hs,hse->he", new, v[0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="this attention has sinks"):
        forward(vlm, inputs, lambda: reweight(vlm, None, last, 1, temperature=2.0))


def test_every_row_carries_its_own(vlm, batch):
    maps = batch.token_maps
    src, dst = [maps[0].image, None, maps[2].image[:2]], [maps[0].last, None, [maps[2].last]]
    clean = forward(vlm, batch)
    got = forward(vlm, batch, lambda: reweight(vlm, src, dst, range(vlm.n_layers), scale=4.0))
    for row in range(3):
        alone = [s if i == row else None for i, s in enumerate(src)]
        if src[row] is None:
            torch.testing.assert_close(got[row, maps[row].all], clean[row, maps[row].all], rtol=1e-5, atol=1e-5)
            continue
        want = forward(vlm, batch, lambda s=alone: reweight(vlm, s, dst, range(vlm.n_layers), scale=4.0))
        torch.testing.assert_close(got[row, maps[row].all], want[row, maps[row].all], rtol=1e-5, atol=1e-5)
        assert (got[row, -1] - clean[row, -1]).abs().max() > 1e-5


def test_a_scale_of_0_is_a_knockout(vlm, single, attention):
    tokens, layers = single.tokens, range(vlm.n_layers)
    for heads in (None, [1]):
        knocked = forward(vlm, single, lambda h=heads: knock_out(vlm, tokens.image, tokens.last, layers, h))
        got = forward(vlm, single, lambda h=heads: reweight(vlm, tokens.image, tokens.last, layers, h, scale=0))
        torch.testing.assert_close(got, knocked, rtol=1e-5, atol=1e-6)


def test_a_sharp_temperature_leaves_the_largest_weight(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    last = inputs.tokens.last
    before, v, _ = weights_and_values(llava_vlm, inputs, 1)
    after, _, z = weights_and_values(llava_vlm, inputs, 1, lambda: reweight(llava_vlm, None, last, 1, temperature=1e-5))
    best = before[0, :, last].argmax(-1)
    assert torch.equal(after[0, :, last].argmax(-1), best)
    torch.testing.assert_close(z[0, last], v[0, torch.arange(4), best], rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_the_model_in_half_precision():
    model, processor = llava.__wrapped__()
    vlm = mv.load(model.to(torch.bfloat16), processor)
    inputs = vlm.inputs(noise_image(3), "what is this")
    tokens = inputs.tokens
    before, _, _ = weights_and_values(vlm, inputs, 1)
    after, _, z = weights_and_values(vlm, inputs, 1, lambda: reweight(vlm, tokens.image, tokens.last, 1, scale=2.0))
    assert z.dtype == torch.bfloat16
    image = before[0, :, -1, tokens.image].float().sum(-1)
    torch.testing.assert_close(
        after[0, :, -1, tokens.image].float().sum(-1), 2 * image / (1 + image), rtol=3e-2, atol=0
    )


@pytest.mark.parametrize(
    ("src", "dst", "options", "error", "says"),
    [
        ([2], 5, {"scale": 1.0}, ValueError, "scale=1 and temperature=1 has no effect"),
        ([2], 5, {"scale": -1}, ValueError, "a scale of 0 or more and a temperature above 0, not -1 and 1.0"),
        ([2], 5, {"scale": float("nan")}, ValueError, "not nan and 1.0"),
        ([2], 5, {"scale": 2, "temperature": 0}, ValueError, "not 2 and 0"),
        ([2], 5, {"temperature": 2.0}, ValueError, "`src` is what the scale is on, and scale=1.0 came with it"),
        (None, 5, {"scale": 2.0}, ValueError, "scale=2.0 came without it"),
        ([5], 3, {"scale": 2.0}, ValueError, r"example 0: src \[5\], dst \[3\] has no effect"),
        (range(6), 5, {"scale": 0}, ValueError, "leaves a destination nothing to attend to"),
        ([2], 5, {"scale": 2.0, "heads": [4]}, IndexError, r"heads: \[4\] was asked for; there are 0 to 3"),
        ([2], 5, {"scale": 2.0, "layers": 9}, IndexError, r"layers \[9\] were asked for"),
        ([99], 5, {"scale": 2.0}, IndexError, r"src: \[99\] was asked for"),
        ([], 5, {"scale": 2.0}, ValueError, "src is empty"),
    ],
)
def test_bad_reweighting_is_refused(vlm, single, src, dst, options, error, says):
    with pytest.raises(error, match=says):
        forward(vlm, single, lambda: reweight(vlm, src, dst, **{"layers": 1} | options))


def test_attention_without_a_mask_is_refused(single, vlm):
    vlm.config.text_config._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(ValueError, match="reweight needs an attention that takes a mask"):
            forward(vlm, single, lambda: reweight(vlm, 2, 5, 1, scale=2.0))
    finally:
        vlm.hf.set_attn_implementation("sdpa")
