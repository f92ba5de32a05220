"""Families that stand alone: Cohere's, DeepSeek's and Ovis' designs, codes, documents, Llama 4."""

from .gemma import MIXED
from .parts import IMAGE, PINPOINTS, SIDE, config, family, image_processor, processor, text, vision
from .queries import ENCODER
from .tokenizers import TURNS, template, tokenizer, turns

COHERE = ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
COHERE_TURNS = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
CROPS = {"size": SIDE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
LOOK = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>")


# -- Cohere: attention and MLP side by side, tiles -------------------------------------------------


@family("AyaVisionForConditionalGeneration")
def aya_vision():
    hf = config(
        "aya_vision", vision_config=vision("siglip_vision_model", vision_use_head=False),
        text_config=text("cohere2", sliding_window=8, layer_types=MIXED), image_token_index=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full", downsample_factor=2, adapter_layer_norm_eps=1e-6,
    )  # fmt: skip
    tiles = ("TILE_1", "TILE_2", "TILE_3", "TILE_4", "TILE_GLOBAL")
    words = tokenizer("<|IMG_PATCH|>", "<image>", *LOOK, *tiles, *COHERE_TURNS, starts=True, image_token="<image>")
    return hf, processor(
        "AyaVisionProcessor", image_processor("GotOcr2ImageProcessor", **CROPS), words, patch_size=8, img_size=32,
        downsample_factor=2, chat_template=template("<image>", *COHERE),
    )  # fmt: skip


# -- a fixed number of tokens, images padded to a square -------------------------------------------

PLACEHOLDER = "<image_placeholder>"


@family("DeepseekVLForConditionalGeneration", word=PLACEHOLDER)
def deepseek_vl():
    hf = config(
        "deepseek_vl", vision_config=vision("siglip_vision_model", vision_use_head=False), text_config=text("llama"),
        image_token_id=IMAGE,
    )  # fmt: skip
    images = image_processor("DeepseekVLImageProcessor", size=SIDE, min_size=4)
    words = tokenizer(PLACEHOLDER, starts=True, image_token=PLACEHOLDER)
    turns_of_deepseek = template(PLACEHOLDER, "User: ", "Assistant:", "\n\n")
    return hf, processor("DeepseekVLProcessor", images, words, num_image_tokens=16, chat_template=turns_of_deepseek)


@family("JanusForConditionalGeneration", word=PLACEHOLDER)
def janus():
    codes = {
        "embed_dim": 8, "num_embeddings": 32, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1, "projection_dim": 64, "image_token_embed_dim": 64, "num_patches": 4,
    }  # fmt: skip
    hf = config(
        "janus", vision_config=vision("janus_vision_model", projection_dim=64, num_image_tokens=16), vq_config=codes,
        text_config=text("llama"), image_token_id=IMAGE,
    )  # fmt: skip
    names = {"image_token": PLACEHOLDER, "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer(PLACEHOLDER, "<begin_of_image>", "<end_of_image>", starts=True, **names)
    images = image_processor("JanusImageProcessor", size=SIDE, min_size=4)
    turns_of_janus = template(PLACEHOLDER + "\n", "<|User|>: ", "<|Assistant|>:", "\n\n")
    return hf, processor("JanusProcessor", images, words, num_image_tokens=16, chat_template=turns_of_janus)


# -- tiles and newlines ----------------------------------------------------------------------------


@family("Ovis2ForConditionalGeneration")
def ovis2():
    """Every token mixes a vocabulary of visual words; five indicators stand between the tiles."""
    eyes = vision("ovis2_vision", vocab_size=40, num_visual_indicator_tokens=5, hidden_stride=2)
    indicators = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    hf = config(
        "ovis2", vision_config=eyes, text_config=text("qwen2"), image_token_id=IMAGE, hidden_size=64,
        visual_indicator_token_ids=[302, 303, 304, 305, 306],
    )  # fmt: skip
    words = tokenizer("<IMG_ATOM>", "<image>", *indicators, *TURNS, image_token="<image>")
    images = image_processor("Ovis2ImageProcessor", **CROPS)
    return hf, processor("Ovis2Processor", images, words, image_seq_length=4, chat_template=turns("<image>\n"))


@family("Granite4VisionForConditionalGeneration")
def granite4_vision():
    """Tiles and newlines as LLaVA-NeXT's, states of the vision part added in two layers."""
    factors = {
        "residual_multiplier": 0.22,
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.1,
    }
    former = vision(
        "blip_2_qformer", hidden_size=64, encoder_hidden_size=64, num_attention_heads=1, num_hidden_layers=1
    )
    eyes = vision("siglip_vision_model", num_hidden_layers=3, hidden_size=64, vision_use_head=False)
    hf = config(
        "granite4_vision", vision_config=eyes, text_config=text("granite4_vision_text", **factors), qformer_config=former,
        image_token_index=IMAGE, downsample_rate="1/2", deepstack_layer_map=[[-1, 0], [-2, 1]], spatial_target_layers=[1],
        image_grid_pinpoints=PINPOINTS, vision_feature_select_strategy="full",
    )  # fmt: skip
    images = image_processor(
        "LlavaNextImageProcessor", size={"shortest_edge": 32}, crop_size=SIDE, image_grid_pinpoints=PINPOINTS
    )
    words = tokenizer("<image>", "<|user|>", "<|assistant|>", image_token="<image>")
    return hf, processor(
        "Granite4VisionProcessor", images, words, patch_size=8, vision_feature_select_strategy="full",
        downsample_rate="1/2", chat_template=template("<image>\n", "<|user|>\n", "<|assistant|>\n"),
    )  # fmt: skip


@family("AriaForConditionalGeneration", word="<|img|>")
def aria():
    """Its processor makes every image 980 pixels wide and high: 14 x 14 patches of 70 pixels."""
    hf = config(
        "aria", vision_config=vision("idefics3_vision", image_size=980, patch_size=70), text_config=text("aria_text"),
        projector_patch_to_query_dict={14 * 14: 6}, image_token_index=IMAGE,
    )  # fmt: skip
    words = tokenizer("<|img|>", *TURNS, image_token="<|img|>")
    return hf, processor(
        "AriaProcessor",
        image_processor("AriaImageProcessor"),
        words,
        size_conversion={980: 6},
        chat_template=turns("<|img|>"),
    )


# -- images as codes, documents --------------------------------------------------------------------


@family("Emu3ForConditionalGeneration")
def emu3():
    """A patch of 8 x 8 pixels is the nearest of 8 codes; a row ends with a code of its own."""
    codes = {
        "codebook_size": 8, "embed_dim": 8, "latent_channels": 8, "temporal_downsample_factor": 1, "base_channels": 32,
        "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "hidden_size": 32, "attn_resolutions": [],
    }  # fmt: skip
    visual = [f"<|visual token {code:06d}|>" for code in range(8)]
    special = {
        "boi_token": "<|image start|>", "eoi_token": "<|image end|>", "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    }  # fmt: skip
    pieces = ["<image>", "<|extra_200|>", *special.values(), *visual]
    words = tokenizer(*pieces, image_token="<image>", **special)
    hf = config(
        "emu3", text_config=text("emu3_text_model", attention_dropout=0.0), vq_config=codes, image_token_id=IMAGE,
        vocabulary_map={piece: words.convert_tokens_to_ids(piece) for piece in pieces},
    )  # fmt: skip
    images = image_processor("Emu3ImageProcessor", min_pixels=32 * 32, max_pixels=32 * 32, spatial_factor=8)
    return hf, processor("Emu3Processor", images, words, chat_template=template("<image>"))


@family("GotOcr2ForConditionalGeneration", word="<imgpad>")
def got_ocr2():
    """Its processor writes 256 tokens for an image, so that the vision part gives 16 x 16."""
    eyes = vision(
        "got_ocr2_vision", image_size=128, patch_size=2, output_channels=16, global_attn_indexes=[], window_size=4,
        mlp_dim=64,
    )  # fmt: skip
    hf = config("got_ocr2", vision_config=eyes, text_config=text("qwen2"), image_token_index=IMAGE)
    images = image_processor("GotOcr2ImageProcessor", size={"height": 128, "width": 128})
    words = tokenizer("<imgpad>", "<img>", "</img>", *TURNS)
    return hf, processor("GotOcr2Processor", images, words)


@family("Florence2ForConditionalGeneration", word="", images=1, refused=ENCODER)
def florence2():
    eyes = {
        "embed_dim": [16, 32], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2], "patch_size": [7, 3],
        "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4,
        "projection_dim": 64, "drop_path_rate": 0.0,
    }  # fmt: skip
    bart = text(
        "bart", d_model=64, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, init_std=0.15, dropout=0.0, decoder_start_token_id=2,
    )  # fmt: skip
    hf = config("florence2", vision_config=eyes, text_config=bart, image_token_id=IMAGE)
    images = image_processor("CLIPImageProcessor", size=SIDE, do_center_crop=False)
    images.image_seq_length = 17  # 16 places, and their mean
    words = tokenizer("<image>", image_token="<image>")
    return hf, processor("Florence2Processor", images, words)
