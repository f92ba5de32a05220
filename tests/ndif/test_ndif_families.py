"""On a real NDIF server, families with other layers and inputs: each gives the same as here.

What is read here is held to Hugging Face's own forward elsewhere (`helpers.every_method`). These
families have what LLaVA and InstructBLIP lack: pixels as rows of patches and positions of three
axes (Qwen2.5-VL), tiles (InternVL, LLaVA-OneVision), norms after attention and MLP, queries and
keys that are normed, and an image that sees all of itself (Gemma 3).
"""

from types import SimpleNamespace

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.ndif import difference

pytestmark = pytest.mark.ndif

FAMILIES = ("qwen2_5_vl", "llava_onevision", "internvl", "gemma3")
SIZES = ((60, 44), (44, 60), (100, 30))
WITHIN = 1e-4
"""Of the largest entry. States of these random models reach some tens."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, server, tmp_path_factory):
    """A tiny model of a family, on the server and here, and a padded batch of three examples."""
    folder = tmp_path_factory.mktemp(request.param)
    hf, processor = families.build(request.param)
    hf.save_pretrained(folder)
    processor.save_pretrained(folder)
    there, here = mv.load(folder, remote=True), mv.load(folder)
    images = [families.picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    inputs = there.inputs(images, ["what is this", "hi", "the cup and"])
    assert inputs.token_maps[1].modality[0] == mv.Modality.PADDING
    return SimpleNamespace(there=there, here=here, inputs=inputs)


def every_activation(vlm, inputs):
    """All accessors at every layer, in one trace."""
    with torch.no_grad(), vlm.trace(inputs):
        got = nnsight.save([])
        for layer in range(vlm.n_layers):
            got.append(vlm.resid_pre[layer].clone())
            for heads in (vlm.q, vlm.k, vlm.v, vlm.pattern, vlm.z, vlm.attn_out):
                got.append(heads[layer])
            got.append(vlm.resid_mid[layer].clone())
            got.append(vlm.mlp_out[layer])
            got.append(vlm.resid_post[layer])
        got.append(vlm.logits)
    return got


def every_assignment(vlm, inputs):
    """Each site is read and replaced, layer by layer."""
    image = inputs.token_maps[0].image
    with torch.no_grad(), vlm.trace(inputs):
        got = nnsight.save([])
        for heads in (vlm.q, vlm.k, vlm.v):
            new = heads[0].clone()
            new[:, :, 0] = 0
            heads[0] = new
        pattern = vlm.pattern[0]
        vlm.pattern[0] = (pattern + 1 / pattern.shape[-1]) / 2
        got.append(vlm.resid_post[0].clone())
        for site in ("resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"):
            got.append(getattr(vlm, site)[1].clone())
            mv.ablate(vlm, image[:5], 1, at=site)
        got.append(vlm.resid_pre[2].clone())
        vlm.logits = vlm.logits + 1
        got.append(vlm.logits)
    return got


def knocked_out(vlm, inputs):
    with torch.no_grad(), vlm.trace(inputs):
        # Gemma's first layers see a window of 8: the last image tokens, from the token after them.
        images = [tokens.image for tokens in inputs.token_maps]
        mv.knock_out(vlm, src=images, dst=[tokens.image[-1:] + 1 for tokens in inputs.token_maps], layers=[0, 2])
        weights = nnsight.save(vlm.pattern[2, [inputs.token_maps[0].last]])
        logits = nnsight.save(vlm.logits[:, -1])
    return weights, logits


def patched(vlm, inputs):
    _, cache = vlm.run_with_cache(inputs, ["blocks.1.hook_resid_post"])
    with torch.no_grad(), vlm.trace(inputs):
        mv.steer(vlm, vlm.W_U[:, 7], inputs.token_maps[0].last, layers=0)
        mv.patch(vlm, cache["blocks.1.hook_resid_post"].flip(0), inputs.token_maps[0].question, layers=1)
        logits = nnsight.save(vlm.logits[:, -1])
    return logits


def probes(vlm, inputs):
    return mv.read(
        vlm, inputs, mv.LogitLens(k=4), mv.Contextualization(), mv.NormAttention(), mv.NormAttention(dst="all pairs"),
        mv.LogitAttribution(77),
    )  # fmt: skip


def cached(vlm, inputs):
    logits, cache = vlm.run_with_cache(inputs)
    return [logits, *cache.values()]


WORK = {
    "activations": (1, every_activation),
    "assignments": (1, every_assignment),
    "knockout": (1, knocked_out),
    "patching and steering": (2, patched),
    "probes": (1, probes),
    "run_with_cache": (1, cached),
    "information flow": (1, lambda vlm, inputs: mv.information_flow(vlm, inputs, 77, window=1)),
    "causal trace": (1, lambda vlm, inputs: mv.causal_trace(vlm, inputs, 77, corrupt="blank", window=1)),
    "generate": (1, lambda vlm, inputs: vlm.generate(inputs, max_new_tokens=5)),
}
CHANGES = ("knockout", "patching and steering")


IN_SANDBOX = {"qwen2_5_vl": WORK, "gemma3": WORK, "llava_onevision": ("activations",), "internvl": ("activations",)}
"""What is run in a sandbox too: there an activation comes from the same code in all families."""
CASES = [
    (family, user, name)
    for family in FAMILIES
    for user in ("trusted", "sandbox")
    for name in (WORK if user == "trusted" else IN_SANDBOX[family])
]


@pytest.mark.parametrize(("family", "user", "name"), CASES, indirect=["family", "user"])
def test_it_is_the_same_as_here(family, user, traffic, name):
    requests, work = WORK[name]
    there = work(family.there, family.inputs)
    assert traffic.requests == requests
    here = work(family.here, family.inputs)
    assert difference(there, here) <= WITHIN * largest(here)
    if name in CHANGES:
        with torch.no_grad(), family.there.trace(family.inputs):
            clean = nnsight.save(family.there.logits[:, -1])
        assert (there[-1] - clean).abs().max() > 1e-2


def test_a_derived_record_serves_where_no_weights_are(server, user, tmp_path):
    """Phi-3's fused matrices are in no list: its record comes from where its weights are."""
    hf, processor = families.build("llava_phi3")
    hf.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(mv.ModelError, match=r"has no record.*remote=True, record=vlm\.record"):
        mv.load(tmp_path, remote=True)
    here = mv.load(tmp_path)
    there = mv.load(tmp_path, remote=True, record=here.record)
    inputs = there.inputs(families.picture(60, 44, seed=0), "what is this")
    expected = every_activation(here, inputs)
    assert difference(every_activation(there, inputs), expected) <= WITHIN * largest(expected)


def largest(result) -> float:
    """The largest number in what a test compares."""
    if isinstance(result, torch.Tensor):
        return float(result.float().nan_to_num(neginf=0).abs().max()) if result.numel() else 0.0
    values = (
        result if isinstance(result, list | tuple) else vars(result).values() if hasattr(result, "__dict__") else []
    )
    return max([1.0, *(largest(value) for value in values)])
