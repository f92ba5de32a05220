"""The decoder of a model inside a trace: its activations and weights under uniform names.

A `VLM` is a `Decoder` with a processor and inputs. Only this half travels to a server
(`mechvlm.ndif`), so it is made of plain functions and data, and needs nothing that a server lacks.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.decoder.accessors import Accessor, PatternAccessor, build_accessors
from mechvlm.decoder.attention import Attention
from mechvlm.decoder.mistakes import require_trace, reword
from mechvlm.decoder.norms import Norm
from mechvlm.decoder.projections import Projection, child, in_heads, out_heads
from mechvlm.decoder.weights import Weights, has_weights, weight_and_bias
from mechvlm.families.record import Architecture, part


class Decoder:
    """A model's decoder, with the modules before and after it, on an nnsight model; see `VLM`.

    Attributes:
        resid_pre, resid_mid, resid_post: residual stream [batch pos d_model] before a layer,
            between its attention and its MLP, and after it.
        attn_out, mlp_out: output of a layer's attention and of its MLP [batch pos d_model].
        q, k, v: outputs of the projections [batch pos head d_head], before the rotary embedding; k
            and v have n_kv_heads heads.
        z: values averaged by the attention [batch pos head d_head], the output projection's input.
        pattern: attention weights [batch head dest src], recomputed from q and k.
        attention: what a layer's attention is computed from, an `Attention`; read-only.
        model: the nnsight model.
        record: record of the model's class.
        name: the model's name.
        config: config of the Hugging Face model.
        d_vocab: number of tokens in the vocabulary.
        n_layers, n_heads, n_kv_heads, d_model, d_head: sizes of the decoder.
    """

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
        text = self.text_config
        self.n_layers: int = text.num_hidden_layers
        self.n_heads: int = text.num_attention_heads
        self.n_kv_heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.d_model: int = text.hidden_size
        self.d_head: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        for site, accessor in build_accessors(list(self.layers), record, self.d_head, self.has_weights).items():
            setattr(self, site, accessor)

    @property
    def hf(self):
        """The Hugging Face model."""
        return self.model._module

    @property
    def has_weights(self) -> bool:
        """Whether this process holds the weights.

        The client of a model on NDIF does not, nor does a block in NDIF's sandbox.
        """
        return has_weights(part(self.model, self.record.embed))

    @property
    def text_config(self):
        """The decoder's own part of the config."""
        return part(self.config, self.record.text_config)

    @property
    def norm_eps(self) -> float:
        """The epsilon of the decoder's norms."""
        return getattr(self.text_config, self.record.norm_eps)

    def trace(self, inputs: Any, **kwargs):
        """A trace over one forward of `inputs`, inside a request that holds several."""
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
        """The attentions by which the queries read the image; empty for patches."""
        record = self.record
        if record.qformer_layers is None or record.cross_attention is None or record.cross_attention_every is None:
            return []
        every = part(self.config, record.cross_attention_every)
        return [part(layer, record.cross_attention) for layer in list(part(self.model, record.qformer_layers))[::every]]

    def attention_module(self, layer: int):
        """A layer's attention, as nnsight's envoy."""
        return getattr(self.layers[layer], self.record.attention)

    # -- activations that belong to no layer --

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """Inside a trace: the model's logits, readable and assignable."""
        self._require_trace_of_logits()
        try:
            return self.unembed.output
        except Exception as error:
            reword(error, "vlm.logits")
            raise

    @logits.setter
    def logits(self, value: Tensor) -> None:
        self._require_trace_of_logits()
        try:
            self.unembed.output = value
        except Exception as error:
            reword(error, "vlm.logits")
            raise

    def _require_trace_of_logits(self) -> None:
        if self.has_weights:
            require_trace("vlm.logits", self.unembed)

    # -- weights --

    def readout(self) -> tuple[Norm, Projection]:
        """Inside a trace: final norm and unembedding, with their weights even in a sandbox."""
        embed = part(self.model, self.record.embed)
        return Norm(self.final_norm, embed, self.d_model, self.norm_eps), Projection(self.unembed, embed, self.d_model)

    def projection(self, name: str, layer: int) -> Projection:
        """Inside a trace: a layer's projection, with its weight even in a sandbox.

        Args:
            name: "q_proj", "k_proj", "v_proj" or "o_proj".
            layer: the layer.
        """
        envoy = child(self.attention_module(layer), getattr(self.record, name))
        width = self.n_heads * self.d_head if name == "o_proj" else self.d_model
        return Projection(envoy, part(self.model, self.record.embed), width)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The token embedding."""
        embed = part(self.model, self.record.embed)
        return weight_and_bias(embed)[0] if has_weights(embed) else embed(torch.arange(self.d_vocab))

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        return self.readout()[1].weight.T

    @property
    def W_Q(self) -> Weights:
        """The query weights, `W_Q[layer]` [head d_model d_head]."""
        return Weights(self.n_layers, "W_Q", lambda layer: self._by_head(layer, "q_proj"))

    @property
    def W_K(self) -> Weights:
        """The key weights, `W_K[layer]` [head d_model d_head]."""
        return Weights(self.n_layers, "W_K", lambda layer: self._by_head(layer, "k_proj"))

    @property
    def W_V(self) -> Weights:
        """The value weights, `W_V[layer]` [head d_model d_head]."""
        return Weights(self.n_layers, "W_V", lambda layer: self._by_head(layer, "v_proj"))

    @property
    def W_O(self) -> Weights:
        """The output weights, `W_O[layer]` [head d_head d_model]."""
        return Weights(
            self.n_layers, "W_O", lambda layer: out_heads(self.projection("o_proj", layer).weight, self.d_head)
        )

    def _by_head(self, layer: int, name: str) -> Float[Tensor, "head d_model d_head"]:
        weight = in_heads(self.projection(name, layer).weight, self.d_head)
        n = len(weight)  # n_kv_heads for k and v, each shared by a group of query heads
        return weight if n == self.n_heads else weight.repeat_interleave(self.n_heads // n, dim=0)
