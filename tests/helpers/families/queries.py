"""BLIP-2 and InstructBLIP: a Q-Former's six queries stand for an image, in front of the text."""

import transformers

from .parts import IMAGE, SIDE, VOCABULARY, config, family, image_processor, processor, text, vision
from .tokenizers import tokenizer

ENCODER = "its language model is an encoder-decoder"
T5 = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0,
}  # fmt: skip
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15, "dropout": 0.0}


def blip(model_type: str, prefix: str, text_config):
    """The config, with a Q-Former of four layers of which every second one sees the image."""
    former = vision(
        f"{prefix}_qformer", encoder_hidden_size=32, vocab_size=VOCABULARY, num_hidden_layers=4, cross_attention_frequency=2,
        pad_token_id=0,
    )  # fmt: skip
    return config(
        model_type, vision_config=vision(f"{prefix}_vision_model"), qformer_config=former, text_config=text_config,
        num_query_tokens=6, image_token_index=IMAGE,
    )  # fmt: skip


def second(text_config):
    images = image_processor("BlipImageProcessor", size=SIDE)
    words = tokenizer("<image>", starts=True)
    return blip("blip-2", "blip_2", text_config), processor("Blip2Processor", images, words, num_query_tokens=6)


def instructed(text_config):
    """Its Q-Former reads the question as well, with a tokenizer of its own."""
    images = image_processor("BlipImageProcessor", size=SIDE)
    words = tokenizer("<image>", starts=True)
    made = transformers.InstructBlipProcessor(images, words, tokenizer("<image>"), num_query_tokens=6)
    return blip("instructblip", "instructblip", text_config), made


@family("Blip2ForConditionalGeneration", word="", images=1)
def blip2_opt():
    return second(text("opt", **OPT))


@family("Blip2ForConditionalGeneration", word="", images=1)
def blip2_llama():
    return second(text("llama"))


@family("Blip2ForConditionalGeneration", word="", images=1, refused=ENCODER)
def blip2_t5():
    return second(text("t5", **T5))


@family("InstructBlipForConditionalGeneration", word="", images=1)
def instructblip():
    return instructed(text("llama"))


@family("InstructBlipForConditionalGeneration", word="", images=1)
def instructblip_opt():
    return instructed(text("opt", **OPT))


@family("InstructBlipForConditionalGeneration", word="", images=1, refused=ENCODER)
def instructblip_t5():
    return instructed(text("t5", **T5))
