"""What mechvlm must know of a Hugging Face class: a frozen record of names and paths, no code paths.

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
        embed, decoder, layers, norm, unembed: token embedding, the decoder without its unembedding,
            its layers, final norm and unembedding.
        visual_tokens: what an image becomes in the decoder. "patches": one token a patch, in
            reading order; "queries": learned queries that read the whole image.
        template: the prompt where the processor brings no chat template. `{images}` stands for the
            image tokens and is absent where the processor puts them in by itself.
        images_per_prompt: how many images one prompt can hold; None for any number.
        qformer_layers, cross_attention: for queries: the Q-Former's layers, and in some of them the
            attention that reads the image.
        cross_attention_every: config path: every how many of these layers hold one.
        right_padded: encodings that are padded on the right, since their positions are absolute.
        max_lengths: (encoding, config path) of the longest sequences that the model takes.
        text_config: config path of the decoder's own config.
        image_token_id: config path of the placeholder token's id.
        patch_size: config path of the side of the vision encoder's patches, in pixels.
        decoder_outputs: where the class's output holds that of its decoder; None where they are one.
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
    decoder_outputs: str | None = None
    # The parts of a Llama layer, which both families' decoders are made of.
    attention: str = "self_attn"
    mlp: str = "mlp"
    mid_norm: str = "post_attention_layernorm"
    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    o_proj: str = "o_proj"
    down_proj: str = "down_proj"
    # The decoder config's name for the RMSNorm's epsilon.
    norm_eps: str = "rms_norm_eps"
    # nnsight's name, in the attention's source, for the call that every implementation goes through.
    attention_call: str = "attention_interface_1"
    # nnsight's name, in the layer's source, for the sum of the layer's input and its attention's output.
    mid_sum: str = "hidden_states_1"


def part(root: Any, path: str) -> Any:
    """The object at an attribute path: of a model, of the nnsight model around it, or of a config."""
    for name in path.split("."):
        root = getattr(root, name)
    return root
