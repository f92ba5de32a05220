"""Names mean what TransformerLens means by them.

Accessors and weights are compared with a bridge that TransformerLens loads itself.
"""

import nnsight
import pytest
import torch
from torch.testing import assert_close

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava

HOOKS = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v",
    "pattern": "attn.hook_pattern", "z": "attn.hook_z",
}  # fmt: skip
ORDER = ["resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    from transformer_lens.model_bridge import TransformerBridge

    folder = tmp_path_factory.mktemp("model")
    hf, processor = llava()
    hf.save_pretrained(folder)
    processor.save_pretrained(folder)
    return mv.load(folder), TransformerBridge.boot_transformers(str(folder), dtype=torch.float32)


def test_accessors_equal_the_bridges_hooks(both):
    vlm, bridge = both
    inputs = vlm.inputs(noise_image(3), "what is this")
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(
            inputs.encoding["input_ids"], pixel_values=inputs.encoding["pixel_values"]
        )
        with vlm.trace(inputs):
            values = nnsight.save({})
            for layer in range(vlm.n_layers):
                for name in ORDER:
                    values[name, layer] = getattr(vlm, name)[layer].clone()
            values["logits"] = vlm.logits
    assert_close(values["logits"], logits, rtol=0, atol=1e-5)
    for layer in range(vlm.n_layers):
        for name, hook in HOOKS.items():
            theirs = cache[f"blocks.{layer}.{hook}"]
            assert_close(values[name, layer], theirs, rtol=0, atol=1e-5, msg=f"{name}[{layer}]")


def test_weights_equal_the_bridges(both):
    vlm, bridge = both
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        theirs = getattr(bridge.blocks[1].attn, name)
        assert_close(getattr(vlm, name)[1], theirs, rtol=0, atol=0)
    assert_close(vlm.W_U, bridge.W_U, rtol=0, atol=0)
    assert_close(vlm.W_E, bridge.W_E, rtol=0, atol=0)


def test_ov_and_qk_equal_the_bridges(both):
    vlm, bridge = both
    for layer in range(vlm.n_layers):
        assert_close(vlm.OV(layer).AB, bridge.OV[layer].AB, rtol=0, atol=1e-6)
        assert_close(vlm.QK(layer).AB, bridge.QK[layer].AB, rtol=0, atol=1e-6)


def test_ov_and_qk_of_grouped_queries_and_of_both_families(vlm):
    """Against the weights as Hugging Face keeps them, head by head."""
    attention = vlm.layers[1]._module.self_attn
    w_q, w_k, w_v = (getattr(attention, f"{x}_proj").weight.detach() for x in "qkv")
    w_o, d = attention.o_proj.weight.detach(), vlm.d_head
    ov, qk = vlm.OV(1), vlm.QK(-2)
    assert tuple(ov.shape) == tuple(qk.shape) == (vlm.n_heads, vlm.d_model, vlm.d_model)
    for head in range(vlm.n_heads):
        query, key = head * d, (head // (vlm.n_heads // vlm.n_kv_heads)) * d  # first rows
        by_hand = w_v[key : key + d].T @ w_o[:, query : query + d].T
        assert_close(ov.AB[head].detach(), by_hand, rtol=0, atol=1e-6)
        by_hand = w_q[query : query + d].T @ w_k[key : key + d]
        assert_close(qk.AB[head].detach(), by_hand, rtol=0, atol=1e-6)


def test_ov_of_a_layer_that_is_not_there(vlm):
    for circuit in (vlm.OV, vlm.QK):
        with pytest.raises(IndexError, match=rf"\[{vlm.n_layers}\]: the decoder has layers 0 to {vlm.n_layers - 1}"):
            circuit(vlm.n_layers)


def test_ov_is_what_a_head_writes(blip_vlm):
    """pattern @ (normed state @ OV) is a head's result: InstructBLIP has no bias."""
    vlm = blip_vlm
    _, cache = vlm.run_with_cache(vlm.inputs(noise_image(4), "describe the scene"))
    with torch.no_grad():
        normed = vlm.layers[1]._module.input_layernorm(cache["blocks.1.hook_resid_pre"])
        written = cache["blocks.1.attn.hook_pattern"] @ (normed[:, None] @ vlm.OV(1).AB)
        assert_close(written.sum(1), cache["blocks.1.hook_attn_out"], rtol=0, atol=1e-5)
