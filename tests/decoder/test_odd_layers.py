"""Layers that add with a factor, flatten their activations, or get features from outside."""

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.families.parts import IMAGE
from mechvlm.families.record import part


def batch_of(vlm: mv.VLM) -> mv.Inputs:
    """Two examples of different sizes and lengths."""
    images = [families.picture(60, 44, seed=0), families.picture(44, 60, seed=1)]
    return vlm.inputs(images, ["what is this", "a"])


def test_what_is_assigned_to_a_layer_with_a_factor_is_added_as_it_is():
    """Granite adds 0.22 of what its modules return."""
    vlm = mv.load(*families.build("llava_granite"))
    inputs = batch_of(vlm)
    assert vlm.record.kind(1).scale == pytest.approx(0.22)
    with torch.no_grad(), vlm.trace(inputs):
        pre = nnsight.save(vlm.resid_pre[1].clone())
        attn_out = nnsight.save(3 * vlm.attn_out[1])
        vlm.attn_out[1] = attn_out
        mid = nnsight.save(vlm.resid_mid[1].clone())
        mlp_out = nnsight.save(-2 * vlm.mlp_out[1])
        vlm.mlp_out[1] = mlp_out
        post = nnsight.save(vlm.resid_post[1].clone())
    torch.testing.assert_close(mid, pre + attn_out)
    torch.testing.assert_close(post, mid + mlp_out)


def test_a_head_of_a_layer_with_a_factor_or_a_norm_has_no_ov():
    for name in ("llava_granite", "gemma3"):
        with pytest.raises(mv.ModelError, match="stands a norm, a factor or a gate"):
            mv.load(*families.build(name), check=False).OV(1)


def test_flat_activations_of_a_batch_are_each_examples_own():
    """OPT runs its MLP on [batch * pos, d_model]."""
    vlm = mv.load(*families.build("blip2_opt"))
    inputs = batch_of(vlm)
    assert vlm.record.kind(1).flat
    with torch.no_grad(), vlm.trace(inputs):
        parts = nnsight.save([vlm.resid_pre[1].clone(), vlm.attn_out[1].clone(), vlm.resid_mid[1].clone()])
        parts += [vlm.mlp_out[1].clone(), vlm.resid_post[1].clone()]
    pre, attn_out, mid, mlp_out, post = parts
    assert mid.shape == mlp_out.shape == pre.shape
    assert len(pre) == 2
    torch.testing.assert_close(mid, pre + attn_out)
    torch.testing.assert_close(post, mid + mlp_out)


def test_a_state_is_read_before_features_are_added_to_it():
    """Qwen3-VL adds image features to what its first layers return."""
    hf, processor = families.build("qwen3_vl")
    vlm = mv.load(hf, processor)
    assert vlm.record.adds_between
    inputs = vlm.inputs(families.picture(60, 44, seed=0), "what is this")
    with torch.no_grad(), vlm.trace(inputs):
        post = nnsight.save(vlm.resid_post[0])
        nxt = nnsight.save(vlm.resid_pre[1])
    returned = []
    layer = part(hf, vlm.record.layers)[0]
    hook = layer.register_forward_hook(lambda _, args, out: returned.append(out.clone()))
    with torch.no_grad():
        hf(**vlm.encoding(inputs))
    hook.remove()
    torch.testing.assert_close(post, returned[0])
    image = inputs.encoding["input_ids"] == IMAGE
    torch.testing.assert_close(nxt[~image], post[~image])
    assert (nxt - post)[image].abs().max() > 1e-2
