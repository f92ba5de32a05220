"""Classes without a record and without a relative in the other files: checks of the derivation."""

from .latest import LATENT
from .parts import IMAGE, MROPE, config, family, image_processor, processor, text, vision
from .qwen import IDS, PATCHES, SIZES, WORD, images, words
from .tiles import rows_of_patches
from .tokenizers import turns


@family("Cosmos3EdgeForConditionalGeneration", word=WORD)
def cosmos3_edge():
    """MLPs of two matrices, ReLU squared; its processor gives the tokens' types when asked."""
    eyes = vision("cosmos3_edge_vision", num_patches=16, spatial_merge_size=2)
    decoder = text("cosmos3_edge_text", rope_parameters=MROPE)
    hf = config("cosmos3_edge", vision_config=eyes, text_config=decoder, projector_hidden_size=64, **IDS)
    grid = image_processor("Cosmos3EdgeImageProcessor", patch_size=8, merge_size=2, size=SIZES)
    video = "Cosmos3EdgeVideoProcessor"
    return hf, processor("Cosmos3EdgeProcessor", grid, words(video_words=True), video=video, chat_template=turns(WORD))


@family("MistralLarge4ForConditionalGeneration", word="[IMG]")
def mistral_large4():
    """Latent attention to positions that an indexer chooses, here all; capped logits."""
    chosen = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
    latent = {name: size for name, size in LATENT.items() if name != "q_lora_rank"}
    decoder = text("mistral_large4_text", num_key_value_heads=4, head_dim=16, **chosen, **latent)
    eyes = vision("pixtral", image_size=64)
    ids = {"image_token_index": IMAGE, "spatial_merge_size": 2}
    return rows_of_patches(config("mistral_large4", vision_config=eyes, text_config=decoder, **ids), merge=2)


@family("Qwen4ExpForConditionalGeneration", word=WORD, refused="several streams, mixed before the unembedding")
def qwen4_exp():
    linear = {
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }  # fmt: skip
    ngrams = {
        "ngram_vocab_size_base": 100, "split_ngram_parts": 1, "ple_embed_dim": 16, "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
    }  # fmt: skip
    indexer = {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    }  # fmt: skip
    decoder = text(
        "qwen4_exp_text", num_hidden_layers=4, shared_expert_intermediate_size=32, hc_count=2, hc_lowrank=8, **linear,
        **ngrams, **indexer,
    )  # fmt: skip
    eyes = vision("qwen4_exp_vision", **PATCHES, out_hidden_size=64, num_position_embeddings=16)
    hf = config("qwen4_exp", vision_config=eyes, text_config=decoder, **IDS)
    return hf, processor(
        "Qwen3VLProcessor", images(), words(video_words=True), video="Qwen3VLVideoProcessor", chat_template=turns(WORD)
    )
