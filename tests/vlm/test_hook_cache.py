"""`vlm.run_with_cache`: activations under TransformerLens' names, from one forward.

The methods of its `ActivationCache` are compared with sums by hand.
"""

from dataclasses import FrozenInstanceError

import nnsight
import pytest
import torch
from torch import einsum
from torch.testing import assert_close

from mechvlm.decoder.accessors import PatternAccessor
from mechvlm.families.record import part
from mechvlm.vlm.hook_cache import BLOCK_HOOKS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def cached(vlm, batch):
    return vlm.run_with_cache(batch)


@pytest.fixture(scope="module")
def their_cache(cached):
    """TransformerLens' own cache of the same activations."""
    return cached[1].to_transformer_lens()


def test_names_mean_the_accessors_in_the_order_of_the_forward(vlm, batch, cached):
    logits, cache = cached
    expected = ["hook_embed"]
    for layer in range(vlm.n_layers):
        expected += [f"blocks.{layer}.{hook}" for hook in BLOCK_HOOKS]
    assert list(cache) == [*expected, "ln_final.hook_scale"]
    assert len(cache) == len(expected) + 1
    with torch.no_grad(), vlm.trace(batch):
        values = nnsight.save({})
        for layer in range(vlm.n_layers):
            for site in ["resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]:
                values[site, layer] = getattr(vlm, site)[layer].clone()
    for (site, layer), value in values.items():
        inner = "attn." if site in ("q", "k", "v", "z", "pattern") else ""
        assert torch.equal(cache[f"blocks.{layer}.{inner}hook_{site}"], value), site
    with torch.no_grad():
        out = vlm.hf(**vlm.encoding(batch), output_hidden_states=True)
    assert torch.equal(logits, out.logits)
    hidden = getattr(out, "language_model_outputs", out).hidden_states
    assert torch.equal(cache["hook_embed"], hidden[0])
    assert torch.equal(cache["blocks.0.hook_resid_post"], hidden[1])


def test_scales_are_what_the_norms_divide_by(vlm, cached):
    _, cache = cached
    layer = vlm.layers[1]._module
    norms = {
        "blocks.1.ln1": (layer.input_layernorm, "blocks.1.hook_resid_pre"),
        "blocks.1.ln2": (layer.post_attention_layernorm, "blocks.1.hook_resid_mid"),
        "ln_final": (vlm.final_norm._module, f"blocks.{vlm.n_layers - 1}.hook_resid_post"),
    }
    for name, (norm, resid) in norms.items():
        with torch.no_grad():
            assert_close(cache[resid] / cache[f"{name}.hook_scale"] * norm.weight, norm(cache[resid]), **CLOSE)


def test_only_the_wanted_names_are_read_by_one_forward(vlm, batch, monkeypatch):
    def refuse(self, index):
        raise AssertionError("the pattern was read")

    monkeypatch.setattr(PatternAccessor, "__getitem__", refuse)
    forwards = []
    handle = vlm.hf.register_forward_hook(lambda *_: forwards.append(1))
    try:
        _, cache = vlm.run_with_cache(batch, "blocks.1.hook_resid_post")
        assert list(cache) == ["blocks.1.hook_resid_post"]
        _, cache = vlm.run_with_cache(batch, ["ln_final.hook_scale", "blocks.2.attn.hook_z", "blocks.0.hook_mlp_out"])
        assert list(cache) == ["blocks.0.hook_mlp_out", "blocks.2.attn.hook_z", "ln_final.hook_scale"]
        _, cache = vlm.run_with_cache(batch, lambda name: name.endswith("resid_mid"))
        assert list(cache) == [f"blocks.{layer}.hook_resid_mid" for layer in range(vlm.n_layers)]
    finally:
        handle.remove()
    assert len(forwards) == 3
    assert not any(value.requires_grad for value in cache.values())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("blocks.9.hook_resid_post", r"no activation named 'blocks\.9\.hook_resid_post'.*l = 0 to 2.*blocks\.l\.hook_resid_pre"),
        (["hook_embed", "resid_post"], "no activation named 'resid_post'"),
        ([], "No name was asked for.*hook_embed, ln_final.hook_scale"),
        (lambda name: "vision" in name, "takes none of them"),
    ],
)  # fmt: skip
def test_names_that_are_not_there(llava_vlm, names, message):
    inputs = llava_vlm.inputs(_gray(), "a")
    with pytest.raises(ValueError, match=message):
        llava_vlm.run_with_cache(inputs, names)


def test_the_cache_is_read_only_and_says_what_it_holds(llava_vlm):
    _, cache = llava_vlm.run_with_cache(llava_vlm.inputs(_gray(), "a"), "hook_embed")
    with pytest.raises(TypeError):
        cache["hook_embed"] = torch.zeros(1)
    with pytest.raises(FrozenInstanceError):
        cache.activations = {}
    with pytest.raises(KeyError, match="It holds: hook_embed"):
        cache["blocks.0.hook_mlp_out"]
    assert "blocks.0.hook_mlp_out" not in cache


def test_decompose_resid_sums_to_the_state(vlm, cached, their_cache):
    _, cache = cached
    last = vlm.n_layers - 1
    parts, labels = their_cache.decompose_resid(return_labels=True)
    assert labels[:3] == ["embed", "0_attn_out", "0_mlp_out"]
    assert len(labels) == 1 + 2 * vlm.n_layers
    assert_close(parts.sum(0), cache[f"blocks.{last}.hook_resid_post"], **CLOSE)
    assert_close(their_cache.decompose_resid(layer=1).sum(0), cache["blocks.1.hook_resid_pre"], **CLOSE)
    assert_close(their_cache.decompose_resid(layer=1, mlp_input=True).sum(0), cache["blocks.1.hook_resid_mid"], **CLOSE)


def test_accumulated_resid_is_the_logit_lens(vlm, cached, their_cache):
    logits, cache = cached
    states, labels = their_cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels[:3] == ["0_pre", "0_mid", "1_pre"]
    assert torch.equal(states[1], cache["blocks.0.hook_resid_mid"])
    normed = their_cache.accumulated_resid(apply_ln=True)
    assert_close(normed[-1] @ their_cache.model.W_U, logits, **CLOSE)
    with torch.no_grad():
        by_hand = part(vlm.hf, vlm.record.unembed)(vlm.final_norm._module(cache["blocks.1.hook_resid_pre"]))
    assert_close(normed[1] @ their_cache.model.W_U, by_hand, **CLOSE)


def test_stack_head_results_is_z_times_w_o(vlm, cached, their_cache):
    _, cache = cached
    heads, labels = their_cache.stack_head_results(return_labels=True)
    assert labels[vlm.n_heads + 1] == "L1H1"
    by_hand = [
        cache[f"blocks.{layer}.attn.hook_z"][:, :, head] @ vlm.W_O[layer][head]
        for layer in range(vlm.n_layers)
        for head in range(vlm.n_heads)
    ]
    assert_close(heads, torch.stack(by_hand), **CLOSE)
    bias = vlm.layers[0]._module.self_attn.o_proj.bias
    first = heads[: vlm.n_heads].sum(0) + (0 if bias is None else bias)
    assert_close(first, cache["blocks.0.hook_attn_out"], **CLOSE)
    whole = their_cache.stack_head_results(incl_remainder=True)
    assert_close(whole.sum(0), cache[f"blocks.{vlm.n_layers - 1}.hook_resid_post"], **CLOSE)


def test_logit_attrs_sum_to_the_logit_and_to_the_difference(vlm, batch, cached, their_cache):
    logits, cache = cached
    parts = their_cache.decompose_resid()
    # One token; a difference of two; one token per example. All include the final norm's weight.
    assert_close(their_cache.logit_attrs(parts, tokens=300).sum(0), logits[..., 300], **CLOSE)
    difference = logits[..., 300] - logits[..., 17]
    assert_close(their_cache.logit_attrs(parts, tokens=300, incorrect_tokens=17).sum(0), difference, **CLOSE)
    answers = torch.tensor([5, 300, 17])
    at_last = their_cache.logit_attrs(parts[:, :, -1], tokens=answers, pos_slice=-1)
    assert_close(at_last.sum(0), logits[torch.arange(3), -1, answers], **CLOSE)
    # One component by hand: (mlp_out / scale * norm weight) . unembedding.
    norm = vlm.final_norm._module.weight.detach()
    mlp = cache["blocks.1.hook_mlp_out"] / cache["ln_final.hook_scale"]
    by_hand = einsum("bpd,d,d->bp", mlp, norm, vlm.W_U[:, 300].detach())
    assert_close(their_cache.logit_attrs(parts, tokens=300)[4], by_hand, **CLOSE)


def test_apply_ln_to_stack_divides_by_the_cached_scale(cached, their_cache):
    _, cache = cached
    stack = their_cache.decompose_resid(layer=2)
    assert_close(their_cache.apply_ln_to_stack(stack, layer=2), stack / cache["blocks.2.ln1.hook_scale"], **CLOSE)
    mid = their_cache.apply_ln_to_stack(stack, layer=1, mlp_input=True)
    assert_close(mid, stack / cache["blocks.1.ln2.hook_scale"], **CLOSE)


def test_neurons_and_the_full_decomposition_sum_to_the_state(vlm, cached, their_cache):
    _, cache = cached
    neurons = their_cache.get_neuron_results(1)
    assert_close(neurons.sum(-2), cache["blocks.1.hook_mlp_out"], **CLOSE)
    down = vlm.layers[1]._module.mlp.down_proj.weight.detach()
    assert_close(neurons[..., 7, :], cache["blocks.1.mlp.hook_post"][..., 7, None] * down[:, 7], **CLOSE)
    final = cache[f"blocks.{vlm.n_layers - 1}.hook_resid_post"]
    parts, labels = their_cache.get_full_resid_decomposition(expand_neurons=True, return_labels=True)
    assert {"L0H0", "L2N63", "embed", "bias"} <= set(labels)
    assert_close(parts.sum(0), final, **CLOSE)


def test_short_forms_and_the_one_call_logit_lens(cached, their_cache):
    logits, cache = cached
    assert their_cache["resid_post", 1] is cache["blocks.1.hook_resid_post"]
    assert their_cache["resid_post", -1] is cache["blocks.2.hook_resid_post"]
    assert their_cache["pattern", 0] is cache["blocks.0.attn.hook_pattern"]
    assert their_cache["scale", 1, "ln2"] is cache["blocks.1.ln2.hook_scale"]
    assert their_cache.stack_activation("mlp_out").shape == (3, *cache["blocks.0.hook_mlp_out"].shape)
    whole = their_cache.logit_lens(targets=[300, 17], return_type="logits")
    assert_close(whole.values[-1], logits[:, -1, [300, 17]], **CLOSE)


def test_to_transformer_lens_changes_neither_cache_nor_weights(vlm, batch, cached, their_cache):
    logits, cache = cached
    their_cache.compute_head_results()  # adds to TransformerLens' cache
    assert "blocks.0.attn.hook_result" not in cache
    again, _ = vlm.run_with_cache(batch, "hook_embed")
    assert torch.equal(again, logits)
    # W_U is a copy, with the norm folded into it; other weights are shared.
    assert their_cache.model.W_U.data_ptr() != vlm.W_U.data_ptr()
    assert their_cache.model.blocks[0].mlp.W_out.untyped_storage().data_ptr() == (
        vlm.layers[0]._module.mlp.down_proj.weight.untyped_storage().data_ptr()
    )


def test_single_example_without_batch_dim(vlm, single):
    logits, cache = vlm.run_with_cache(single)
    their_cache = cache.to_transformer_lens().remove_batch_dim()
    assert their_cache["resid_post", 0].shape == cache["blocks.0.hook_resid_post"].shape[1:]
    parts = their_cache.decompose_resid()
    assert_close(their_cache.logit_attrs(parts, tokens=9, has_batch_dim=False).sum(0), logits[0, :, 9], **CLOSE)


def test_a_partial_cache_says_what_a_method_lacks(vlm, batch):
    _, cache = vlm.run_with_cache(batch, lambda name: "hook_resid" in name)
    their_cache = cache.to_transformer_lens()
    assert their_cache.accumulated_resid().shape[0] == vlm.n_layers + 1
    with pytest.raises(KeyError, match="hook_attn_out"):
        their_cache.decompose_resid()


def _gray():
    from PIL import Image

    return Image.new("RGB", (40, 40), "gray")
