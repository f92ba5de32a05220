"""The records of the known Hugging Face classes. A new family is one more record here."""

from mechvlm.errors import ModelError
from mechvlm.families.record import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    record.hf_class: record
    for record in (
        Architecture(
            hf_class="LlavaForConditionalGeneration",
            embed="model.language_model.embed_tokens",
            decoder="model.language_model",
            layers="model.language_model.layers",
            norm="model.language_model.norm",
            unembed="lm_head",
            visual_tokens="patches",
            template="USER: {images}\n{prompt} ASSISTANT:",
            processor_settings=(
                ("patch_size", "vision_config.patch_size"),
                ("vision_feature_select_strategy", "vision_feature_select_strategy"),
            ),
        ),
        Architecture(
            hf_class="InstructBlipForConditionalGeneration",
            embed="language_model.model.embed_tokens",
            decoder="language_model.model",
            layers="language_model.model.layers",
            norm="language_model.model.norm",
            unembed="language_model.lm_head",
            visual_tokens="queries",
            template="{prompt}",
            images_per_prompt=1,
            qformer_layers="qformer.encoder.layer",
            cross_attention="crossattention.attention",
            cross_attention_every="qformer_config.cross_attention_frequency",
            right_padded=("qformer_input_ids", "qformer_attention_mask"),
            max_lengths=(
                ("input_ids", "text_config.max_position_embeddings"),
                ("qformer_input_ids", "qformer_config.max_position_embeddings"),
            ),
            processor_settings=(("num_query_tokens", "num_query_tokens"),),
            decoder_outputs="language_model_outputs",
        ),
    )
}


def architecture_of(hf_class: str) -> Architecture:
    """The record of a Hugging Face class.

    Raises:
        ModelError: for a class without a record; the message lists the known classes.
    """
    if hf_class == "LlavaLlamaForCausalLM":
        raise ModelError(
            "LlavaLlamaForCausalLM is the class of the original LLaVA code, which transformers does not load. Take the converted "
            "checkpoint, llava-hf/llava-1.5-7b-hf for liuhaotian/llava-v1.5-7b."
        )
    if hf_class not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(
            f"mechvlm has no architecture record for {hf_class}. Known classes: {known}. "
            "A new family is one record in mechvlm/families/known.py."
        )
    return ARCHITECTURES[hf_class]
