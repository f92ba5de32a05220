"""What there is of a model within a trace: its activations and weights under uniform names. A `VLM` is this, and its inputs.

To a server only this half travels (`mechvlm.remote`): plain functions and data, with nothing that a server has not.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechvlm.accessors import Accessor, Attention, PatternAccessor, build_accessors
from mechvlm.architectures import Architecture, part
from mechvlm.weights import Part, is_here


class Decoder:
    """A model's decoder and what stands before and after it, around an nnsight model; see `VLM`."""

    resid_pre: Accessor[Tensor]
    resid_mid: Accessor[Tensor]
    resid_post: Accessor[Tensor]
    attn_out: Accessor[Tensor]
    mlp_out: Accessor[Tensor]
    q: Accessor[Tensor]
    k: Accessor[Tensor]
    v: Accessor[Tensor]
    z: Accessor[Tensor]
    pattern: PatternAccessor
    attention: Accessor[Attention]

    def __init__(self, model: Any, record: Architecture, name: str, config: Any, d_vocab: int):
        self.model, self.record, self.name, self.config, self.d_vocab = model, record, name, config, d_vocab
        text = config.text_config
        self.n_layers: int = text.num_hidden_layers
        self.n_heads: int = text.num_attention_heads
        self.n_kv_heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.d_model: int = text.hidden_size
        self.d_head: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        for site, accessor in build_accessors(list(self.layers), record, self.d_head, self.apart).items():
            setattr(self, site, accessor)

    @property
    def hf(self):
        """The Hugging Face model."""
        return self.model._module

    @property
    def apart(self) -> bool:
        """Whether the process that runs this holds no weights: a VLM on NDIF, or there a block in a sandbox."""
        return not is_here(part(self.model, self.record.embed))

    def trace(self, inputs: Any, **kwargs):
        """A trace over one forward of `inputs`, in the middle of a request that holds several."""
        return self.model.trace(**inputs.encoding, **kwargs)

    @property
    def layers(self):
        """The decoder's layers, as nnsight's envoys."""
        return part(self.model, self.record.layers)

    @property
    def final_norm(self):
        """The norm before the unembedding, callable on any state inside a trace."""
        return part(self.model, self.record.norm)

    @property
    def unembed(self):
        """The unembedding, callable on any normed state inside a trace."""
        return part(self.model, self.record.unembed)

    @property
    def cross_attentions(self) -> list:
        """The attentions with which the queries read the image (empty where visual tokens are patches)."""
        if self.record.qformer_layers is None or self.record.cross_attention is None:
            return []
        every = self.config.qformer_config.cross_attention_frequency
        return [
            part(layer, self.record.cross_attention)
            for layer in list(part(self.model, self.record.qformer_layers))[::every]
        ]

    # -- activations that belong to no layer ---------------------------------------------------------------------------

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """Inside a trace: the model's logits."""
        return self.unembed.output

    @logits.setter
    def logits(self, value: Tensor) -> None:
        self.unembed.output = value

    # -- weights -------------------------------------------------------------------------------------------------------

    def part(self, path: str, layer: int | None = None) -> Part:
        """The final norm or the unembedding, by its path in the record, or a projection of a layer's attention, by its name.

        Inside a trace it has its weight wherever the block runs.
        """
        embed = part(self.model, self.record.embed)
        if layer is not None:
            envoy = getattr(getattr(self.layers[layer], self.record.attention), path)
            return Part(envoy, embed, self.n_heads * self.d_head if path == self.record.o_proj else self.d_model)
        eps = self.config.text_config.rms_norm_eps if path == self.record.norm else None
        return Part(part(self.model, path), embed, self.d_model, eps)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        embed = part(self.model, self.record.embed)
        return embed.weight if is_here(embed) else embed(torch.arange(self.d_vocab))

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.part(self.record.unembed).weight.T

    @property
    def W_Q(self) -> "Weights":
        return Weights(self.n_layers, "W_Q", lambda layer: self._in_heads(layer, "q_proj"))

    @property
    def W_K(self) -> "Weights":
        return Weights(self.n_layers, "W_K", lambda layer: self._in_heads(layer, "k_proj"))

    @property
    def W_V(self) -> "Weights":
        return Weights(self.n_layers, "W_V", lambda layer: self._in_heads(layer, "v_proj"))

    @property
    def W_O(self) -> "Weights":
        return Weights(self.n_layers, "W_O", lambda layer: self._out_heads(layer))

    def _projection(self, layer: int, name: str) -> Tensor:
        return self.part(getattr(self.record, name), layer).weight

    def _in_heads(self, layer: int, name: str) -> Tensor:
        weight = rearrange(
            self._projection(layer, name), "(head d_head) d_model -> head d_model d_head", d_head=self.d_head
        )
        return (
            weight.repeat_interleave(self.n_heads // weight.shape[0], dim=0) if len(weight) < self.n_heads else weight
        )

    def _out_heads(self, layer: int) -> Tensor:
        return rearrange(
            self._projection(layer, "o_proj"), "d_model (head d_head) -> head d_head d_model", d_head=self.d_head
        )


class Weights:
    """One weight of every layer, per head: views of the model's own parameters (grouped keys and values are repeated)."""

    def __init__(self, n: int, name: str, read: Callable[[int], Tensor]):
        self._n, self._name, self._read = n, name, read

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, layer: int) -> Float[Tensor, "head _ _"]:
        if not -self._n <= layer < self._n:
            raise IndexError(f"{self._name}[{layer}]: the decoder has layers 0 to {self._n - 1}.")
        return self._read(layer)
