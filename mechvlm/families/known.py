"""The records of known classes: data, as `mechvlm.families.derive` gives it on tiny models.

A record has two halves. `ARCHITECTURES` says of a Hugging Face class how inputs are made for it,
and where its decoder's ends are. `LAYERS` says of a class of decoder layers what it is made of. A
model of whose class or layers nothing stands here gets a record that is derived when it is loaded.
"""

from dataclasses import replace
from typing import Any

from mechvlm.errors import ModelError
from mechvlm.families.record import Architecture, LayerKind, layer_paths, part

LLAMA = LayerKind()
EXPERTS = LayerKind(down_proj=None)
PARALLEL = LayerKind(mid_norm=None)
GEMMA = LayerKind(
    attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm", mid_norm="pre_feedforward_layernorm",
    mid_sum="hidden_states_2",
)  # fmt: skip

GATED = LayerKind(attention="cross_attn", attn_out="cross_attn", memory=True)

LAYERS: dict[str, LayerKind] = {
    **dict.fromkeys(
        ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "GemmaDecoderLayer",
         "Qwen2VLDecoderLayer", "Qwen2_5_VLDecoderLayer", "Qwen3VLTextDecoderLayer", "Emu3DecoderLayer",
         "MllamaSelfAttentionDecoderLayer", "IdeficsDecoderLayer"),
        LLAMA,
    ),
    **dict.fromkeys(("MixtralDecoderLayer", "GptOssDecoderLayer", "AriaTextDecoderLayer"), EXPERTS),
    **dict.fromkeys(("Gemma2DecoderLayer", "Gemma3DecoderLayer"), GEMMA),
    "Cohere2DecoderLayer": PARALLEL,
    "Glm4vTextDecoderLayer": replace(GEMMA, attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm",
                                     mid_norm="post_attention_layernorm"),
    "MllamaCrossAttentionDecoderLayer": replace(
        GATED, attn_gate="cross_attn_attn_gate", mlp_gate="cross_attn_mlp_gate", mlp_open="full_text_row_masked_out_mask",
    ),
    "IdeficsGatedCrossAttentionLayer": replace(
        GATED, attn_gate="alpha_cross_attn", mlp_gate="alpha_dense", attn_open="cross_attention_gate",
    ),
}  # fmt: skip
"""What a class of decoder layers is made of.

Those with fused matrices (Phi-3) are not here: where heads lie in them depends on sizes.
"""

LANGUAGE_MODEL = {
    "embed": "model.language_model.embed_tokens", "decoder": "model.language_model",
    "layers": "model.language_model.layers", "norm": "model.language_model.norm", "unembed": "lm_head",
}  # fmt: skip
TEXT_MODEL = {name: path.replace("language_model", "text_model") for name, path in LANGUAGE_MODEL.items()}
BLIP = {
    "embed": "language_model.model.embed_tokens", "decoder": "language_model.model",
    "layers": "language_model.model.layers", "norm": "language_model.model.norm", "unembed": "language_model.lm_head",
    "visual_tokens": "queries", "template": "{prompt}", "images_per_prompt": 1,
    "qformer_layers": "qformer.encoder.layer", "cross_attention": "crossattention.attention",
    "cross_attention_every": "qformer_config.cross_attention_frequency",
    "processor_settings": (("num_query_tokens", "num_query_tokens"),), "decoder_outputs": "language_model_outputs",
}  # fmt: skip
LLAVA: dict[str, Any] = {
    "template": "USER: {images}\n{prompt} ASSISTANT:", "image_word": "image_token",
    "processor_settings": (
        ("patch_size", "vision_config.patch_size"),
        ("vision_feature_select_strategy", "vision_feature_select_strategy"),
    ),
}  # fmt: skip
QWEN = (
    "<|im_start|>user\n<|vision_start|>{images}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
)  # fmt: skip


def _record(hf_class: str, ends: dict[str, Any], **facts: Any) -> Architecture:
    usual = {"visual_tokens": "cells", "template": "{images}\n{prompt}"}
    return Architecture(hf_class=f"{hf_class}ForConditionalGeneration", **{**usual, **ends, **facts})


ARCHITECTURES: dict[str, Architecture] = {
    record.hf_class: record
    for record in (
        _record("Llava", LANGUAGE_MODEL, visual_tokens="patches", **LLAVA),
        _record("VipLlava", LANGUAGE_MODEL, visual_tokens="patches", **{**LLAVA, "processor_settings": ()}),
        _record("LlavaNext", LANGUAGE_MODEL, **LLAVA),
        _record("LlavaOnevision", LANGUAGE_MODEL),
        _record("InternVL", LANGUAGE_MODEL),
        _record("Mistral3", LANGUAGE_MODEL),
        _record("Qwen2VL", LANGUAGE_MODEL, template=QWEN, image_word="image_token"),
        _record("Qwen2_5_VL", LANGUAGE_MODEL, template=QWEN, image_word="image_token"),
        _record("Qwen3VL", LANGUAGE_MODEL, template=QWEN, image_word="image_token", adds_between=True),
        _record("Glm4v", LANGUAGE_MODEL),
        _record("Gemma3", LANGUAGE_MODEL, image_word="boi_token"),
        _record("PaliGemma", LANGUAGE_MODEL, template="{images}{prompt}", image_word="image_token",
                logit_cap="final_logit_softcapping"),
        _record("Ovis2", LANGUAGE_MODEL),
        _record("DeepseekVL", LANGUAGE_MODEL),
        _record("Janus", LANGUAGE_MODEL),
        _record("Aria", LANGUAGE_MODEL, visual_tokens="queries"),
        _record("GotOcr2", LANGUAGE_MODEL),
        _record("Emu3", TEXT_MODEL, equal_sizes=True),
        _record("Idefics2", TEXT_MODEL, visual_tokens="queries"),
        _record("Idefics3", TEXT_MODEL),
        _record("SmolVLM", TEXT_MODEL),
        _record("Blip2", BLIP),
        _record(
            "InstructBlip", BLIP, image_word="", right_padded=("qformer_input_ids", "qformer_attention_mask"),
            max_lengths=(("qformer_input_ids", "qformer_config.max_position_embeddings"),),
        ),
        _record("Mllama", LANGUAGE_MODEL, visual_tokens="memory", template="{images}{prompt}", image_word="image_token"),
        # Its processor puts one image before the text, but several after it, where none sees them.
        Architecture(
            "IdeficsForVisionText2Text", embed="model.embed_tokens", decoder="model", layers="model.layers", norm="model.norm",
            unembed="lm_head", visual_tokens="memory", template="User: {prompt}\nAssistant:", image_word="",
            images_per_prompt=1, image_token_id="", memory_blocks="model.gated_cross_attn_layers",
            memory_every="cross_layer_interval",
        ),
    )
}  # fmt: skip

REFUSED: dict[str, str] = {
    "LlavaLlamaForCausalLM": (
        "is the class of the original LLaVA code, which transformers does not load. Take the converted checkpoint, "
        "llava-hf/llava-1.5-7b-hf for liuhaotian/llava-v1.5-7b."
    ),
    "Gemma3nForConditionalGeneration": (
        "keeps four states at each position at once (AltUp), and mechvlm reads one residual stream. "
        "Gemma3ForConditionalGeneration has one."
    ),
}
"""Classes that cannot be read, and why."""


def architecture_of(hf_class: str) -> Architecture:
    """The record of a Hugging Face class, without its layers; a blank one for an unknown class.

    Raises:
        ModelError: for a class that cannot be read.
    """
    if hf_class in REFUSED:
        raise ModelError(f"{hf_class} {REFUSED[hf_class]}")
    if hf_class in ARCHITECTURES:
        return ARCHITECTURES[hf_class]
    return Architecture(
        hf_class, embed="", decoder="", layers="", norm="", unembed="", visual_tokens="cells",
        template="{images}\n{prompt}", derived=True,
    )  # fmt: skip


def known_record(model: Any) -> Architecture | None:
    """The record of a model whose class and layers are known, or None.

    Args:
        model: a Hugging Face model, with or without weights.
    """
    record = architecture_of(type(model).__name__)
    if record.derived:
        return None
    try:
        kinds = [
            LAYERS.get(type(layer).__name__) for layer in (part(model, path) for path in layer_paths(record, model))
        ]
        part(model, record.norm)
    except AttributeError:  # a decoder of another build
        return None
    whole = tuple(kind for kind in kinds if kind is not None)
    if len(whole) < len(kinds):
        return None
    return replace(record, kinds=whole if len(set(whole)) > 1 else whole[:1])
