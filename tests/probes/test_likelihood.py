"""Log-likelihoods are as exact in bfloat16 as the states are: the readout runs in float32."""

import copy

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import instructblip, llava
from mechvlm.datasets.scenes import scenes

CAPTION = "a red circle above a blue square on the sand"


@pytest.mark.parametrize("family", [lambda: llava(kv_heads=2, bias=True), instructblip])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_readout_is_float32s(family, dtype):
    hf, processor = family()
    vlm = mv.load(copy.deepcopy(hf).to(dtype), processor)
    inputs, (n,) = vlm.answered(vlm.inputs(noise_image(0), "what is this"), [CAPTION])
    logprob = mv.read(vlm, inputs, mv.Likelihood((n,)))[0].logprob[0]
    with torch.no_grad(), vlm.trace(inputs):
        resid = nnsight.save(vlm.resid_post[-1])
    # The formula in float64, of the very states that the model computed.
    x = resid[0, -n - 1 : -1].double()
    g, eps = vlm.final_norm.weight.double(), vlm.norm_eps
    logits = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * g @ vlm.W_U.double()
    by_hand = logits.log_softmax(-1).gather(-1, inputs.encoding["input_ids"][0, -n:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), by_hand, rtol=1e-5, atol=1e-5)


def test_float32_is_the_models_own(llava_vlm):
    inputs, (n,) = llava_vlm.answered(llava_vlm.inputs(noise_image(0), "what is this"), [CAPTION])
    logprob = mv.read(llava_vlm, inputs, mv.Likelihood((n,)))[0].logprob[0]
    with torch.no_grad():
        own = llava_vlm.hf(**llava_vlm.encoding(inputs)).logits[0, -n - 1 : -1].log_softmax(-1)
    own = own.gather(-1, inputs.encoding["input_ids"][0, -n:, None])[:, 0]
    torch.testing.assert_close(logprob, own, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_scores_of_the_bundled_model_in_bfloat16():
    """On twenty captions log-likelihoods are off by the states' rounding, not by the logits'."""
    whole, half = (mv.load("tiny-llava", dtype=dtype) for dtype in ("float32", "bfloat16"))
    examples = list(scenes(20))
    images, captions = [e.image for e in examples], [e.captions[0] for e in examples]
    exact, got = (mv.caption_logprob(vlm, images, captions) for vlm in (whole, half))
    inputs, n_tokens = half.answered(half.inputs(images, "Describe the scene."), captions)
    with torch.no_grad():
        rounded = half.hf(**half.encoding(inputs)).logits.float().log_softmax(-1)
    ids = inputs.encoding["input_ids"]
    before = torch.stack([rounded[i, -n - 1 : -1].gather(-1, ids[i, -n:, None]).sum() for i, n in enumerate(n_tokens)])
    assert (got - exact).abs().mean() < 0.7 * (before - exact).abs().mean()
