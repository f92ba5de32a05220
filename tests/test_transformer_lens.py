"""The names mean what TransformerLens means by them: every accessor equals the bridge's hook, on LLaVA."""

import nnsight
import pytest
import torch
from conftest import noise_image
from models import llava

import mechvlm as mv

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
            got = nnsight.save({})
            for layer in range(vlm.n_layers):
                for name in ORDER:
                    got[name, layer] = getattr(vlm, name)[layer].clone()
            got["logits"] = vlm.logits
    torch.testing.assert_close(got["logits"], logits, rtol=0, atol=1e-5)
    for layer in range(vlm.n_layers):
        for name, hook in HOOKS.items():
            theirs = cache[f"blocks.{layer}.{hook}"]
            torch.testing.assert_close(got[name, layer], theirs, rtol=0, atol=1e-5, msg=f"{name}[{layer}]")


def test_weights_equal_the_bridges(both):
    vlm, bridge = both
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        theirs = getattr(bridge.blocks[1].attn, name)
        torch.testing.assert_close(getattr(vlm, name)[1], theirs, rtol=0, atol=0)
    torch.testing.assert_close(vlm.W_U, bridge.W_U, rtol=0, atol=0)
    torch.testing.assert_close(vlm.W_E, bridge.W_E, rtol=0, atol=0)
