"""Layers whose writes go through a norm or a factor, or whose activations are flat."""

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers import families


@pytest.mark.parametrize("name", ["gemma3", "llava_gemma2", "llava_granite"])
def test_what_a_head_writes_is_no_product_of_its_weights(name):
    """A norm after the attention (Gemma), or a factor (Granite): W_V W_O is not what is added."""
    vlm = mv.load(*families.build(name))
    with pytest.raises(mv.ModelError, match=r"stands a norm, a factor or a gate.*no product with W_V W_O"):
        vlm.OV(1)
    if name == "gemma3":
        with pytest.raises(mv.ModelError, match=r"norms its queries and keys \(q_norm, k_norm\)"):
            vlm.QK(1)
    assert vlm.W_O[1].shape == (vlm.n_heads, vlm.layer_parts[1].d_head, vlm.d_model)


def test_reading_norms_waits_for_no_number(monkeypatch):
    """On a GPU each `bool(tensor)` waits. What Gemma's norms are is asked at the first read."""
    waits = {}
    for name in ("llava", "gemma3"):
        vlm = mv.load(*families.build(name))
        inputs = vlm.inputs(families.picture(60, 44, seed=0), "what")
        mv.norm_attention(vlm, inputs)
        calls = []
        with monkeypatch.context() as patched:
            ask = torch.Tensor.__bool__
            patched.setattr(torch.Tensor, "__bool__", lambda x, ask=ask, calls=calls: calls.append(1) or ask(x))
            assert not torch.zeros(1)
            mv.norm_attention(vlm, inputs)
        waits[name] = len(calls)
    assert waits["gemma3"] <= waits["llava"]


def test_a_model_that_is_loaded_again_has_one_hook_a_layer():
    """OPT's layers flatten their activations: a hook keeps how many examples there are."""
    hf, processor = families.build("blip2_opt")
    before = sum(len(m._forward_pre_hooks) for m in hf.modules())
    for _ in range(3):
        vlm = mv.load(hf, processor)
        assert sum(len(m._forward_pre_hooks) for m in hf.modules()) == before + vlm.n_layers
    inputs = vlm.inputs([families.picture(60, 44, seed=0)] * 2, ["what", "hi"])
    with torch.no_grad(), vlm.trace(inputs):
        mid = nnsight.save(vlm.resid_mid[1].clone())
    assert mid.shape == (2, len(inputs.token_maps[0]), vlm.d_model)
