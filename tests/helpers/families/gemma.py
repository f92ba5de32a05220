"""Gemma's: norms around both branches, soft caps, sliding windows, images that see both ways."""

import transformers

from .parts import IMAGE, SIDE, VOCABULARY, config, family, image_processor, processor, text, vision
from .tokenizers import template, tokenizer

LARGE = {"height": 256, "width": 256}
PALI = 1472
"""Room for 1,024 locations and 128 segments, which PaliGemma's processor adds to any tokenizer."""
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = ("<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n")
TURNS = ("<start_of_turn>", "<end_of_turn>")


def pali(text_config):
    """PaliGemma: every position of the prompt sees every other; there are no turns."""
    hf = config(
        "paligemma", vision_config=vision("siglip_vision_model", vision_use_head=False, projection_dim=64),
        text_config=text_config, image_token_index=IMAGE, projection_dim=64, hidden_size=64,
    )  # fmt: skip
    images = image_processor("SiglipImageProcessor", size=SIDE)
    images.image_seq_length = 16
    return hf, processor("PaliGemmaProcessor", images, tokenizer("<image>", image_token="<image>"))


@family("PaliGemmaForConditionalGeneration")
def paligemma():
    return pali(text("gemma", vocab_size=PALI))


@family("PaliGemmaForConditionalGeneration")
def paligemma2():
    return pali(text("gemma2", vocab_size=PALI, query_pre_attn_scalar=16, sliding_window=8, **CAPS))


@family("Gemma3ForConditionalGeneration", word="<start_of_image>")
def gemma3():
    """16 patches to 4 tokens; pan and scan is off, as in the released processors."""
    hf = config(
        "gemma3", vision_config=vision("siglip_vision_model", vision_use_head=False),
        text_config=text("gemma3_text", query_pre_attn_scalar=16, sliding_window=8, layer_types=MIXED),
        image_token_index=IMAGE, boi_token_index=301, eoi_token_index=302, mm_tokens_per_image=4,
    )  # fmt: skip
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer("<image_soft_token>", "<start_of_image>", "<end_of_image>", *TURNS, starts=True, **names)
    images = image_processor("Gemma3ImageProcessor", size=SIDE)
    turns = template("<start_of_image>", *GEMMA)
    return hf, processor("Gemma3Processor", images, words, image_seq_length=4, chat_template=turns)


@family("Gemma4ForConditionalGeneration", word="<|image|>")
def gemma4():
    """Layers of two widths, values with a norm, an input of their own, an output scaled by 0.7."""
    layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    decoder = text(
        "gemma4_text", num_hidden_layers=4, sliding_window=8, layer_types=layers, global_head_dim=32,
        num_global_key_value_heads=1, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0, final_logit_softcapping=10.0,
    )  # fmt: skip
    eyes = vision("gemma4_vision", head_dim=8, num_key_value_heads=4, pooling_kernel_size=2, position_embedding_size=64)
    hf = config(
        "gemma4", vision_config=eyes, text_config=decoder, audio_config=None, image_token_id=IMAGE, boi_token_id=301,
        eoi_token_id=302, vision_soft_tokens_per_image=70,
    )  # fmt: skip
    names = {
        "image_token": "<|image|>", "boi_token": "<|boi|>", "eoi_token": "<|eoi|>", "audio_token": "<|audio|>",
        "boa_token": "<|boa|>", "eoa_token": "<|eoa|>",
    }  # fmt: skip
    words = tokenizer(*names.values(), "<|video|>", *TURNS, starts=True, **names)
    images = image_processor("Gemma4ImageProcessor", patch_size=8, max_soft_tokens=70, pooling_kernel_size=2)
    return hf, processor(
        "Gemma4Processor", images, words, video="Gemma4VideoProcessor", image_seq_length=70,
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(), chat_template=template("<|image|>", *GEMMA),
    )  # fmt: skip
