"""TransformerLens' habits: its short names, its `names_filter`, and where its methods are."""

import itertools

import pytest
import torch
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import get_act_name

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.vlm.habits import ALIASES, BRIDGE_METHODS, CACHE_METHODS, IN_ATTENTION, IN_MLP, TYPE_ALIASES, act_name
from mechvlm.vlm.hook_cache import Cache

OTHERS = ["embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "scale", "normalized", "pos_embed"]


@pytest.fixture(scope="module")
def cached(llava_vlm):
    return llava_vlm.run_with_cache(llava_vlm.inputs(noise_image(0), "what is this"))[1]


@pytest.fixture(scope="module")
def their_cache(cached):
    return cached.to_transformer_lens()


def test_short_names_are_transformer_lens_own():
    names = [*ALIASES, *IN_ATTENTION, *IN_MLP, *OTHERS]
    types = [None, "ln1", "ln2", *TYPE_ALIASES]
    for name, layer, layer_type in itertools.product(names, (None, 0, 5, 31), types):
        assert act_name(name, layer, layer_type) == get_act_name(name, layer, layer_type), (name, layer, layer_type)
    written = [
        f"{name}{layer}{kind}"
        for name in ("k", "pre", "scale", "attn", "key")
        for layer in (0, 12)
        for kind in ("", "a", "ln1")
    ]
    for name in [*written, "hook_embed", "blocks.3.attn.hook_q", "ln_final.hook_scale", "resid_post3"]:
        assert act_name(name) == get_act_name(name), name


@pytest.mark.parametrize(
    "key",
    [
        ("resid_post", 1), ("resid_post", -1), ("resid_pre", 0), ("pattern", 2), ("attn", -3), ("q", 1, "attn"), ("mlp_post", 1),
        ("scale", 1, "ln1"), ("scale", -2, "ln2"), ("scale",), ("embed",), "embed", "k2", "scale1ln2", "scale", "hook_embed",
        "blocks.1.attn.hook_z", ("attn_out", 1), ("mlp_out", 0), ("z", 0),
    ],
)  # fmt: skip
def test_keys_give_what_they_give_in_transformer_lens(cached, their_cache, key):
    assert torch.equal(cached[key], their_cache[key])
    assert key in cached


def test_a_layer_of_the_cache_is_the_accessors(llava_vlm, cached):
    """The last layer's state is what the final norm reads, whatever else was cached."""
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    _, few = llava_vlm.run_with_cache(inputs, names_filter="blocks.2.hook_resid_post")
    assert torch.equal(few["resid_post", -1], cached["blocks.2.hook_resid_post"])
    with torch.no_grad():
        out = llava_vlm.hf(**llava_vlm.encoding(inputs), output_hidden_states=True)
        normed = llava_vlm.final_norm._module(few["resid_post", -1])
    torch.testing.assert_close(normed, out.hidden_states[-1])


@pytest.mark.parametrize(
    ("key", "error", "words"),
    [
        (("resid_post", 3), IndexError, r"resid_post\[3\]: the decoder has layers 0 to 2"),
        (("resid_post", 1.0), TypeError, r"resid_post\[1\.0\]: give one layer"),
        ("resid_post", KeyError, r"hook_resid_post is not in .* It holds: .*blocks\.l\.hook_resid_post \(l = 0, 1, 2\)"),
        (("attn_scores", 1), KeyError, r"blocks\.1\.attn\.hook_attn_scores is not in this cache"),
        ("blocks.3.hook_resid_post", KeyError, r"blocks\.3\.hook_resid_post is not in this cache"),
    ],
)  # fmt: skip
def test_keys_that_are_not_there(cached, key, error, words):
    with pytest.raises(error, match=words):
        cached[key]


@pytest.mark.parametrize(
    "names_filter",
    ["blocks.1.hook_resid_post", ["hook_embed", "blocks.2.attn.hook_z"], lambda name: name.endswith("hook_pattern")],
)
def test_names_filter_keeps_what_the_bridges_keeps(llava_vlm, names_filter):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    _, cache = llava_vlm.run_with_cache(inputs, names_filter=names_filter)
    encoding = llava_vlm.encoding(inputs)
    with torch.no_grad():
        _, theirs = llava_vlm.bridge().run_with_cache(encoding.pop("input_ids"), names_filter=names_filter, **encoding)
    # The bridge's hook_embed is of words alone: a cache of ours holds the decoder's whole input.
    assert set(cache) == {name for name in theirs if name in cache}
    for name in set(cache) - {"hook_embed"}:
        torch.testing.assert_close(cache[name], theirs[name], rtol=0, atol=1e-5)


def public(kind: type) -> set[str]:
    """What a class offers beyond PyTorch's modules, without what nnsight hangs on every object."""
    return {name for name in dir(kind) if not name.startswith("_") and not hasattr(torch.nn.Module, name)} - {"save"}


def test_every_method_of_the_bridge_that_a_vlm_lacks_is_named():
    constructors = {
        "boot_native",
        "boot_tl_legacy",
        "boot_transformers",
        "check_model_support",
        "list_supported_models",
        "close",
    }
    instance = {"blocks", "cfg", "ln_final"}
    assert set(BRIDGE_METHODS) == public(TransformerBridge) - public(mv.VLM) - constructors - {"tokenizer"} | instance


@pytest.mark.parametrize(
    "name", ["run_with_hooks", "to_tokens", "to_string", "hook_points", "cfg", "all_head_labels", "blocks"]
)
def test_asking_a_vlm_for_them(llava_vlm, name):
    with pytest.raises(
        AttributeError, match=rf"no '{name}'; TransformerLens has it.*vlm\.bridge\(\)\.{name}, with"
    ) as error:
        getattr(llava_vlm, name)
    assert hasattr(llava_vlm.bridge(), name)
    assert BRIDGE_METHODS[name] in str(error.value)


def test_what_a_vlm_has_instead_is_there(llava_vlm):
    """Each expression that the errors name can be evaluated."""
    names = {"vlm": llava_vlm, "mv": mv, "image": noise_image(0), "prompt": "what is this", "word": "this"}
    names |= {
        "inputs": llava_vlm.inputs(names["image"], "what is this"),
        "ids": torch.tensor([300, 17]),
        "names_filter": "hook_embed",
    }
    for code in [
        "vlm.inputs(image, prompt).encoding['input_ids']", "list(vlm.run_with_cache(inputs)[1])",
        "vlm.run_with_cache(inputs, names_filter)", "vlm.answer_tokens(inputs, word)", "vlm.tokenizer.decode(ids)",
        "vlm.W_U[:, ids].T", "inputs.tokens.pos_of(word)", "vlm.layers", "(vlm.n_layers, vlm.d_model, vlm.config)",
        "vlm.final_norm", "(mv.ablate, mv.patch, mv.steer)", "vlm.generate(inputs)", "mv.Likelihood([1])",
    ]:  # fmt: skip
        assert eval(code, dict(names)) is not None, code


def test_another_name_that_a_vlm_lacks(llava_vlm):
    with pytest.raises(AttributeError, match=r"^A VLM has no 'resid_pst'\.$"):
        _ = llava_vlm.resid_pst
    assert not hasattr(llava_vlm, "__array__")


def test_an_error_inside_a_property_stays_itself(llava_vlm, monkeypatch):
    monkeypatch.setattr(mv.VLM, "device", property(lambda vlm: vlm.hf.no_such_part))
    with pytest.raises(AttributeError, match="no_such_part"):
        _ = llava_vlm.device


def test_every_method_of_their_cache_that_ours_lacks_is_named(cached, their_cache):
    ours = public(Cache) | {"activations", "bridge", "n_layers"}
    assert set(CACHE_METHODS) == (public(ActivationCache) | set(vars(their_cache))) - ours | {"to"}


@pytest.mark.parametrize(
    "name", ["accumulated_resid", "decompose_resid", "logit_attrs", "stack_head_results", "remove_batch_dim"]
)
def test_asking_a_cache_for_them(cached, their_cache, name):
    with pytest.raises(AttributeError, match=rf"no '{name}'.*cache\.to_transformer_lens\(\)\.{name}\.$"):
        getattr(cached, name)
    assert callable(getattr(their_cache, name))
    assert not hasattr(cached, "no_such_method")


def test_the_method_that_is_named_gives_the_naive_value(llava_vlm, cached, their_cache):
    """The accumulated residual stream is the states, one after the other, and the last one."""
    states = [cached["resid_pre", layer] for layer in range(3)] + [cached["resid_post", 2]]
    assert torch.equal(their_cache.accumulated_resid(), torch.stack(states))
