"""The record that describes a Hugging Face class to mechvlm: names, paths and numbers, no code.

Module paths are attribute paths from the Hugging Face model; those of a layer's parts start at the
layer, and those of an attention's projections at the attention. Config paths start at the model's
config. The records of `mechvlm.families.known` are data; `mechvlm.families.derive` makes one from a
loaded model.
"""

from dataclasses import dataclass
from typing import Any, Literal

ATTENTION_CALL = "attention_interface_1"
"""nnsight's name, in the source of an attention's forward, for the call that every attention
implementation goes through: the same in every class of transformers that makes such a call."""


@dataclass(frozen=True)
class LayerKind:
    """One kind of decoder layer. The defaults are a Llama layer's.

    Attributes:
        attention: the attention; None for a layer that has none that can be read, such as one with
            linear attention or a convolution.
        q_proj, k_proj, v_proj: its projections; None where queries, keys or values are no columns
            of one matrix's output.
        columns: for q, k and v: (start, step), where heads lie in the output of their projection:
            head h in the columns from start + h * step on. Empty where each has its own matrix.
        n_heads: for q, k and v: how many heads; with `columns` alone.
        o_proj: the projection of all heads' outputs.
        attn_out, mlp_out: the modules whose outputs are added to the residual stream: the attention
            and the MLP, or norms after them.
        scale: the factor with which both are added.
        mid_norm: the norm between the two writes, whose input is the state there; None where
            attention and MLP read the same state.
        mid_sum: nnsight's name, in the source of the layer's forward, for the sum of the layer's
            input and what its attention writes.
        down_proj: the last projection of the MLP, whose input are its neurons' activations; None
            where there is no such module (a mixture of experts).
        d_head: width of a head, where it is not what the config says.
        flat: whether what follows the attention runs on [batch * pos, d_model] (OPT).
        memory: whether the attention's keys and values come from the image's memory, and none from
            positions (Flamingo's gated cross-attention).
        attn_gate, mlp_gate: parameters whose tanh multiplies what attention and MLP add; None
            without a gate.
        attn_open, mlp_open: arguments of the layer's forward that hold 0 at the positions where
            attention and MLP add nothing; None where they always add.
    """

    attention: str | None = "self_attn"
    q_proj: str | None = "q_proj"
    k_proj: str | None = "k_proj"
    v_proj: str | None = "v_proj"
    columns: tuple[tuple[int, int], ...] = ()
    n_heads: tuple[int, ...] = ()
    o_proj: str = "o_proj"
    attn_out: str | None = "self_attn"
    mlp_out: str | None = "mlp"
    scale: float = 1.0
    mid_norm: str | None = "post_attention_layernorm"
    mid_sum: str = "hidden_states_1"
    down_proj: str | None = "mlp.down_proj"
    d_head: int | None = None
    flat: bool = False
    memory: bool = False
    attn_gate: str | None = None
    mlp_gate: str | None = None
    attn_open: str | None = None
    mlp_open: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One Hugging Face class, as mechvlm sees it.

    Attributes:
        hf_class: name of the class in `transformers`.
        embed, decoder, layers, norm, unembed: module paths of the token embedding, the decoder
            without its unembedding, its layers, its final norm and its unembedding.
        kinds: the kind of all layers, or one kind per layer.
        norm_eps: the decoder config's name for the epsilon of the final norm, or the number.
        norm_centres: whether the norms subtract a state's mean first, as a LayerNorm does.
        logit_scale: factor on the unembedding's output; a number, or the decoder config's name.
        logit_cap: c where logits are c tanh(x / c) of that; a number, or the decoder config's name.
        decoder_outputs: attribute of the class's output that holds the decoder's output; None if
            the two are the same.
        adds_between: whether image features are added to the states between layers, at the image's
            positions (deepstack): there state l + 1 is not what layer l returns.
        derived: whether the record was made from the model itself, and stands in no list.

        visual_tokens: what an image becomes in the decoder. "patches": one token a patch of the
            vision encoder, in reading order; "cells": tokens that tile what the processor returns,
            as a coordinate image shows (`mechvlm.inputs.layouts`); "queries": learned queries that
            read the whole image; "unplaced": tokens that do not lie as they would tile it;
            "memory": none, since cross-attention reads the image.
        template: the prompt, used if the processor has no chat template. `{images}` stands for the
            words of the images; it is left out if the processor puts the tokens by itself.
        image_word: what stands for an image in a prompt: the name of the processor's attribute that
            holds it, or the text itself; "" where the processor puts the tokens by itself. None: it
            is found by trying (`mechvlm.inputs.image_word`).
        token_shape: for cells: (height, width) of what a token covers, up to a factor.
        equal_sizes: True if a batch holds images of one size only, since the vision encoder would
            read the padding around smaller ones.
        equal_lengths: True if a batch holds examples of as many tokens each, since positions would
            count the padding of shorter ones. Found out when a derived record is verified.
        images_per_prompt: how many images one prompt can hold; None for any number.
        qformer_layers: for queries: module path of the Q-Former's layers.
        cross_attention: for queries: path, in a Q-Former layer, of the attention that reads the
            image. Only some layers have one.
        cross_attention_every: for queries: config path of n, where every n-th Q-Former layer has
            such an attention, from the first.
        right_padded: encodings that are padded on the right, since their positions are absolute.
        max_lengths: pairs of an encoding and the config path of its largest length, beside those of
            the decoder itself.
        memory_blocks: for a memory: module path of the list of gated blocks that stand before some
            of `layers`. They count as layers of their own, so that state l + 1 is state l and what
            layer l adds. Hugging Face does not number them: its layer i is layer
            i + i // every + 1. None where they stand among `layers` (Mllama).
        memory_every: config path of that number: a block stands before every so many `layers`, from
            the first.
        image_token_id: config path of the placeholder token's id; "" for a memory without one.
        patch_size: config path of the side of the vision encoder's patches, in pixels.
        processor_settings: (attribute, config path) of settings that the processor must share with
            the model.
        arguments: names of the arguments of the model's forward, for a class of other code than
            transformers'; empty for one of transformers, which tells them itself.
    """

    hf_class: str
    embed: str
    decoder: str
    layers: str
    norm: str
    unembed: str
    visual_tokens: Literal["patches", "cells", "queries", "unplaced", "memory"]
    template: str
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    norm_eps: str | float = "rms_norm_eps"
    norm_centres: bool = False
    logit_scale: str | float = 1.0
    logit_cap: str | float | None = None
    decoder_outputs: str | None = None
    adds_between: bool = False
    derived: bool = False

    image_word: str | None = None
    token_shape: tuple[int, int] = (1, 1)
    equal_sizes: bool = False
    equal_lengths: bool = False
    images_per_prompt: int | None = None
    qformer_layers: str | None = None
    cross_attention: str | None = None
    cross_attention_every: str | None = None
    right_padded: tuple[str, ...] = ()
    max_lengths: tuple[tuple[str, str], ...] = ()
    memory_blocks: str | None = None
    memory_every: str | None = None
    image_token_id: str = "image_token_id"
    patch_size: str = "vision_config.patch_size"
    processor_settings: tuple[tuple[str, str], ...] = ()
    arguments: tuple[str, ...] = ()

    def kind(self, layer: int) -> LayerKind:
        """The kind of one layer."""
        return self.kinds[layer] if len(self.kinds) > 1 else self.kinds[0]


def part(root: Any, path: str) -> Any:
    """The object at a dotted attribute path from a model, an nnsight model or a config."""
    for name in path.split("."):
        root = getattr(root, name)
    return root


def layer_paths(record: Architecture, model: Any) -> list[str]:
    """The module paths of the decoder's layers, in the order in which they run.

    >>> layer_paths(record, hf)  # Idefics, with a gated block before every second layer
    ['model.gated_cross_attn_layers.0', 'model.layers.0', 'model.layers.1', ...]

    Args:
        record: of the model's class.
        model: the Hugging Face model, or the nnsight model.
    """
    # Walked through: in NDIF's sandbox a list of modules does not tell its length.
    paths = [f"{record.layers}.{number}" for number, _ in enumerate(part(model, record.layers))]
    if record.memory_blocks is None or record.memory_every is None:
        return paths
    every = part(model.config, record.memory_every)
    blocks = {number: f"{record.memory_blocks}.{number // every}" for number in range(0, len(paths), every)}
    return [path for number, own in enumerate(paths) for path in (blocks.get(number), own) if path is not None]
