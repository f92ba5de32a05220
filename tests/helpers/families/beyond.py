"""Families beyond those that were asked for: kin of the others, and designs of their own."""

from mechvlm.vlm.processors import NoVideos

from .llava_like import GRID, LLAMA, one_grid
from .parts import (
    IMAGE,
    MROPE,
    PINPOINTS,
    ROPE,
    SIDE,
    TEXT,
    VOCABULARY,
    config,
    family,
    image_processor,
    processor,
    text,
    vision,
)
from .queries import OPT, second
from .qwen import GLM_WORD, IDS, PATCHES, SIZES, WORD, glm, images, words
from .tiles import TAGGED, TAGS
from .tokenizers import TURNS, template, tokenizer, turns

# -- LLaVA's kin -----------------------------------------------------------------------------------


@family("LlavaForConditionalGeneration")
def llava_gptj():
    """Attention without an interface, in line with the MLP; a bias at the unembedding."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_positions": 1024}
    return one_grid(config("gptj", **sizes, initializer_range=0.15, bos_token_id=1, eos_token_id=2))


@family("LlavaNextVideoForConditionalGeneration")
def llava_next_video():
    hf = config(
        "llava_next_video", vision_config=vision("clip_vision_model"), text_config=text("llama"), image_token_index=IMAGE,
        video_token_index=301, vision_feature_layer=-2, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    tiles = image_processor(
        "LlavaNextImageProcessor", size={"shortest_edge": 32}, crop_size=SIDE, image_grid_pinpoints=PINPOINTS
    )
    pieces = tokenizer("<image>", "<video>", starts=True, image_token="<image>", video_token="<video>")
    video = "LlavaNextVideoVideoProcessor"
    return hf, processor("LlavaNextVideoProcessor", tiles, pieces, video=video, chat_template=LLAMA, **GRID)


@family("VideoLlavaForConditionalGeneration")
def video_llava():
    """Its images have a name of their own, pixel_values_images."""
    hf = config(
        "video_llava", vision_config=vision("clip_vision_model"), text_config=text("llama"), image_token_index=IMAGE,
        video_token_index=301, vision_feature_layer=-2,
    )  # fmt: skip
    grid = image_processor("VideoLlavaImageProcessor", size={"shortest_edge": 32}, crop_size=SIDE)
    pieces = tokenizer("<image>", "<video>", starts=True)
    video = "VideoLlavaVideoProcessor"
    return hf, processor("VideoLlavaProcessor", grid, pieces, video=video, chat_template=LLAMA, **GRID)


@family("Blip2ForConditionalGeneration", word="", images=1, refused="its norms come after the branches")
def blip2_post_norm():
    return second(text("opt", **OPT, do_layer_norm_before=False))


# -- Qwen's kin ------------------------------------------------------------------------------------


@family("Qwen3_5ForConditionalGeneration", word=WORD)
def qwen3_5():
    """Two of its four layers have linear attention; the heads of the others are gated."""
    linear = {
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }  # fmt: skip
    decoder = text(
        "qwen3_5_text", num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, **linear,
        rope_parameters={**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
    )  # fmt: skip
    eyes = vision("qwen3_5_vision", **PATCHES, out_hidden_size=64, num_position_embeddings=16)
    hf = config("qwen3_5", vision_config=eyes, text_config=decoder, **IDS)
    return hf, processor(
        "Qwen3VLProcessor", images(), words(video_words=True), video="Qwen3VLVideoProcessor", chat_template=turns(WORD)
    )


@family("Glm4vMoeForConditionalGeneration", word=GLM_WORD)
def glm4v_moe():
    return glm("glm4v_moe", "glm4v_moe", "Glm4v")


@family("Glm46VForConditionalGeneration", word=GLM_WORD)
def glm46v():
    return glm("glm46v", "glm4v", "Glm46V")


@family("PaddleOCRVLForConditionalGeneration", word="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
def paddleocr_vl():
    hf = config(
        "paddleocr_vl", vision_config=vision("paddleocr_vl_vision", spatial_merge_size=2),
        text_config=text("paddleocr_vl_text", rope_parameters=MROPE), **IDS,
    )  # fmt: skip
    word = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    pieces = tokenizer(
        "<|IMAGE_PLACEHOLDER|>", "<|VIDEO|>", "<|IMAGE_START|>", "<|IMAGE_END|>", image_token="<|IMAGE_PLACEHOLDER|>"
    )
    grid = image_processor("PaddleOCRVLImageProcessor", patch_size=8, merge_size=2, size=SIZES)
    return hf, processor("PaddleOCRVLProcessor", grid, pieces, chat_template=template(word, "User: ", "Assistant: "))


ERNIE_WORD = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"


@family("Ernie4_5_VLMoeForConditionalGeneration", word=ERNIE_WORD)
def ernie4_5_vl_moe():
    """Text and image tokens have experts of their own."""
    eyes = vision("ernie4_5_vl_moe_vision", **PATCHES)
    rope = {**ROPE, "mrope_section": [3, 3, 2]}
    decoder = text(
        "ernie4_5_vl_moe_text", rope_parameters=rope, moe_intermediate_size=[32, 16], moe_num_experts=4, moe_k=2
    )
    hf = config(
        "ernie4_5_vl_moe", vision_config=eyes, text_config=decoder, image_token_id=IMAGE, video_token_id=301,
        image_start_token_id=302, image_end_token_id=303, video_start_token_id=304, video_end_token_id=305,
    )  # fmt: skip
    names = {
        "image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>",
        "image_end_token": "<|IMAGE_END|>", "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>",
    }  # fmt: skip
    grid = image_processor("Ernie4_5_VLMoeImageProcessor", patch_size=8, merge_size=2, size=SIZES)
    made = processor(
        "Ernie4_5_VLMoeProcessor", grid, tokenizer(*names.values(), **names), video="Ernie4_5_VLMoeVideoProcessor",
        chat_template=template(ERNIE_WORD, "User: ", "Assistant: "),
    )  # fmt: skip
    if isinstance(made.video_processor, NoVideos):  # what it stores names a font
        made.video_processor["font"] = "Roboto-Regular.ttf"
    else:
        made.video_processor.draw_on_frames = False
    return hf, made


@family("VideoLlama3ForConditionalGeneration", word="<|image_pad|>")
def video_llama_3():
    hf = config(
        "video_llama_3", vision_config=vision("video_llama_3_vision"), text_config=text("qwen2"), image_token_id=IMAGE,
        video_token_id=301,
    )  # fmt: skip
    grid = image_processor("VideoLlama3ImageProcessor", patch_size=8, merge_size=2, size=SIZES)
    return hf, processor(
        "VideoLlama3Processor", grid, words(), video="VideoLlama3VideoProcessor", chat_template=turns("<|image_pad|>\n")
    )


@family("HyperCLOVAXVisionV2ForConditionalGeneration", word="<|image_pad|>")
def hyperclovax():
    eyes = vision("qwen2_5_vl_vision", **PATCHES, out_hidden_size=64, fullatt_block_indexes=[1], window_size=32)
    hf = config(
        "hyperclovax_vision_v2", vision_config=eyes, text_config=text("hyperclovax"), image_token_id=IMAGE,
        video_token_id=301,
    )  # fmt: skip
    video = "Qwen2VLVideoProcessor"
    chat = turns("<|image_pad|>\n")
    return hf, processor("HyperCLOVAXVisionV2Processor", images(), words(), video=video, chat_template=chat)


# -- tiles and rows --------------------------------------------------------------------------------


@family("LightOnOcrForConditionalGeneration", word="<|image_pad|>")
def lighton_ocr():
    hf = config(
        "lighton_ocr", vision_config=vision("pixtral", image_size=64), text_config=text("qwen3"), image_token_id=IMAGE,
        spatial_merge_size=2,
    )  # fmt: skip
    names = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    rows = image_processor("PixtralImageProcessor", size={"longest_edge": 64}, patch_size=16)
    pieces = tokenizer(*names.values(), *TURNS, **names)
    return hf, processor(
        "LightOnOcrProcessor", rows, pieces, patch_size=8, spatial_merge_size=2, chat_template=turns("<|image_pad|>")
    )


@family("GraniteDoclingForConditionalGeneration")
def granite_docling():
    eyes = vision("granite_docling_vision", out_hidden_size=64, scale_factor=2, deepstack_visual_indexes=[0, 1])
    hf = config("granite_docling", vision_config=eyes, text_config=text("granite_docling_text"), image_token_id=IMAGE)
    places = [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]
    tiles = image_processor(
        "GraniteDoclingImageProcessor", size=SIDE, crop_to_patches=True, min_patches=1, max_patches=4
    )
    pieces = tokenizer("<image>", *TAGS, *places)
    return hf, processor("GraniteDoclingProcessor", tiles, pieces, image_seq_len=4, chat_template=TAGGED)


@family("QianfanOCRForConditionalGeneration")
def qianfan_ocr():
    hf = config(
        "qianfan_ocr", vision_config=vision("qianfan_ocr_vision", image_size=[32, 32], patch_size=[8, 8]),
        text_config=text("qwen3"), image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    pieces = tokenizer("<IMG_CONTEXT>", "<img>", "</img>", "<image>", *TURNS, **names)
    tiles = image_processor("GotOcr2ImageProcessor", size=SIDE, crop_to_patches=True, min_patches=1, max_patches=4)
    chat = turns("<image>\n")
    return hf, processor("QianfanOCRProcessor", tiles, pieces, image_seq_length=4, chat_template=chat)


@family("DeepseekVLHybridForConditionalGeneration", word="<image_placeholder>")
def deepseek_vl_hybrid():
    """A second vision part, SAM's, sees the image at a resolution of its own."""
    wide = vision(
        "sam_vision_model", image_size=64, output_channels=16, global_attn_indexes=[1], window_size=4, mlp_dim=64
    )
    hf = config(
        "deepseek_vl_hybrid", vision_config=vision("siglip_vision_model", vision_use_head=False),
        high_res_vision_config=wide, text_config=text("llama"), image_token_id=IMAGE,
    )  # fmt: skip
    pieces = tokenizer("<image_placeholder>", starts=True, image_token="<image_placeholder>")
    both = image_processor(
        "DeepseekVLHybridImageProcessor", size=SIDE, high_res_size={"height": 64, "width": 64}, min_size=4
    )
    chat = template("<image_placeholder>", "User: ", "Assistant:", "\n\n")
    return hf, processor("DeepseekVLHybridProcessor", both, pieces, num_image_tokens=16, chat_template=chat)


# -- codes -----------------------------------------------------------------------------------------


@family("ChameleonForConditionalGeneration")
def chameleon():
    """An image is 16 codes of the decoder's own vocabulary, which it may not write."""
    codes = {
        "embed_dim": 8, "num_embeddings": 32, "latent_channels": 8, "resolution": 32, "base_channels": 32,
        "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
    }  # fmt: skip
    visual = [f"IMGIMG{chr(65 + code // 10)}{chr(65 + code % 10)}Z" for code in range(32)]
    pieces = tokenizer("<image>", "<racm3:break>", "<eoss>", "<sep>", *visual, starts=True, sep_token="<sep>")
    names = {name: value for name, value in TEXT.items() if name != "head_dim"}
    vocabulary = {piece: pieces.convert_tokens_to_ids(piece) for piece in ("<image>", *visual)}
    hf = config("chameleon", **names, vq_config=codes, vocabulary_map=vocabulary, image_token_id=IMAGE)
    whole = image_processor("ChameleonImageProcessor", size={"shortest_edge": 32}, crop_size=SIDE)
    return hf, processor("ChameleonProcessor", whole, pieces, image_seq_length=16)
