"""The record that describes a Hugging Face class to mechvlm: names and paths, and no code.

Module paths are attribute paths from the Hugging Face model; those of a layer's parts start at the
layer. Config paths start at the model's config. A new family is a new record in
`mechvlm.families.known`.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Architecture:
    """One Hugging Face class, as mechvlm sees it.

    Attributes:
        hf_class: name of the class in `transformers`.
        embed, decoder, layers, norm, unembed: module paths of the token embedding, the decoder
            without its unembedding, its layers, its final norm and its unembedding.
        visual_tokens: what an image becomes in the decoder. "patches": one token a patch, in
            reading order; "queries": learned queries that read the whole image.
        template: the prompt, used if the processor has no chat template. `{images}` stands for the
            image tokens; it is absent if the processor inserts them by itself.
        images_per_prompt: how many images one prompt can hold; None for any number.
        qformer_layers: for queries: module path of the Q-Former's layers.
        cross_attention: for queries: path, in a Q-Former layer, of the attention that reads the
            image. Only some layers have one.
        cross_attention_every: for queries: config path of n, where every n-th Q-Former layer has
            such an attention, from the first.
        right_padded: encodings that are padded on the right, since their positions are absolute.
        max_lengths: pairs of an encoding and the config path of its largest length.
        text_config: config path of the decoder's own config.
        image_token_id: config path of the placeholder token's id.
        patch_size: config path of the side of the vision encoder's patches, in pixels.
        processor_settings: (attribute, config path) of settings that the processor must share with
            the model.
        decoder_outputs: attribute of the class's output that holds the decoder's output; None if
            the two are the same.
        attention, mlp, mid_norm: a layer's attention, its MLP, and the norm between them. These and
            the projections below are the parts of a Llama layer, which both families use.
        q_proj, k_proj, v_proj, o_proj, down_proj: projections in the attention and in the MLP.
        norm_eps: the decoder config's name for the RMSNorms' epsilon.
        attention_call: nnsight's name, in the source of the attention's forward, for the call that
            every attention implementation goes through.
        mid_sum: nnsight's name, in the source of the layer's forward, for the sum of the layer's
            input and its attention's output.
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
    cross_attention_every: str | None = None
    right_padded: tuple[str, ...] = ()
    max_lengths: tuple[tuple[str, str], ...] = (("input_ids", "text_config.max_position_embeddings"),)
    text_config: str = "text_config"
    image_token_id: str = "image_token_index"
    patch_size: str = "vision_config.patch_size"
    processor_settings: tuple[tuple[str, str], ...] = ()
    decoder_outputs: str | None = None
    attention: str = "self_attn"
    mlp: str = "mlp"
    mid_norm: str = "post_attention_layernorm"
    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    o_proj: str = "o_proj"
    down_proj: str = "down_proj"
    norm_eps: str = "rms_norm_eps"
    attention_call: str = "attention_interface_1"
    mid_sum: str = "hidden_states_1"


def part(root: Any, path: str) -> Any:
    """The object at a dotted attribute path from a model, an nnsight model or a config."""
    for name in path.split("."):
        root = getattr(root, name)
    return root
