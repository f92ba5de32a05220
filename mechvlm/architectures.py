"""Where each family keeps its parts: one frozen record per Hugging Face class. Data, not code paths.

A new family is a new record. Paths are attribute paths from the Hugging Face model; those of a layer's parts start at
the layer.
"""

from dataclasses import dataclass
from typing import Literal

from mechvlm.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """One Hugging Face class, as mechvlm sees it.

    Attributes:
        hf_class: name of the class in `transformers`.
        embed, decoder, layers, norm, unembed: token embedding, the decoder without its unembedding, its layers, final norm
            and unembedding.
        visual_tokens: what an image becomes in the decoder. "patches": one token a patch, in reading order;
            "queries": learned queries that read the whole image.
        template: the prompt where the processor brings no chat template. `{images}` stands for the image tokens
            and is absent where the processor puts them in by itself.
        images_per_prompt: how many images one prompt can hold; None for any number.
        cross_attention: for queries: path of the attention that reads the image, in each of `qformer_layers`.
        right_padded: encodings that are padded on the right, since their positions are absolute.
    """

    hf_class: str
    embed: str
    decoder: str
    layers: str
    norm: str
    unembed: str
    visual_tokens: Literal["patches", "queries"]
    template: str
    images_per_prompt: int | None = None
    qformer_layers: str | None = None
    cross_attention: str | None = None
    right_padded: tuple[str, ...] = ()
    # The parts of a Llama layer, which both families' decoders are made of.
    attention: str = "self_attn"
    mlp: str = "mlp"
    mid_norm: str = "post_attention_layernorm"
    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    o_proj: str = "o_proj"
    down_proj: str = "down_proj"
    # The call that every attention implementation goes through, as nnsight names it in the attention's source.
    attention_call: str = "attention_interface_1"
    # The sum of what entered a layer and what its attention wrote, as nnsight names it in the layer's source.
    mid_sum: str = "hidden_states_1"


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
            right_padded=("qformer_input_ids", "qformer_attention_mask"),
        ),
    )
}


def architecture_of(hf_class: str) -> Architecture:
    """The record of a Hugging Face class.

    Raises:
        ModelError: for a class without a record; the message lists those that have one.
    """
    if hf_class not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(
            f"mechvlm has no architecture record for {hf_class}. Known classes: {known}. "
            "A new family is one record in mechvlm/architectures.py."
        )
    return ARCHITECTURES[hf_class]


def part(root, path: str):
    """The object at an attribute path: of a Hugging Face model, or of the nnsight model around it."""
    for name in path.split("."):
        root = getattr(root, name)
    return root
