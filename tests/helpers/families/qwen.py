"""Qwen-VL and its kin: images of any size, 2 x 2 patches to a token, three-part positions."""

from .parts import IMAGE, MROPE, ROPE, config, family, image_processor, processor, text, vision
from .tokenizers import TURNS, template, tokenizer, turns

WORD = "<|vision_start|><|image_pad|><|vision_end|>"
PATCHES = {
    "depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
IDS = {"image_token_id": IMAGE, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
SIZES = {"shortest_edge": 256, "longest_edge": 4096}
"""Numbers of pixels: from 1 to 16 tokens an image."""


def images(kind: str = "Qwen2VLImageProcessor"):
    return image_processor(kind, patch_size=8, merge_size=2, temporal_patch_size=2, size=SIZES)


def words(video_words: bool = False):
    others = ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>", *TURNS)
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    if video_words:
        names |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    return tokenizer("<|image_pad|>", *others, **names)


@family("Qwen2VLForConditionalGeneration", word=WORD)
def qwen2_vl():
    hf = config(
        "qwen2_vl", vision_config=vision("qwen2_vl_vision", **PATCHES, embed_dim=32, hidden_size=64),
        text_config=text("qwen2_vl_text", rope_parameters=MROPE), **IDS,
    )  # fmt: skip
    return hf, processor(
        "Qwen2VLProcessor", images(), words(), video="Qwen2VLVideoProcessor", chat_template=turns(WORD)
    )


@family("Qwen2_5_VLForConditionalGeneration", word=WORD)
def qwen2_5_vl():
    """Its first vision layer attends within windows of 32 x 32 pixels."""
    eyes = vision("qwen2_5_vl_vision", **PATCHES, out_hidden_size=64, fullatt_block_indexes=[1], window_size=32)
    hf = config("qwen2_5_vl", vision_config=eyes, text_config=text("qwen2_5_vl_text", rope_parameters=MROPE), **IDS)
    return hf, processor(
        "Qwen2_5_VLProcessor", images(), words(), video="Qwen2VLVideoProcessor", chat_template=turns(WORD)
    )


def third(name: str, **settings):
    """Qwen3-VL: the first two layers add states of the vision part at the image's positions."""
    eyes = vision(
        f"{name}_vision", **PATCHES, out_hidden_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]
    )
    hf = config(name, vision_config=eyes, text_config=text(f"{name}_text", rope_parameters=MROPE, **settings), **IDS)
    return hf, processor(
        "Qwen3VLProcessor", images(), words(video_words=True), video="Qwen3VLVideoProcessor", chat_template=turns(WORD)
    )


@family("Qwen3VLForConditionalGeneration", word=WORD)
def qwen3_vl():
    return third("qwen3_vl")


@family("Qwen3VLMoeForConditionalGeneration", word=WORD)
def qwen3_vl_moe():
    return third("qwen3_vl_moe")


GLM_WORD = "<|begin_of_image|><|image|><|end_of_image|>"


def glm(model_type: str, part: str, kind: str):
    rope = {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    hf = config(
        model_type, vision_config=vision(f"{part}_vision", **PATCHES, out_hidden_size=64),
        text_config=text(f"{part}_text", rope_parameters=rope), image_token_id=IMAGE, video_token_id=301,
        image_start_token_id=302, image_end_token_id=303, video_start_token_id=304, video_end_token_id=305,
    )  # fmt: skip
    others = ("<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    pieces = tokenizer("<|image|>", *others, "<|user|>", "<|assistant|>", **names)
    return hf, processor(
        f"{kind}Processor", images(f"{kind}ImageProcessor"), pieces, video=f"{kind}VideoProcessor",
        chat_template=template(GLM_WORD, "<|user|>\n", "<|assistant|>\n", ""),
    )  # fmt: skip


@family("Glm4vForConditionalGeneration", word=GLM_WORD)
def glm4v():
    return glm("glm4v", "glm4v", "Glm4v")


@family("Exaone4_5_ForConditionalGeneration", word=WORD)
def exaone4_5():
    eyes = vision(
        "exaone4_5_vision",
        **PATCHES,
        num_key_value_heads=4,
        out_hidden_size=64,
        fullatt_block_indexes=[1],
        window_size=32,
    )
    ids = {name: id for name, id in IDS.items() if name in ("image_token_id", "video_token_id")}
    hf = config("exaone4_5", vision_config=eyes, text_config=text("exaone4"), **ids)
    return hf, processor(
        "Exaone4_5_Processor", images(), words(), video="Qwen2VLVideoProcessor", chat_template=turns(WORD)
    )
