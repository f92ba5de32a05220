"""The same weights as a TransformerLens `TransformerBridge`.

TransformerLens puts its own components into the modules of the model that it is given. So it gets a
twin of the Hugging Face model: modules of its own, whose parameters share the model's memory. The
VLM itself stays as it was.

Importing this file imports TransformerLens, which takes seconds; `VLM.bridge` does so when called.
"""

import copy
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import VisionProjectionBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module, detect_tokenizer_bos_eos
from transformer_lens.model_bridge.supported_architectures import LlamaArchitectureAdapter

from mechvlm.decoder.norms import fold
from mechvlm.decoder.weights import package_of, weight_and_bias
from mechvlm.errors import ModelError
from mechvlm.families.record import Architecture, part
from mechvlm.vlm.closeness import TOLERANCE, describe, difference_of
from mechvlm.vlm.kinds import is_quantized


class InstructBlipArchitectureAdapter(LlamaArchitectureAdapter):
    """InstructBLIP with a Llama decoder (Vicuna): TransformerLens' Llama, at InstructBLIP's paths.

    The vision model, the Q-Former and the projection are single components, with hooks on their
    inputs and outputs.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.is_multimodal = True
        # TransformerLens hooks the attention weights, which only the eager implementation computes.
        self.cfg.attn_implementation = "eager"
        self._extract_vision_dims(cfg)
        for component in self.components.values():
            component.name = f"language_model.{component.name}"
        self.components["vision_encoder"] = GeneralizedComponent(name="vision_model")
        self.components["qformer"] = GeneralizedComponent(name="qformer")
        self.components["vision_projector"] = VisionProjectionBridge(name="language_projection")

    def prepare_model(self, hf_model: Any) -> None:
        super().prepare_model(hf_model)
        hf_model.register_forward_pre_hook(_ids_by_name, with_kwargs=True)


def _ids_by_name(module, args, kwargs):
    """Token ids by name: TransformerLens gives them first, where InstructBLIP takes the pixels."""
    return ((), {"input_ids": args[0], **kwargs}) if args else (args, kwargs)


ArchitectureAdapterFactory.register_adapter("InstructBlipForConditionalGeneration", InstructBlipArchitectureAdapter)


def build_bridge(
    hf: nn.Module, record: Architecture, name: str, tokenizer, processor, fold_with_eps: float | None = None
) -> TransformerBridge:
    """A new bridge on the model's own weights; see `VLM.bridge`.

    fold_with_eps: multiply the final norm's gain into a copy of the unembedding; the number is the
    norm's epsilon. The logits stay the same, and `W_U` then holds the directions that
    TransformerLens expects in it.
    """
    twin = _twin(hf, record, name)
    if fold_with_eps is not None:
        fold(part(twin, record.norm), part(twin, record.unembed), fold_with_eps)
    bridge = _built(twin, record, name)
    # TransformerLens would reload the tokenizer, with BOS, from the folder or hub id that it names.
    # This one may come from neither: set it as it is, and say how it treats BOS and EOS.
    bridge.tokenizer = copy.deepcopy(tokenizer)
    bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(bridge.tokenizer)
    bridge.processor = processor
    return bridge


def _built(twin: Any, record: Architecture, name: str) -> TransformerBridge:
    """TransformerLens' bridge, or a ModelError that says what TransformerLens lacks."""
    kind = f"{record.hf_class} with {twin.config.get_text_config(decoder=True).model_type} layers"
    try:
        return build_bridge_from_module(twin, record.hf_class, hf_config=twin.config, model_name=name)
    except ImportError as error:
        raise ModelError(
            f"TransformerLens' adapter for {kind} needs a package that is not installed: {error}"
        ) from error
    except ValueError as error:
        if "Unsupported architecture" not in str(error):
            raise
        raise ModelError(
            f"TransformerLens has no adapter for {kind}, so there is no bridge to {name}. vlm.run_with_cache gives the "
            "activations under TransformerLens' names without one."
        ) from error
    except (AttributeError, KeyError, TypeError) as error:  # an adapter for other layers
        raise ModelError(
            f"TransformerLens' adapter for {record.hf_class} does not fit {kind} ({error}), so there is no bridge to {name}. "
            "vlm.run_with_cache gives the activations under TransformerLens' names without one."
        ) from error


def checked_bridge(vlm: Any, fold_with_eps: float | None = None) -> TransformerBridge:
    """A new bridge of a loaded VLM that passed `check_bridge`; see `build_bridge`."""
    bridge = build_bridge(vlm.hf, vlm.record, vlm.name, vlm.tokenizer, vlm.processor, fold_with_eps)
    encoding = vlm.encoding(vlm.inputs(Image.new("RGB", (32, 32)), "a"))
    with torch.no_grad():
        check_bridge(bridge, encoding, vlm.hf(**encoding).logits, vlm.name)
    return bridge


def check_bridge(bridge: TransformerBridge, encoding: dict[str, Any], logits: Tensor, name: str) -> None:
    """Hold a bridge to the model: its logits are the model's, and its layers add up.

    Args:
        bridge: the bridge.
        encoding: of one example.
        logits: the model's own, [1 pos d_vocab].
        name: the model's name.

    Raises:
        ModelError: naming what differs.
    """
    encoding = dict(encoding)
    with torch.no_grad():
        theirs, cache = bridge.run_with_cache(encoding.pop("input_ids"), **encoding)
    theirs = theirs if isinstance(theirs, Tensor) else theirs.logits
    off = {"logits are the model's": difference_of(theirs, logits)}
    for layer in range(bridge.cfg.n_layers):
        at = f"blocks.{layer}"
        names = [f"{at}.hook_{part}" for part in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
        if missing := [hook for hook in names if hook not in cache]:
            off[f"{missing[0]} is there"] = float("inf")
            continue
        pre, attn_out, mlp_out, post = (cache[hook] for hook in names)
        off[f"{at}: resid_post = resid_pre + attn_out + mlp_out"] = difference_of(pre + attn_out + mlp_out, post)
    wrong = [f"{claim}: {describe(x)}" for claim, x in off.items() if not x <= TOLERANCE.get(logits.dtype, 1e-3)]
    if wrong:
        raise ModelError(
            f"TransformerLens has an adapter for {name}, but its parts do not add up: "
            + "; ".join(wrong[:3])
            + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            + ". vlm.run_with_cache gives the activations under TransformerLens' names, and is checked."
        )


def _refuse_quantized(hf: nn.Module, name: str) -> None:
    if is_quantized(hf):
        raise ModelError(
            f"A TransformerLens bridge would need a copy of all weights of {name}, which are quantized. Load it without "
            "quantization for the bridge; vlm.run_with_cache, vlm.OV and vlm.QK work as it is."
        )


def _twin(hf: nn.Module, record: Architecture, name: str) -> nn.Module:
    """A second model of the same Hugging Face class and config, whose parameters share memory.

    Modules with an adapter have a copy of their weight, with the adapter merged into it.
    """
    devices = {str(tensor.device) for tensor in (*hf.parameters(), *hf.buffers())}
    if len(devices) > 1 or "meta" in devices:
        raise ModelError(
            f"A TransformerLens bridge needs a model on one device; {name} is spread over {', '.join(sorted(devices))}. "
            "Load it with device=... instead of device_map."
        )
    with torch.device("meta"):
        twin = type(hf)(copy.deepcopy(hf.config))
    modules, twins = dict(hf.named_modules()), dict(twin.named_modules())
    _refuse_quantized(hf, name)
    adapted = {path for path, module in modules.items() if package_of(module) == "peft" and path in twins}
    inside = tuple(f"{path}." for path in adapted)
    modules = {path: module for path, module in modules.items() if not path.startswith(inside)}
    types, twin_types = ({path: type(m).__name__ for path, m in tree.items()} for tree in (modules, twins))
    types |= {path: twin_types[path] for path in adapted}
    if types != twin_types:
        differ = sorted(path for path in types.keys() | twin_types.keys() if types.get(path) != twin_types.get(path))
        raise ModelError(
            f"{name} is not built as its class {record.hf_class} builds it ({len(differ)} modules differ, {differ[0]!r} "
            f"is {types.get(differ[0])}), so TransformerLens cannot read it."
        )
    for path in adapted:  # TransformerLens knows no adapters: these modules get a merged copy
        weight, bias = weight_and_bias(modules.pop(path))
        for key, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                twins[path]._parameters[key] = nn.Parameter(value.detach(), requires_grad=False)
    shared: dict[int, nn.Parameter] = {}  # by id, so that tied parameters stay tied
    for path, module in modules.items():
        for key, p in module._parameters.items():
            if p is not None and id(p) not in shared:
                # A new Parameter on the same storage: `bridge.to(...)` replaces only the bridge's.
                shared[id(p)] = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            twins[path]._parameters[key] = None if p is None else shared[id(p)]
        twins[path]._buffers.update(module._buffers)
    return twin.train(hf.training)
