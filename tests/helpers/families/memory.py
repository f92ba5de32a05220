"""Flamingo's design: the image is a memory that cross-attention layers read."""

import transformers

from .parts import IMAGE, ROPE, SIDE, TEXT, family, image_processor, processor, text
from .tokenizers import template, tokenizer

EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}


@family("MllamaForConditionalGeneration", word="<|image|>", memory=True)
def mllama():
    """Of its four layers, layers 1 and 3 attend to the image and to nothing else."""
    eyes = EYES | {
        "num_global_layers": 1, "attention_heads": 4, "max_num_tiles": 2, "intermediate_layers_indices": [0],
        "vision_output_dim": 64, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    decoder = text("mllama_text_model", num_hidden_layers=4, cross_attention_layers=[1, 3], rope_parameters=ROPE)
    hf = transformers.MllamaConfig(vision_config=eyes, text_config=decoder, image_token_index=IMAGE)
    images = image_processor("MllamaImageProcessor", size=SIDE, max_image_tiles=2)
    words = tokenizer("<|image|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    header = "<|start_header_id|>{}<|end_header_id|>\n"
    turns = template("<|image|>", header.format("user"), header.format("assistant"), "<|eot_id|>")
    return hf, processor("MllamaProcessor", images, words, chat_template=turns)


@family("IdeficsForVisionText2Text", word="", memory=True)
def idefics():
    """Before every second of its layers stands a gated block that attends to six latents."""
    eyes = {
        "embed_dim": 32, "image_size": 32, "intermediate_size": 64, "patch_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    latents = {
        "use_resampler": True, "resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8,
    }  # fmt: skip
    names = transformers.IdeficsConfig.__dataclass_fields__
    hf = transformers.IdeficsConfig(
        **{name: value for name, value in TEXT.items() if name in names} | {"num_hidden_layers": 4},
        cross_layer_interval=2, alpha_initializer="ones", alpha_type="float", additional_vocab_size=4, use_resampler=True,
        vision_config=eyes, perceiver_config=latents,
    )  # fmt: skip
    images = image_processor("IdeficsImageProcessor", image_size=32)
    words = tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", starts=True)
    return hf, processor("IdeficsProcessor", images, words, image_size=32)
