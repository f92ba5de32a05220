"""Habits from TransformerLens: its short names, and where its methods are here.

The lists below are held to TransformerLens by `tests/vlm/test_habits.py`: importing it takes
seconds, too long for a short name or an error.
"""

import re

ALIASES = {
    "attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v", "mlp_pre": "pre",
    "mlp_mid": "mid", "mlp_post": "post",
}  # fmt: skip
TYPE_ALIASES = {"a": "attn", "m": "mlp", "b": "", "block": "", "blocks": "", "attention": "attn"}
IN_ATTENTION = ("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores")
IN_MLP = ("pre", "post", "mid", "pre_linear")


def act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """A hook's full name by its short one, as TransformerLens' `get_act_name` gives it.

    >>> act_name("resid_post", 5), act_name("k6"), act_name("scale4ln1")
    ('blocks.5.hook_resid_post', 'blocks.6.attn.hook_k', 'blocks.4.ln1.hook_scale')
    """
    if ("." in name or name.startswith("hook_")) and layer is None and layer_type is None:
        return name
    if match := re.match(r"([a-z]+)(\d+)([a-z]?.*)", name):
        name, layer, layer_type = match.groups()
    name = ALIASES.get(name, name)
    if name in IN_ATTENTION:
        layer_type = "attn"
    elif name in IN_MLP:
        layer_type = "mlp"
    else:
        layer_type = TYPE_ALIASES.get(layer_type or "", layer_type)
    block = "" if layer is None else f"blocks.{layer}."
    final = "ln_final." if name in ("scale", "normalized") and layer is None else ""
    return f"{final}{block}{layer_type + '.' if layer_type else ''}hook_{name}"


CACHE_METHODS = (
    "accumulated_resid", "apply_ln_to_stack", "apply_slice_to_batch_dim", "cache_dict", "compute_head_results",
    "compute_ssm_effective_attention", "compute_ssm_state", "decompose_resid", "get_full_resid_decomposition",
    "get_neuron_results", "has_batch_dim", "has_embed", "has_pos_embed", "logit_attrs", "logit_lens", "model",
    "remove_batch_dim", "ssm_layers", "stack_activation", "stack_head_results", "stack_neuron_results", "to", "toggle_autodiff",
)  # fmt: skip
"""What TransformerLens' `ActivationCache` has, and a `Cache` has not."""

_HOOKED = (
    "Here a trace does it: `with vlm.trace(inputs):`, and in it vlm.resid_post[5] = ..., mv.ablate, mv.patch, mv.steer"
)
_TOKENS = "Here vlm.inputs(image, prompt) makes the tokens, inputs.encoding['input_ids']"
BRIDGE_METHODS = {
    **dict.fromkeys(("run_with_hooks", "add_hook", "add_perma_hook", "add_caching_hooks", "hooks", "reset_hooks"), _HOOKED),
    **dict.fromkeys(("check_hooks_to_add", "remove_all_hook_fns", "clear_contexts", "clear_hook_registry"), _HOOKED),
    **dict.fromkeys(("to_tokens", "prepare_multimodal_inputs", "input_to_embed"), _TOKENS),
    **dict.fromkeys(
        ("hook_dict", "hook_points", "list_hooks", "mod_dict", "hook_aliases", "get_hook_point", "block_hooks"),
        "Here the names are those of a cache, list(vlm.run_with_cache(inputs)[1])",
    ),
    **dict.fromkeys(("cache_all", "cache_some", "get_caching_hooks"), "Here it is vlm.run_with_cache(inputs, names_filter)"),
    **dict.fromkeys(("to_single_token", "to_single_str_token"), "Here it is vlm.answer_tokens(inputs, word)"),
    **dict.fromkeys(("generate_stream", "hf_generate", "diffusion_generate"), "Here it is vlm.generate(inputs)"),
    "to_string": "Here it is vlm.tokenizer.decode(ids)",
    "tokens_to_residual_directions": "Here it is vlm.W_U[:, ids].T",
    "get_token_position": "Here it is inputs.tokens.pos_of(word)",
    "loss_fn": "Here mv.read(vlm, inputs, mv.Likelihood(lengths)) gives log-probabilities",
    "blocks": "Here it is vlm.layers",
    "cfg": "Here the sizes are vlm.n_layers, vlm.d_model, ..., and all else is vlm.config",
    "ln_final": "Here it is vlm.final_norm",
    **dict.fromkeys(
        (
            "OV_for_attn_layers", "QK_for_attn_layers", "W_E_pos", "W_gate", "W_in", "W_out", "W_pos", "accumulated_bias",
            "all_composition_scores", "all_head_labels", "attn_head_labels", "b_K", "b_O", "b_Q", "b_U", "b_V", "b_in", "b_out",
            "block_submodules", "blocks_with", "composition_layer_indices", "enable_compatibility_mode", "encoder_output",
            "get_params", "init_weights", "layer_types", "mps", "n_params_total", "original_model", "predict_next_sentence",
            "process_weights", "set_use_attn_in", "set_use_attn_result", "set_use_hook_mlp_in", "set_use_split_qkv_input",
            "stack_params_for", "tl_named_parameters", "tl_parameters", "to_sentence_pair_tokens",
        ),
        "",
    ),
}  # fmt: skip
"""What TransformerLens' `TransformerBridge` has and a `VLM` has not, and what a VLM has instead."""


def missing_in_vlm(name: str) -> str:
    """The words of an AttributeError about a VLM."""
    if name not in BRIDGE_METHODS:
        return f"A VLM has no {name!r}."
    here = f" {BRIDGE_METHODS[name]}." if BRIDGE_METHODS[name] else ""
    return (
        f"A VLM has no {name!r}; TransformerLens has it, on the same weights: vlm.bridge().{name}, with what "
        f"vlm.encoding(inputs) holds.{here}"
    )


def missing_in_cache(name: str) -> str:
    """The words of an AttributeError about a cache."""
    if name not in CACHE_METHODS:
        return f"A cache has no {name!r}."
    return f"This cache has no {name!r}; TransformerLens' own has it: cache.to_transformer_lens().{name}."
