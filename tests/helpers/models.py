"""Seeded models with random weights: the real classes and geometry at small widths.

Norm weights and biases are random too: with unit weights a state that is normed twice would pass.
"""

import json
from functools import lru_cache
from importlib.resources import files

import torch
from tokenizers import Tokenizer
from transformers import (
    BertTokenizer,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def llama_tokenizer(extra: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """LLaMA's real 32,000 pieces, from the package wordllama, with `extra` from id 32,000 on."""
    source = files("wordllama") / "tokenizers" / "l2_supercat_tokenizer_config.json"
    spec = json.loads(source.read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left",
    )  # fmt: skip
    tokenizer.add_tokens(list(extra), special_tokens=True)
    tokenizer.pad_token = "<pad>" if "<pad>" in extra else "<unk>"
    return tokenizer


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Parameters from N(0, .05), norm weights around 1: none is 0, 1 or tied by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if "norm" in name.lower() and name.endswith("weight") else 0.05 * noise)
    return model.eval()


def text_config(layers: int, width: int, heads: int, kv_heads: int, bias: bool, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, attention_bias=bias, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, rms_norm_eps=1e-5,
    )  # fmt: skip


@lru_cache
def llava(kv_heads: int = 4, bias: bool = False, layers: int = 3, image: int = 56, width: int = 32):
    """A small LLaVA-1.5: patch 14, vocabulary 32064, `<image>` 32000; image=336: 576 patches."""
    tokenizer = llama_tokenizer(("<image>", "<pad>"))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=image,
            patch_size=14, projection_dim=16,
        ),
        text_config=text_config(layers, width, 4, kv_heads, bias, 32064),
        image_token_index=32000, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": image}, crop_size={"height": image, "width": image}),
        tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip
    return randomise(LlavaForConditionalGeneration(config), 0), processor


@lru_cache
def instructblip(queries: int = 5, layers: int = 3, image: int = 56):
    """A small InstructBLIP-Vicuna: queries before BOS, cased BERT words for the Q-Former."""
    tokenizer = llama_tokenizer(("<pad>",))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "this", "a", "describe", "the", "scene", "."]
    qformer_tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    processor = InstructBlipProcessor(
        BlipImageProcessor(size={"height": image, "width": image}), tokenizer, qformer_tokenizer,
        num_query_tokens=queries,
    )  # fmt: skip
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=image,
            patch_size=14, initializer_range=0.02,
        ),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(words), hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
            encoder_hidden_size=16, cross_attention_frequency=2, max_position_embeddings=64, pad_token_id=0,
        ),
        text_config=text_config(layers, 32, 4, 4, False, 32064),
        num_query_tokens=queries, image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return randomise(InstructBlipForConditionalGeneration(config), 1), processor


FAMILIES = {
    "llava": lambda: llava(),
    "llava-gqa-bias": lambda: llava(kv_heads=2, bias=True),
    "instructblip": lambda: instructblip(),
}
DEEP = {
    "llava": lambda: llava(layers=5),
    "llava-gqa-bias": lambda: llava(kv_heads=2, bias=True, layers=5),
    "instructblip": lambda: instructblip(layers=5),
}
