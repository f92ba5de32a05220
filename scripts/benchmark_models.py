"""The benchmark's models: real architectures and token counts, random weights, any size."""

import copy
import os
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CONFIG_MAPPING,
    BertTokenizer,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

import mechvlm as mv

VOCABULARY = 32064
IMAGE = 32000
QUESTION = " ".join(f"w{i}" for i in range(40))
FULL_WIDTH = 4096
"""Smallest width at which the vision encoder is as large as LLaVA-1.5's or InstructBLIP's.

Narrower models get a small encoder that costs almost nothing.
"""


def noise(seed: int, size: int = 336) -> Image.Image:
    """A square image of uniform noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


class Built(NamedTuple):
    """Two models that share their weights: mechvlm's, and one that nnsight has not touched."""

    vlm: mv.VLM
    hf: Any


FAMILIES = ("llava", "instructblip", "qwen2_5_vl", "gemma3", "phi3")
"""LLaVA and InstructBLIP with LLaMA's layers, and LLaVA with those of Qwen2.5-VL (grouped queries,
biases), of Gemma 3 (norms after attention and MLP, normed queries and keys), and of Phi-3 (fused
matrices, whose record is derived at load)."""


def build(
    family: str,
    layers: int,
    width: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    d_head: int = 128,
) -> Built:
    """A model with LLaMA's proportions: an MLP of 2.6875 times the width (11008 at 4096)."""
    model, processor = unread(family, layers, width, device, dtype, d_head)
    # The memo makes the copy share the parameters.
    bare = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    return Built(mv.load(model, processor), bare)


def unread(
    family: str, layers: int, width: int, device: str = "cpu", dtype: torch.dtype = torch.float32, d_head: int = 128
) -> tuple:
    """The model, in evaluation mode, and its processor, before mechvlm has seen them."""
    torch.set_default_dtype(dtype)
    try:
        # The model's own initialisation would take most of a minute at width 2048.
        with torch.device(device), no_init_weights():
            if family == "instructblip":
                model, processor = instructblip(layers, width)
            else:
                model, processor = llava(layers, width, family, d_head)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.fill_(1)
            else:
                weight.normal_(0, 0.02)
    return model.eval(), processor


def llava(
    layers: int, width: int, text: str = "llava", d_head: int = 128
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """LLaVA-1.5's visual tokens: 24 x 24 patches of an image of 336 pixels."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **_vision(width, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
            image_size=336, patch_size=14, projection_dim=64,
        ),
        text_config=_text(layers, width, text, d_head), image_token_index=IMAGE, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        _tokenizer(), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def instructblip(layers: int, width: int) -> tuple[InstructBlipForConditionalGeneration, InstructBlipProcessor]:
    """InstructBLIP's visual tokens: 32 queries, which read an image of 224 pixels."""
    vision = _vision(width, hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16)
    queries = _vision(width, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**vision, image_size=224, patch_size=14).to_dict(),
        qformer_config=InstructBlipQFormerConfig(
            **queries, vocab_size=len(_BERT), encoder_hidden_size=vision["hidden_size"], cross_attention_frequency=2
        ).to_dict(),
        text_config=_text(layers, width).to_dict(), num_query_tokens=32, image_token_index=IMAGE,
    )  # fmt: skip
    processor = InstructBlipProcessor(
        BlipImageProcessor(size={"height": 224, "width": 224}), _tokenizer(),
        BertTokenizer(vocab={word: i for i, word in enumerate(_BERT)}), num_query_tokens=32,
    )  # fmt: skip
    return InstructBlipForConditionalGeneration(config), processor


_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *QUESTION.split()]


def _vision(width: int, **full: int) -> dict[str, int]:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return full if width >= FULL_WIDTH else small


def _text(layers: int, width: int, kind: str = "llava", d_head: int = 128) -> PreTrainedConfig:
    heads = width // d_head
    shared = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": int(width * 2.6875), "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        return CONFIG_MAPPING["qwen2_5_vl_text"](**shared, num_key_value_heads=max(1, heads // 4), rope_parameters=rope)
    if kind == "gemma3":
        return CONFIG_MAPPING["gemma3_text"](
            **shared,
            num_key_value_heads=max(1, heads // 2),
            head_dim=128,
            query_pre_attn_scalar=128,
            sliding_window=1024,
        )
    return CONFIG_MAPPING["phi3" if kind == "phi3" else "llama"](**shared)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of made-up words, with as many tokens as LLaMA's."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(IMAGE - 3)), "<image>", "<pad>"]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
