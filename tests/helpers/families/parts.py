"""What every tiny family is made of: small configs, random weights, processors from their parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.utils import is_torchvision_available

from mechvlm.vlm.processors import NoVideos, processor_class

VOCABULARY = 400
IMAGE = 300
"""Id of the image token, in every family."""

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.15, "projection_dim": 32,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "moe_num_experts": 4, "moe_topk": 2,
    "moe_num_shared_experts": 1,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [2, 3, 3]}
SIDE = {"height": 32, "width": 32}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]
"""The sizes that a LLaVA-NeXT cuts into tiles of 32 x 32."""


def config(model_type: str, **settings):
    """The config of a model type."""
    return CONFIG_MAPPING[model_type](**settings)


def text(model_type: str, **settings):
    """A decoder of 3 layers, width 64, 4 heads; `settings` beside the small ones that it knows."""
    return _small(model_type, {**TEXT, **EXPERTS}, settings)


def vision(model_type: str, **settings):
    """A vision part for images of 32 x 32 pixels in patches of 8 x 8."""
    return _small(model_type, VISION, settings)


def _small(model_type: str, base: dict[str, Any], settings: dict[str, Any]):
    kind = CONFIG_MAPPING[model_type]
    names = set(kind.__dataclass_fields__) | set(kind.attribute_map or {})
    return kind(**{name: value for name, value in base.items() if name in names} | settings)


def image_processor(kind: str, **settings):
    """The image processor that needs Pillow alone where there is one, else torchvision's."""
    name = f"{kind}Pil" if hasattr(transformers, f"{kind}Pil") else kind
    return getattr(transformers, name)(**settings)


def processor(kind: str, images, tokenizer, video: str | None = None, **settings):
    """A processor from its parts; `video`: the class of its video processor, if it has one."""
    parts = {"image_processor": images, "tokenizer": tokenizer}
    if video is not None:
        parts["video_processor"] = getattr(transformers, video)() if is_torchvision_available() else NoVideos()
    return processor_class(kind)(**parts, **settings)


@torch.no_grad()
def perturb(hf: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Noise on what starts as ones or zeros: identities must not hold for want of numbers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in hf.named_parameters():
        if ".timm_model." in name and parameter.ndim == 4:  # so small that the image is lost
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="linear", generator=generator)
        if parameter.is_floating_point() and (parameter.ndim <= 1 or parameter.abs().max() < 1e-4):
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        if name.endswith("_gate"):  # Mllama's, which start closed
            parameter.add_(0.7)
    for name, buffer in hf.named_buffers():
        if name.endswith("layer_scalar"):  # Gemma 4 multiplies each layer's output by it
            buffer.fill_(0.7)
    return hf.eval()


@dataclass(frozen=True)
class Family:
    """How a tiny model and its processor are made.

    Attributes:
        hf_class: the model's class.
        make: gives its config and its processor.
        word: what a prompt holds where an image is; "" where the processor puts it in front.
        images: how many images a prompt may hold, at most; None for any number.
        refused: why mechvlm must refuse it, "" where it must not.
        memory: whether the image is read by cross-attention, and is no part of the sequence.
        needs: packages without which the model or its processor cannot be built.
    """

    hf_class: str
    make: Callable[[], tuple[Any, Any]]
    word: str = "<image>"
    images: int | None = None
    refused: str = ""
    memory: bool = False
    needs: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {}


def family(hf_class: str, **facts) -> Callable:
    """Decorator: the function that makes a config and a processor, as the family of its name."""

    def add(make: Callable[[], tuple[Any, Any]]) -> Callable:
        FAMILIES[make.__name__] = Family(hf_class, make, **facts)
        return make

    return add
