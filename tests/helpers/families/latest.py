"""Families that came last: latent attention, convolutions, gates, linear attention."""

from .parts import IMAGE, ROPE, config, family, image_processor, processor, text, vision
from .qwen import GLM_WORD, IDS, PATCHES, SIZES, WORD, glm, images, words
from .tiles import rows_of_patches
from .tokenizers import TURNS, template, tokenizer, turns

LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
QUARTER = {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}


@family("GlmOcrForConditionalGeneration", word=GLM_WORD)
def glm_ocr():
    return glm("glm_ocr", "glm_ocr", "Glm46V")


@family("Mistral3ForConditionalGeneration", word="[IMG]")
def mistral4():
    """Latent attention, experts in every layer; queries are scaled by their position."""
    eyes = vision("pixtral", image_size=64)
    decoder = text("mistral4", num_key_value_heads=4, head_dim=16, **LATENT)
    ids = {"image_token_index": IMAGE, "spatial_merge_size": 2, "vision_feature_layer": -1}
    return rows_of_patches(config("mistral3", vision_config=eyes, text_config=decoder, **ids), merge=2)


@family("Qwen3_5MoeForConditionalGeneration", word=WORD)
def qwen3_5_moe():
    decoder = text(
        "qwen3_5_moe_text", num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, **LINEAR,
        shared_expert_intermediate_size=32, rope_parameters=QUARTER,
    )  # fmt: skip
    eyes = vision("qwen3_5_moe_vision", **PATCHES, out_hidden_size=64, num_position_embeddings=16)
    hf = config("qwen3_5_moe", vision_config=eyes, text_config=decoder, **IDS)
    return hf, processor(
        "Qwen3VLProcessor", images(), words(video_words=True), video="Qwen3VLVideoProcessor", chat_template=turns(WORD)
    )


@family("Lfm3VlForConditionalGeneration", word=WORD)
def lfm3_vl():
    """Convolutions beside sliding and full attention, whose output is gated; sandwich norms."""
    layers = ["conv", "full_attention", "conv", "sliding_attention"]
    eyes = vision(
        "lfm3_vl_vision", spatial_merge_size=2, temporal_patch_size=2, in_channels=3, num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )  # fmt: skip
    decoder = text("lfm3", num_hidden_layers=4, layer_types=layers, sliding_window=8)
    hf = config("lfm3_vl", vision_config=eyes, text_config=decoder, projector_hidden_size=64, **IDS)
    return hf, processor("Lfm3VlProcessor", images(), words(), video="Qwen3VLVideoProcessor", chat_template=turns(WORD))


COMPASS_WORD = "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>"


@family("CohereCompassForConditionalGeneration", word=COMPASS_WORD)
def cohere_compass():
    """Cohere's layers, and states of the vision part added in the first two."""
    eyes = vision(
        "cohere_compass_vision",
        **PATCHES,
        out_hidden_size=64,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    hf = config(
        "cohere_compass",
        vision_config=eyes,
        text_config=text("cohere_compass_text", rope_parameters={"full_attention": ROPE}),
        **IDS,
    )
    names = {"image_token": "<|IMAGE_PAD|>", "video_token": "<|VIDEO_PAD|>"}
    pieces = tokenizer(*names.values(), "<|VISION_START|>", "<|VISION_END|>", *TURNS, **names)
    return hf, processor(
        "CohereCompassProcessor", images("CohereCompassImageProcessor"), pieces, video="CohereCompassVideoProcessor",
        chat_template=turns(COMPASS_WORD),
    )  # fmt: skip


HUNYUAN_WORD = "<|im_start_image|><|image|><|im_end_image|>"


@family("HunYuanVLForConditionalGeneration", word=HUNYUAN_WORD)
def hunyuan_vl():
    """Rows of tokens with a newline each, and two tokens around the image."""
    eyes = vision(
        "hunyuan_vl_vision", num_key_value_heads=4, out_hidden_size=64, text_hidden_size=64, spatial_merge_size=2,
        max_image_size=64, min_image_size=16,
    )  # fmt: skip
    rope = {**ROPE, "mrope_section": [2, 2, 2, 2]}
    hf = config(
        "hunyuan_vl", vision_config=eyes, text_config=text("hunyuan_vl_text", rope_parameters=rope), image_token_id=IMAGE,
        im_start_id=301, im_end_id=302, im_newline_id=303,
    )  # fmt: skip
    names = {
        "image_token": "<|image|>",
        "image_start_token": "<|im_start_image|>",
        "image_end_token": "<|im_end_image|>",
    }
    pieces = tokenizer(*names.values(), "<|im_newline|>", "<|User|>", "<|Assistant|>", **names)
    grid = image_processor("HunYuanVLImageProcessor", patch_size=8, merge_size=2, size=SIZES)
    chat = template(HUNYUAN_WORD, "<|User|>", "<|Assistant|>")
    return hf, processor("HunYuanVLProcessor", grid, pieces, chat_template=chat)


@family("MiniCPMV4_6ForConditionalGeneration", word="<|image_pad|>")
def minicpm_v():
    """An overview and slices of the image, 4 x 4 patches to a token."""
    decoder = text(
        "qwen3_5_text", num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, **LINEAR,
        rope_parameters={**ROPE, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    eyes = vision("minicpmv4_6_vision", insert_layer_id=1)
    hf = config(
        "minicpmv4_6", vision_config=eyes, text_config=decoder, image_token_id=IMAGE, video_token_id=301, insert_layer_id=1,
        image_size=32,
    )  # fmt: skip
    names = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
        "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
    }  # fmt: skip
    slices = image_processor("MiniCPMV4_6ImageProcessor", max_slice_nums=4, scale_resolution=32, patch_size=8)
    pieces = tokenizer(*names.values(), *TURNS, **names)
    video = "MiniCPMV4_6VideoProcessor"
    return hf, processor("MiniCPMV4_6Processor", slices, pieces, video=video, chat_template=turns("<|image_pad|>"))
