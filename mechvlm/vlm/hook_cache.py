"""Activations under TransformerLens' hook names, from one forward: `VLM.run_with_cache`."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import nnsight
import torch
from torch import Tensor

from mechvlm.decoder.decoder import Decoder
from mechvlm.decoder.mistakes import layer_number
from mechvlm.decoder.norms import rms
from mechvlm.inputs.batch import Inputs
from mechvlm.vlm.habits import act_name, missing_in_cache

Names = str | Sequence[str] | Callable[[str], bool] | None

# A block's hooks in the order in which the model computes them. "hook_" is followed by the name of
# an accessor, except for scale and post.
BLOCK_HOOKS = (
    "hook_resid_pre", "ln1.hook_scale", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "attn.hook_z",
    "hook_attn_out", "hook_resid_mid", "ln2.hook_scale", "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip


MEMORY_PATTERN = "cross_attn.hook_pattern"


@dataclass(frozen=True)
class Cache(Mapping[str, Tensor]):
    """Activations of one forward by TransformerLens hook name: a read-only mapping.

    Names stand in the order of the forward. Shapes as `VLM` gives them, in the model's dtype:

    - residual stream and outputs: [batch pos d_model]
    - `hook_q`, `hook_z`: [batch pos head d_head]
    - `hook_k`, `hook_v`: [batch pos kv_head d_head]
    - `hook_pattern`: [batch head dest src]
    - `hook_post`: [batch pos d_mlp]
    - `hook_scale`: [batch pos 1], in float32
    - in layers that read an image's memory, `cross_attn.` stands for `attn.`, and `hook_k`,
      `hook_v` are [batch memory kv_head d_head], `hook_pattern` [batch head dest memory]

    Rows of padding mean nothing. Short names are TransformerLens' too:

        cache["resid_post", 5], cache["pattern", -1], cache["scale", 2, "ln1"], cache["k6"]
    """

    activations: dict[str, Tensor] = field(repr=False)
    n_layers: int = field(repr=False)
    """The decoder's, so that layers count from the end too."""
    bridge: Callable[[], Any] = field(repr=False)
    """Makes a TransformerLens bridge on the model's weights, the final norm folded into `W_U`."""

    def __getitem__(self, name: str | tuple) -> Tensor:
        full = name if isinstance(name, str) else self._with_layer(*name)
        full = full if full in self.activations else act_name(full)
        if full not in self.activations:
            raise KeyError(f"{full} is not in this cache. It holds: {', '.join(_by_layers(self.activations))}.")
        return self.activations[full]

    def __getattr__(self, name: str):
        raise AttributeError(missing_in_cache(name))

    def __deepcopy__(self, memo: dict) -> "Cache":
        return replace(self, activations=copy.deepcopy(self.activations, memo))  # of the same model

    def _with_layer(self, name: str, layer: Any = None, layer_type: str | None = None) -> str:
        number = None if layer is None else layer_number(name, layer, self.n_layers) % self.n_layers
        return act_name(name, number, layer_type)

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    def to_transformer_lens(self):
        """TransformerLens' `ActivationCache` of the same tensors, for its methods.

        Among them are `decompose_resid`, `accumulated_resid`, `stack_head_results`, `logit_attrs`
        and `cache["resid_post", 3]`. A method needs the activations that it works on: cache all
        names (the default), or those that its error asks for.

        Its `model` is a bridge of its own on the VLM's weights, with the final norm's weight folded
        into `W_U`: the methods take directions from `W_U`, and would otherwise miss that weight.
        """
        from transformer_lens import ActivationCache

        return ActivationCache(dict(self.activations), self.bridge())


def _by_layers(names: Iterable[str]) -> list[str]:
    """Names for a message, those of one hook in several layers as one."""
    layers: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".", 2)
        hook, layer = (f"blocks.l.{parts[2]}", parts[1]) if parts[0] == "blocks" else (name, "")
        layers.setdefault(hook, []).append(layer)
    return [hook if numbers == [""] else f"{hook} (l = {', '.join(numbers)})" for hook, numbers in layers.items()]


def hook_readers(vlm: Decoder) -> dict[str, Callable[[], Tensor]]:
    """Functions that read the hooks inside a trace, by hook name, in the order of the forward.

    A layer that lacks a part has no such hook. A function reads by `vlm` alone: it runs on NDIF's
    server with the decoder that is there, and what else it holds would be this machine's.
    """
    eps, centres = vlm.norm_eps, vlm.record.norm_centres

    def reader(hook: str, layer: int) -> Callable[[], Tensor]:
        match hook:
            case "ln1.hook_scale":
                return lambda: rms(vlm.resid_pre[layer], eps, centres)
            case "ln2.hook_scale":
                return lambda: rms(vlm.resid_mid[layer], eps, centres)
            case "mlp.hook_post":
                return lambda: vlm.layer_parts[layer].read_neurons()
            case _:
                site = "memory_pattern" if hook == MEMORY_PATTERN else hook.split("hook_")[1]
                return lambda: getattr(vlm, site)[layer]

    # The decoder's whole input: the words' embeddings, with the image's features in their places.
    readers: dict[str, Callable[[], Tensor]] = {"hook_embed": lambda: vlm.resid_pre[0]}
    for layer in range(vlm.n_layers):
        readers |= {f"blocks.{layer}.{hook}": reader(hook, layer) for hook in _hooks_of(vlm, layer)}
    readers["ln_final.hook_scale"] = lambda: rms(vlm.resid_post[-1], eps, centres)
    return readers


NEEDS = {
    "hook_q": "q_proj", "hook_k": "k_proj", "hook_v": "v_proj", "hook_z": "attention", "hook_pattern": "attention",
    "hook_attn_out": "attn_out", "hook_resid_mid": "mid_norm", "hook_mlp_out": "mlp_out", "hook_post": "down_proj",
}  # fmt: skip
"""The part of a layer's kind without which it lacks a hook."""


def _hooks_of(vlm: Decoder, layer: int) -> list[str]:
    """The hooks of `BLOCK_HOOKS` that one layer has."""
    block, norm = vlm.layer_parts[layer], type(vlm.final_norm._module)
    kind = block.kind
    norms = {name for name, module in block.envoy._module.named_children() if type(module) is norm}
    lacking = {hook for hook, needed in NEEDS.items() if getattr(kind, needed) is None}
    if not norms - {kind.mid_norm, kind.attn_out, kind.mlp_out} and not (kind.mid_norm is None and norms):
        lacking.add("ln1.hook_scale")  # the attention reads the state as it is
    if kind.mid_norm not in norms:
        lacking.add("ln2.hook_scale")
    hooks = [hook for hook in BLOCK_HOOKS if hook not in lacking and hook.split(".")[-1] not in lacking]
    return [hook.replace("attn.hook", "cross_attn.hook") for hook in hooks] if kind.memory else hooks


def run_with_cache(vlm: Decoder, inputs: Inputs, names: Names = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and chosen activations by hook name, from one forward; see `VLM.run_with_cache`."""
    readers = hook_readers(vlm)
    wanted = _wanted_names(names, readers, vlm)
    with torch.no_grad(), vlm.trace(inputs):
        activations = nnsight.save({})
        for name, read in readers.items():
            if name in wanted:
                activations[name] = read()
        logits = nnsight.save(vlm.logits)
    return logits, activations


def _wanted_names(names: Names, readers: Mapping[str, Any], vlm: Decoder) -> set[str]:
    if names is None:
        return set(readers)
    block_names = ", ".join(f"blocks.l.{hook}" for hook in BLOCK_HOOKS)
    known = f"hook_embed, ln_final.hook_scale, and for l = 0 to {vlm.n_layers - 1} {block_names}"
    if vlm.memory_layers:
        known += f" (in layers {', '.join(map(str, vlm.memory_layers))} cross_attn for attn)"
    wanted = {n for n in readers if names(n)} if callable(names) else {names} if isinstance(names, str) else set(names)
    if unknown := sorted(wanted - readers.keys(), key=str):
        raise ValueError(f"There is no activation named {', '.join(map(repr, unknown))}. There are: {known}.")
    if not wanted:
        raise ValueError(f"No name was asked for, or the filter takes none of them. There are: {known}.")
    return wanted
