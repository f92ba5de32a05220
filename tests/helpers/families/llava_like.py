"""LLaVA and its kin: one grid of patches, LLaVA-NeXT's and OneVision's tiles, VipLLaVA."""

from .parts import IMAGE, PINPOINTS, ROPE, SIDE, config, family, image_processor, processor, text, vision
from .tokenizers import TURNS, template, tokenizer, turns

LLAMA = template("<image>\n")
INSTRUCT = template("<image>\n", "[INST] ", "", " [/INST]")
GRID = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def one_grid(text_config, model_type: str = "llava", chat_template: str = LLAMA, starts: bool = True, **settings):
    """A CLIP of 4 x 4 patches before any decoder."""
    settings = settings or {"vision_feature_layer": -2}
    hf = config(
        model_type,
        vision_config=vision("clip_vision_model"),
        text_config=text_config,
        image_token_index=IMAGE,
        **settings,
    )
    images = image_processor("CLIPImageProcessor", size={"shortest_edge": 32}, crop_size=SIDE)
    words = tokenizer("<image>", *TURNS, starts=starts, image_token="<image>")
    return hf, processor("LlavaProcessor", images, words, chat_template=chat_template, **GRID)


@family("LlavaForConditionalGeneration")
def llava():
    return one_grid(text("llama"))


@family("LlavaForConditionalGeneration")
def llava_mistral():
    return one_grid(text("mistral", sliding_window=8), chat_template=INSTRUCT)


@family("LlavaForConditionalGeneration")
def llava_qwen2():
    """With SigLIP, whose states are all used: there is no first one to leave out."""
    hf = config(
        "llava", vision_config=vision("siglip_vision_model", vision_use_head=False), text_config=text("qwen2"),
        image_token_index=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    images = image_processor("SiglipImageProcessor", size=SIDE)
    words = tokenizer("<image>", *TURNS, image_token="<image>")
    settings = {"patch_size": 8, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    return hf, processor("LlavaProcessor", images, words, chat_template=turns("<image>\n"), **settings)


@family("LlavaForConditionalGeneration")
def llava_phi():
    return one_grid(text("phi"))


@family("LlavaForConditionalGeneration")
def llava_phi3():
    return one_grid(text("phi3"))


@family("LlavaForConditionalGeneration")
def llava_gpt_neox():
    return one_grid(text("gpt_neox"))


@family("LlavaForConditionalGeneration")
def llava_gemma2():
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}
    return one_grid(text("gemma2", query_pre_attn_scalar=16, sliding_window=8, **caps))


@family("LlavaForConditionalGeneration")
def llava_granite():
    factors = {
        "residual_multiplier": 0.22,
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.1,
    }
    return one_grid(text("granite", **factors))


@family("LlavaForConditionalGeneration")
def llava_gpt_oss():
    return one_grid(text("gpt_oss", sliding_window=8, rope_parameters=ROPE))


@family("LlavaForConditionalGeneration")
def llava_mixtral():
    return one_grid(text("mixtral"))


@family("VipLlavaForConditionalGeneration")
def vipllava():
    return one_grid(text("llama"), "vipllava", vision_feature_layers=[-1, -2])


@family("LlavaNextForConditionalGeneration")
def llava_next():
    hf = config(
        "llava_next", vision_config=vision("clip_vision_model"), text_config=text("mistral", sliding_window=None),
        image_token_index=IMAGE, vision_feature_layer=-2, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    images = image_processor(
        "LlavaNextImageProcessor", size={"shortest_edge": 32}, crop_size=SIDE, image_grid_pinpoints=PINPOINTS
    )
    words = tokenizer("<image>", starts=True, image_token="<image>")
    return hf, processor("LlavaNextProcessor", images, words, chat_template=INSTRUCT, **GRID)


@family("LlavaOnevisionForConditionalGeneration")
def llava_onevision():
    hf = config(
        "llava_onevision", vision_config=vision("siglip_vision_model", vision_use_head=False), text_config=text("qwen2"),
        image_token_index=IMAGE, video_token_index=301, vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    images = image_processor("LlavaOnevisionImageProcessor", size=SIDE, image_grid_pinpoints=PINPOINTS)
    words = tokenizer("<image>", "<video>", *TURNS, image_token="<image>", video_token="<video>")
    return hf, processor(
        "LlavaOnevisionProcessor", images, words, video="LlavaOnevisionVideoProcessor", num_image_tokens=16,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9", chat_template=turns("<image>\n"),
    )  # fmt: skip
