"""Weights that modules compute with, by layer and head; and whether this process holds any.

A module may compute with another weight than the one that it shows: an adapter adds to it (peft),
or it is kept in 4 or 8 bits (bitsandbytes, torchao). `weight_and_bias` is the one home of the
weight that counts. The libraries themselves compute it, when it is read; nothing of it is kept.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechvlm.decoder.mistakes import layer_number
from mechvlm.errors import ModelError

DEQUANTIZED = ("bitsandbytes", "torchao")
"""Packages of quantized weights that this file turns into plain ones."""

ADDITIONAL = ("additional_fc", "additional_embedding")
"""Where Idefics keeps the last rows of its unembedding and its embedding: the tokens it added."""


def has_weights(envoy: Any) -> bool:
    """Whether this process holds the module's weight: not on NDIF's clients, nor in its sandbox."""
    weight = getattr(envoy, "weight", None)
    return weight is not None and weight.device.type != "meta"


def package_of(thing: Any) -> str:
    """The package in which the class of a module or a tensor is written: "torch", "peft", ..."""
    return type(thing).__module__.split(".")[0]


def weight_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias that a module computes with: adapters included, dequantized.

    Args:
        module: a linear module, an embedding or a norm, or nnsight's envoy of one.

    Returns:
        (weight, bias): the module's own parameters where it is a plain one, else new tensors
        without gradients. The bias is None where there is none.

    Raises:
        ModelError: for an adapter or a quantization that has no such weight.
    """
    module = getattr(module, "_module", module)
    if package_of(module) == "peft":
        with torch.no_grad():
            return _adapted(module)
    weight, bias = module.weight, getattr(module, "bias", None)
    if more := [getattr(module, name) for name in ADDITIONAL if getattr(module, name, None) is not None]:
        weight = torch.cat([weight, more[0].weight])
        bias = None if bias is None else torch.cat([bias, more[0].bias])
    if package_of(weight) not in DEQUANTIZED:
        return weight, bias
    with torch.no_grad():
        return _dequantized(module).to(_dtype_of(module)), bias


def is_plain(module: Any) -> bool:
    """Whether a module computes with the parameters that it shows, as they are."""
    module = getattr(module, "_module", module)
    return package_of(module) != "peft" and package_of(getattr(module, "weight", None)) not in DEQUANTIZED


def _dequantized(module: Any) -> Tensor:
    if package_of(module.weight) == "torchao":
        return module.weight.dequantize()
    if module.weight.dtype.is_floating_point and getattr(module.weight, "quant_state", None) is None:
        raise ModelError(
            "The weights of this bitsandbytes module are not quantized yet: move the model to its device first, model.to(...)."
        )
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ModelError(
            "bitsandbytes has packed the 4-bit weights of this model for the CPU, in its first forward, and packed ones cannot "
            "be read exactly. Load the model again, and give it to mechvlm.load before it runs."
        )
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(module.weight, getattr(module, "state", None))


def _dtype_of(module: Any) -> torch.dtype:
    """The dtype in which a quantized module computes."""
    dtype = getattr(module, "compute_dtype", None) or module.weight.dtype
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def _adapted(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a module that peft wraps, with the active adapters in them."""
    if hasattr(module, "original_module"):  # a module that was trained whole
        return weight_and_bias(_trained(module))
    if hasattr(module, "ln_tuning_layers"):
        active = () if module.disable_adapters or module.merged else module.active_adapters
        return weight_and_bias(module.ln_tuning_layers[active[0]] if active else module.base_layer)
    base = weight_and_bias(module.base_layer)
    active = [name for name in module.active_adapters if name not in module.merged_adapters]
    if module.disable_adapters != module.merged or not (active or module.merged):
        return base
    if not is_plain(module.base_layer):
        return _beside_quantized(module, *base, active)
    return _merged(module, *base)


def _trained(wrapper: Any) -> Any:
    """The module that peft's wrapper around a trained module runs."""
    if hasattr(wrapper, "token_adapter"):
        return wrapper.token_adapter  # single rows of an embedding
    trained, active = wrapper.modules_to_save, wrapper.active_adapters
    if wrapper.disable_adapters or not active or active[0] not in trained:
        return wrapper.original_module
    return trained[active[0]]


def _merged(layer: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """peft's own merge, or its undoing where adapters are disabled, on a copy of the weight."""
    # Shallow copies, which share everything with the model but what the merge changes.
    bare, twin = copy.copy(layer.get_base_layer()), copy.copy(layer)
    own = {"weight": weight, "bias": bias}
    own = {
        name: None if p is None else nn.Parameter(p.detach().clone(), requires_grad=False) for name, p in own.items()
    }
    bare.__dict__["_parameters"] = own
    twin.__dict__["_modules"] = {**layer._modules, "base_layer": bare}
    twin.__dict__.update(merged_adapters=list(layer.merged_adapters), _caches={})
    try:
        twin.unmerge() if layer.disable_adapters else twin.merge()
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"The adapter {', '.join(layer.active_adapters)} ({type(layer).__name__}) has no weight that mechvlm could read: "
            f"{error}"
        ) from error
    return bare.weight.data, None if bias is None else bare.bias.data


def _beside_quantized(layer: Any, weight: Tensor, bias: Tensor | None, active: list[str]):
    """A quantized weight plus its adapters; peft's own merge would quantize the sum."""
    present = [name for name in active if name in getattr(layer, "lora_A", ())]
    plain = hasattr(layer, "lora_A") and not any(name in layer.lora_variant for name in present)
    if not plain or layer.disable_adapters or any(layer.lora_B[name].bias is not None for name in present):
        raise ModelError(
            f"The adapter {', '.join(layer.active_adapters)} ({type(layer).__name__}) on quantized weights has no weight that "
            "mechvlm could read: only plain LoRA has. Load the base model without quantization."
        )
    return sum((layer.get_delta_weight(name).to(weight) for name in present), weight), bias


class Weights:
    """One weight of every layer, by head: `weights[layer]` is a view of the model's parameters.

    Of a quantized module, or one with an adapter, it is the weight that the module computes with,
    made anew at each read. Grouped keys and values are repeated, so that every query head has its
    own.

    Args:
        n_layers: number of the decoder's layers.
        name: TransformerLens' name of the weight, for the error text.
        read: gives the weight of a layer.
    """

    def __init__(self, n_layers: int, name: str, read: Callable[[int], Tensor]):
        self._n_layers, self._name, self._read = n_layers, name, read

    def __len__(self) -> int:
        return self._n_layers

    def __getitem__(self, layer: Any) -> Float[Tensor, "head _ _"]:
        return self._read(layer_number(self._name, layer, self._n_layers))
