"""What a loaded model may be: plain, with adapters, quantized. Everything else is refused here.

1. `unwrapped` takes the Hugging Face model out of torch.compile's and peft's wrappers.
2. `require_readable` refuses a model whose modules cannot be traced, or whose decoder computes with
   weights that nobody can read (`mechvlm.decoder.weights`). One module of each kind is tried: its
   output must be that of the weight that is read from it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mechvlm.decoder.weights import DEQUANTIZED, is_plain, package_of, weight_and_bias
from mechvlm.errors import ModelError
from mechvlm.families.record import Architecture, layer_paths, part

QUANTIZED_TOLERANCE = 5e-2
"""The same for quantized modules, which may round their inputs to 8 bits.

Measured on one module: 1e-2, where bitsandbytes or torchao round the inputs to 8 bits.
"""

UNREAD_QUANTIZERS = ("awq", "gptqmodel", "auto_gptq", "hqq", "quanto", "optimum", "eetq", "aqlm", "compressed_tensors")
"""Packages of quantized modules whose weights mechvlm does not read."""

RUN_OTHERWISE = ("XLORA", "POLY", "ADAPTION_PROMPT")
"""peft's adapters that are no change of a weight, beside those that learn prompts."""


def unwrapped(model: Any) -> nn.Module:
    """The Hugging Face model inside the wrappers of torch.compile and peft, with the same weights.

    The model is not changed. A compiled model is traced uncompiled.

    Raises:
        ModelError: for an adapter that adds tokens or keys instead of changing weights.
    """
    if type(model).__name__ == "OptimizedModule":
        return unwrapped(model._orig_mod)
    if package_of(model) != "peft":
        return model
    for name, config in model.peft_config.items():
        refuse_adapter(config, name)
    tuner = model.base_model if type(model).__name__.startswith("Peft") else model
    return unwrapped(tuner.model)


def refuse_adapter(config: Any, name: str) -> None:
    """Raises ModelError for an adapter, given by its peft config, that is no change of weights."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or kind in RUN_OTHERWISE:
        raise ModelError(
            f"The adapter {name!r} is of the type {kind}, which adds learned tokens, keys or a router to the forward and "
            "changes no weight: positions and attention would not be those of the prompt. mechvlm reads adapters that can be "
            "merged (LoRA and its kin). Load the base model without this one."
        )


def require_readable(model: nn.Module, record: Architecture | None) -> None:
    """Refuse a model whose weights are not those that it computes with, or are not here.

    Raises:
        ModelError: naming the module, and what to do.
    """
    kind = type(model).__name__
    compiled = [path for path, module in model.named_modules() if _is_compiled(module)]
    if compiled:
        raise ModelError(
            f"{compiled[0] or 'This ' + kind} was compiled in place, and a compiled forward cannot be traced. Load the model "
            "again without compile(); torch.compile(model), which leaves the model as it was, may stay."
        )
    _refuse_unread_quantization(model)
    if away := [name for name, p in model.named_parameters() if p.device.type == "meta"]:
        raise ModelError(
            f"{len(away)} tensors of this {kind} ({away[0]}, ...) are not in memory: device_map offloaded them. Load it where "
            "it fits, in a smaller dtype, on more devices, or on NDIF with remote=True."
        )
    _keep_unpacked(model)
    if record is None:  # one is to be derived
        return
    for path in _present(model, _frames(model, record)):
        if package_of(part(model, path)) == "peft":
            raise ModelError(
                f"{path} is wrapped as a whole by peft ({type(part(model, path)).__name__}), so its parts are not where "
                f"{record.hf_class} has them. Merge it first: PeftModel.merge_and_unload() gives the model to load."
            )
    tried = set()
    for path in _present(model, _weighted(model, record)):
        module = part(model, path)
        alike = _kind(module)
        if not is_plain(module) and alike not in tried:
            _require_own_weight(module, path, is_embedding=path == record.embed)
            tried.add(alike)


def _keep_unpacked(model: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit weights as they are on CPUs with AVX512-BF16.

    There the first forward would pack them in place, into an order that is not undone exactly.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _present(model: nn.Module, paths: Iterable[str]) -> Iterator[str]:
    """The paths that lead to a module; `VLM` says of the others whether it can do without them."""
    for path in paths:
        try:
            part(model, path)
        except AttributeError:
            continue
        yield path


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def quantization_of(config: Any) -> str | None:
    """The quantization that a config names: "bitsandbytes", "gptq", ...; None for none."""
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def refuse_quantization(method: str | None, name: str) -> None:
    """Raises ModelError for a quantization of which mechvlm reads no weights."""
    if method is not None and method not in DEQUANTIZED:
        raise ModelError(
            f"The weights of {name} are quantized by {method}, and mechvlm reads those of {' and '.join(DEQUANTIZED)} only. "
            "Load the checkpoint that was not quantized, in bfloat16 for instance, or give mechvlm.load the dequantized model "
            "where transformers has one (model.dequantize())."
        )


def _refuse_unread_quantization(model: nn.Module) -> None:
    name = f"this {type(model).__name__}"
    refuse_quantization(quantization_of(getattr(model, "config", None)), name)
    for path, module in model.named_modules():
        for thing in (module, *module.parameters(recurse=False)):
            if package_of(thing) in UNREAD_QUANTIZERS:
                refuse_quantization(package_of(thing), f"{name} ({path}, ...)")


def _frames(model: nn.Module, record: Architecture) -> Iterator[str]:
    """Paths of the modules that hold the decoder's parts."""
    yield record.decoder
    for layer, at in enumerate(layer_paths(record, model)):
        kind = record.kind(layer)
        yield from (at, *(f"{at}.{path}" for path in (kind.attention, kind.attn_out, kind.mlp_out) if path))


def _weighted(model: nn.Module, record: Architecture) -> Iterator[str]:
    """Paths of the modules whose weights are read."""
    yield from (record.embed, record.norm, record.unembed)
    for layer, at in enumerate(layer_paths(record, model)):
        kind = record.kind(layer)
        if kind.attention is not None:
            projections = dict.fromkeys((kind.q_proj, kind.k_proj, kind.v_proj, kind.o_proj))
            yield from (f"{at}.{kind.attention}.{name}" for name in projections if name)
        if kind.down_proj is not None:
            yield f"{at}.{kind.down_proj}"


def _kind(module: Any) -> tuple:
    """What two modules share when one can stand for both: classes, adapters, variants."""
    inner = [type(m).__name__ for m in module.modules()]
    variants = {name: type(variant).__name__ for name, variant in getattr(module, "lora_variant", {}).items()}
    state = getattr(module, "merged", None), getattr(module, "disable_adapters", None), len(module._forward_hooks)
    return (*inner, str(variants), *state, type(getattr(module, "weight", None)).__name__)


def _require_own_weight(module: Any, path: str, is_embedding: bool) -> None:
    """Raises ModelError where the module's output is not that of its weight as it is read."""
    try:
        weight, bias = weight_and_bias(module)
        with torch.no_grad():
            given, expected = _outputs(module, weight, bias, is_embedding)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    given, expected = given.detach(), expected.detach()
    difference = float((given - expected).float().abs().max() / expected.float().abs().max().clamp(min=1e-6))
    allowed = max(1e-3, 4 * torch.finfo(weight.dtype).eps)  # one product's rounding
    if not difference <= (max(allowed, QUANTIZED_TOLERANCE) if is_quantized(module) else allowed):
        raise ModelError(
            f"{path} ({type(module).__name__}) does not compute with the weight that it gives: its output is off by "
            f"{difference:.2g} of the largest entry. Merge its adapters (PeftModel.merge_and_unload()), or load the model "
            "without quantization."
        )


def _outputs(module: Any, weight: Tensor, bias: Tensor | None, is_embedding: bool) -> tuple[Tensor, Tensor]:
    """The module's output for a few random inputs, and that of its weight; a norm is not tried."""
    generator = torch.Generator().manual_seed(0)
    if is_embedding:
        ids = torch.randint(len(weight), (8,), generator=generator).to(weight.device)
        return module(ids), weight[ids]
    x = torch.randn(8, weight.shape[-1], generator=generator).to(weight)
    return (module(x), linear(x, weight, bias)) if weight.ndim == 2 else (weight, weight)


def require_gradients(model: nn.Module, record: Architecture) -> None:
    """Raises ModelError where the decoder holds quantized modules that pass no gradient on.

    The residual stream passes by them, so that a gradient would arrive, without their share.
    """
    tried = set()
    for path, module in part(model, record.decoder).named_modules():
        if package_of(getattr(module, "weight", None)) not in DEQUANTIZED or package_of(module) == "peft":
            continue
        if (alike := _kind(module)) in tried:
            continue
        tried.add(alike)
        embed = part(model, record.embed).weight
        with torch.enable_grad():
            x = torch.ones(1, module.in_features, dtype=embed.dtype, device=embed.device, requires_grad=True)
            out = module(x).sum()
            if not out.requires_grad or torch.autograd.grad(out, x, allow_unused=True)[0] is None:
                raise ModelError(
                    f"This needs gradients, and {record.decoder}.{path} passes none on: its inputs are quantized too. Quantize "
                    "the weights alone, or load the model without quantization."
                )


def is_quantized(model: nn.Module) -> bool:
    """Whether any parameter of a module is kept in other numbers than it computes with."""
    return any(package_of(p) in DEQUANTIZED for p in model.parameters())
