"""Families whose image processors, or vision parts, need torchvision (and timm)."""

import transformers

from .gemma import GEMMA, LARGE, MIXED
from .gemma import TURNS as GEMMA_TURNS
from .others import COHERE, COHERE_TURNS, CROPS, LOOK
from .parts import IMAGE, ROPE, SIDE, VOCABULARY, config, family, image_processor, processor, text, vision
from .tokenizers import TURNS, template, tokenizer, turns


@family("Cohere2VisionForConditionalGeneration", word="<|IMG_PATCH|>", needs=("torchvision",))
def cohere2_vision():
    hf = config(
        "cohere2_vision", vision_config=vision("siglip_vision_model", vision_use_head=False),
        text_config=text("cohere2", sliding_window=8, layer_types=MIXED), image_token_id=IMAGE, downsample_factor=2,
        alignment_intermediate_size=64,
    )  # fmt: skip
    names = {
        "image_token": "<|IMG_PATCH|>", "boi_token": LOOK[0], "eoi_token": LOOK[1], "img_line_break_token": LOOK[2],
    }  # fmt: skip
    words = tokenizer("<|IMG_PATCH|>", *LOOK, *COHERE_TURNS, starts=True, **names)
    images = image_processor("Cohere2VisionImageProcessor", **CROPS, patch_size=2)  # tokens a side
    return hf, processor("Cohere2VisionProcessor", images, words, chat_template=template("<|IMG_PATCH|>", *COHERE))


@family("FastVlmForConditionalGeneration", needs=("torchvision", "timm"))
def fast_vlm():
    layers = {"layers": (1, 1, 1, 1, 1), "embed_dims": (8, 16, 32, 32, 32), "inference_mode": False}
    eyes = {
        "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg",
        "hidden_size": 64, "model_args": layers,
    }  # fmt: skip
    hf = config("fast_vlm", vision_config=eyes, text_config=text("qwen2"), image_token_index=IMAGE)
    images = image_processor("CLIPImageProcessor", size={"shortest_edge": 256}, crop_size={"height": 256, "width": 256})
    words = tokenizer("<image>", *TURNS, image_token="<image>")
    settings = {"patch_size": 64, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    return hf, processor("LlavaProcessor", images, words, chat_template=turns("<image>\n"), **settings)


@family("Llama4ForConditionalGeneration", word="<|image|>", needs=("torchvision",))
def llama4():
    """Every second layer has experts; every layer attends within chunks of 64 positions."""
    eyes = vision(
        "llama4_vision_model", intermediate_size=128, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32,
        pixel_shuffle_ratio=0.5, rope_parameters=ROPE,
    )  # fmt: skip
    decoder = text(
        "llama4_text",
        intermediate_size_mlp=96,
        interleave_moe_layer_step=2,
        rope_parameters=ROPE,
        attention_chunk_size=64,
    )
    hf = config("llama4", vision_config=eyes, text_config=decoder, image_token_index=IMAGE)
    marks = ("<|image|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
    words = tokenizer("<|patch|>", *marks, "<|header_start|>", "<|header_end|>", "<|eot|>", starts=True)
    images = image_processor("Llama4ImageProcessor", size=SIDE, max_patches=4)
    header = "<|header_start|>{}<|header_end|>\n"
    turns_of_llama = template("<|image|>", header.format("user"), header.format("assistant"), "<|eot|>")
    return hf, processor(
        "Llama4Processor", images, words, patch_size=8, pixel_shuffle_ratio=0.5, fake_image_token="<|image|>",
        image_token="<|image|>", chat_template=turns_of_llama,
    )  # fmt: skip


@family(
    "Gemma3nForConditionalGeneration",
    word="<image_soft_token>",
    needs=("torchvision", "timm"),
    refused="its states are several side by side",
)
def gemma3n():
    decoder = text(
        "gemma3n_text", num_hidden_layers=4, sliding_window=8, layer_types=[*MIXED, "full_attention"],
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=0, laurel_rank=8,
        altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4, intermediate_size=[96] * 4, final_logit_softcapping=10.0,
    )  # fmt: skip
    eyes = {
        "model_type": "gemma3n_vision",
        "architecture": "resnet10t",
        "hidden_size": 2048,
        "vocab_offset": 308,
        "vocab_size": 4,
    }
    ears = {
        "hidden_size": 32,
        "vocab_offset": 312,
        "vocab_size": 4,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1,
    }
    hf = config(
        "gemma3n", text_config=decoder, vision_config=eyes, audio_config=ears, image_token_id=IMAGE, boi_token_id=301,
        eoi_token_id=302, audio_token_id=303, vision_soft_tokens_per_image=16,
    )  # fmt: skip
    names = {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        "audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>",
    }  # fmt: skip
    words = tokenizer(*names.values(), *GEMMA_TURNS, starts=True, **names)
    return hf, processor(
        "Gemma3nProcessor", image_processor("SiglipImageProcessor", size=LARGE), words, image_seq_length=16,
        feature_extractor=transformers.Gemma3nAudioFeatureExtractor(), chat_template=template("<image_soft_token>", *GEMMA),
    )  # fmt: skip


@family("Lfm2VlForConditionalGeneration", needs=("torchvision",))
def lfm2_vl():
    """Two of its three layers are short convolutions."""
    decoder = text("lfm2", layer_types=["conv", "full_attention", "conv"])
    hf = config(
        "lfm2_vl", vision_config=vision("siglip2_vision_model", num_patches=16, vision_use_head=False), text_config=decoder,
        image_token_id=IMAGE, downsample_factor=2, projector_hidden_size=64, encoder_patch_size=8,
    )  # fmt: skip
    marks = ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
    places = [f"<|img_row_{row}_col_{col}|>" for row in range(1, 4) for col in range(1, 4)]
    words = tokenizer("<image>", *marks, *places, *TURNS, starts=True, image_token="<image>")
    images = image_processor(
        "Lfm2VlImageProcessor", size=SIDE, tile_size=32, encoder_patch_size=8, min_image_tokens=1, max_image_tokens=4,
        min_tiles=2, max_tiles=4,
    )  # fmt: skip
    return hf, processor("Lfm2VlProcessor", images, words, chat_template=turns("<image>"))


@family("Kimi_K25ForConditionalGeneration", word="<|media_pad|>", needs=("torchvision",))
def kimi():
    """DeepSeek's latent attention: keys and values come from one vector of width 16."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    decoder = text("deepseek_v3", num_key_value_heads=4, **latent)
    eyes = vision("kimi_k25_vision", pos_emb_height=8, pos_emb_width=8, pos_emb_time=1)
    hf = config("kimi_k25", vision_config=eyes, projection_hidden_size=32, text_config=decoder, image_token_id=IMAGE)
    names = {"image_token": "<|media_pad|>", "video_token": "<|video|>"}
    words = tokenizer("<|media_pad|>", "<|video|>", *TURNS, **names)
    images = image_processor(
        "Kimi_K25ImageProcessor", size={"max_height": 64, "max_width": 64}, patch_size=8, max_patches=64
    )
    return hf, processor(
        "Kimi_K25Processor", images, words, video="Kimi_K25VideoProcessor", chat_template=turns("<|media_pad|>")
    )


@family("Molmo2ForConditionalGeneration", word="<|image|>", needs=("torchvision",))
def molmo2():
    """A small view of the whole image, then overlapping crops; marks between the rows."""
    eyes = vision("molmo2_vision", head_dim=8, num_key_value_heads=4, image_size=[32, 32], num_position_embeddings=16)
    adapter = config(
        "molmo2_adapter", vision_feature_layer=[-1, -2], hidden_size=32, num_attention_heads=4, num_key_value_heads=4,
        head_dim=8, intermediate_size=64, text_hidden_size=64,
    )  # fmt: skip
    marks = ("<im_start>", "<im_end>", "<low_res_im_start>", "<frame_start>", "<frame_end>", "<im_col>", "<im_low>")
    words = tokenizer("<im_patch>", *marks, "<|image|>", "<|video|>", *TURNS, image_token="<|image|>")
    hf = config(
        "molmo2", vision_config=eyes, adapter_config=adapter, text_config=text("molmo2_text", additional_vocab_size=8),
        image_patch_id=IMAGE, image_start_token_id=301,
        image_end_token_id=302, low_res_image_start_token_id=303, frame_start_token_id=304, frame_end_token_id=305,
    )  # fmt: skip
    images = image_processor(
        "Molmo2ImageProcessor", size=SIDE, patch_size=8, max_crops=2, pooling_size=[2, 2], overlap_margins=[1, 1]
    )
    return hf, processor(
        "Molmo2Processor", images, words, video="Molmo2VideoProcessor", chat_template=turns("<|image|>")
    )


@family("PerceptionLMForConditionalGeneration", word="<|image|>", needs=("torchvision", "timm"))
def perception_lm():
    settings = {
        "embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": (32, 32), "patch_size": 8, "global_pool": "",
        "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": (4, 4),
    }  # fmt: skip
    eyes = {
        "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "do_pooling": True, "num_classes": 0,
        "model_args": settings,
    }  # fmt: skip
    hf = config(
        "perception_lm", vision_config=eyes, text_config=text("llama"), vision_use_cls_token=True,
        projector_pooling_ratio=2, image_token_id=IMAGE, video_token_id=301,
    )  # fmt: skip
    words = tokenizer("<|image|>", "<|video|>", starts=True, image_token="<|image|>", video_token="<|video|>")
    images = image_processor("PerceptionLMImageProcessor", tile_size=32, max_num_tiles=4)
    return hf, processor(
        "PerceptionLMProcessor", images, words, video="PerceptionLMVideoProcessor", patch_size=8, pooling_ratio=2,
        chat_template=template("<|image|>", "user\n", "assistant\n"),
    )  # fmt: skip
