"""The decoder of a model inside a trace: its activations and weights under uniform names.

A `VLM` is a `Decoder` with a processor and inputs. Only this half travels to a server
(`mechvlm.ndif`), so it is made of plain functions and data, and needs nothing that a server lacks.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechvlm.decoder.accessors import Accessor, PatternAccessor, build_accessors
from mechvlm.decoder.attention import Attention, attention_call
from mechvlm.decoder.layer import Layer
from mechvlm.decoder.mistakes import require_trace, reword
from mechvlm.decoder.norms import Norm, rms
from mechvlm.decoder.projections import Projection, in_columns, out_heads
from mechvlm.decoder.unembedding import Unembedding
from mechvlm.decoder.weights import Weights, has_weights, weight_and_bias
from mechvlm.errors import ModelError
from mechvlm.families.record import Architecture, layer_paths, part


class Gates(NamedTuple):
    """The gates of one memory layer: what its attention and its MLP add is multiplied with them.

    attn, mlp: tanh of the layer's parameters, between -1 and 1; [1], or [d_model] where each
        dimension has its own. 0 adds nothing.
    """

    attn: Tensor
    mlp: Tensor


class WritePath(NamedTuple):
    """How the outputs z of a layer's heads reach the residual stream: (z w_o^T + b_o) / divisor.

    Attributes:
        w_o: [d_model, head * d_head]: the output projection's weight. Where a norm or a factor
            stands between it and the stream, it is multiplied with the norm's gain or the factor.
        b_o: [d_model] or None, its bias, likewise.
        divisor: [batch pos 1]: the root mean square by which such a norm divides each position's
            sum; infinity at positions that a memory layer leaves as they are; None without either.
    """

    w_o: Tensor
    b_o: Tensor | None
    divisor: Tensor | None


class Decoder:
    """A model's decoder, with the modules before and after it, on an nnsight model; see `VLM`.

    What its layers are made of, its record says, layer by layer (`LayerKind`).

    Attributes:
        resid_pre, resid_mid, resid_post: residual stream [batch pos d_model] before a layer,
            between its attention and its MLP, and after it.
        attn_out, mlp_out: what a layer's attention and its MLP add to the residual stream
            [batch pos d_model].
        q, k, v: outputs of the projections [batch pos head d_head], before the rotary embedding; k
            and v have n_kv_heads heads, and in memory layers the memory's vectors for positions.
        z: values averaged by the attention [batch pos head d_head], the output projection's input.
        pattern: attention weights [batch head dest src], recomputed from q and k.
        attention: what a layer's attention is computed from, an `Attention`; read-only.
        memory_pattern, memory_attention: the same of the layers that read an image's memory
            (`memory_layers`), [batch head dest memory]. No other layer has them, and these layers
            have no `pattern` and `attention`.
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
    memory_pattern: PatternAccessor
    memory_attention: Accessor[Attention]

    def __init__(self, model: Any, record: Architecture, name: str, config: Any, d_vocab: int):
        self.model, self.record, self.name, self.config, self.d_vocab = model, record, name, config, d_vocab
        text = self.text_config
        envoys = [part(model, path) for path in layer_paths(record, model)]
        self.n_layers: int = len(envoys)
        self.n_heads: int = text.num_attention_heads
        self.n_kv_heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.d_model: int = text.hidden_size
        self.d_head: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.layer_parts = [
            Layer(envoy, number, record.kind(number), self.d_head, record.adds_between, self.has_weights)
            for number, envoy in enumerate(envoys)
        ]
        for site, accessor in build_accessors(self.layer_parts).items():
            setattr(self, site, accessor)
        self._plain_norms: set[int] = set()  # layers whose norm after the attention is an RMSNorm

    def prepare(self) -> None:
        """Have nnsight rewrite the forward of every attention, which must be before any runs."""
        for block in self.layer_parts:
            block.prepare()
        for module in self.cross_attentions:
            attention_call(module)

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
        return self.config.get_text_config(decoder=True)

    @property
    def norm_eps(self) -> float:
        """The epsilon of the decoder's final norm."""
        eps = self.record.norm_eps
        return float(getattr(self.text_config, eps) if isinstance(eps, str) else eps)

    def trace(self, inputs: Any, **kwargs):
        """A trace over one forward of `inputs`, inside a request that holds several."""
        return self.model.trace(**inputs.encoding, **kwargs)

    @property
    def layers(self) -> list:
        """The decoder's layers, as nnsight's envoys."""
        return [block.envoy for block in self.layer_parts]

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """The layers that attend to the image's memory; empty where the image is tokens."""
        return tuple(block.number for block in self.layer_parts if block.kind.memory)

    @property
    def gates(self) -> dict[int, Gates]:
        """The gates of the memory layers, by layer.

        >>> {layer: float(gate.attn) for layer, gate in vlm.gates.items()}
        {3: 0.41, 8: 0.67}
        """
        with torch.no_grad():
            of = {block.number: (block.gate("attn_out"), block.gate("mlp_out")) for block in self.layer_parts}
        return {layer: Gates(attn, mlp) for layer, (attn, mlp) in of.items() if attn is not None and mlp is not None}

    @property
    def final_norm(self):
        """The norm before the unembedding, callable on any state inside a trace."""
        return part(self.model, self.record.norm)

    @property
    def unembed(self) -> Unembedding:
        """The unembedding, callable on any normed state inside a trace: gives logits."""
        return self.readout()[1]

    @property
    def cross_attentions(self) -> list:
        """The attentions by which the queries read the image; empty for patches."""
        record = self.record
        if record.qformer_layers is None or record.cross_attention is None or record.cross_attention_every is None:
            return []
        every = part(self.config, record.cross_attention_every)
        return [part(layer, record.cross_attention) for layer in list(part(self.model, record.qformer_layers))[::every]]

    # -- activations that belong to no layer --

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """Inside a trace: the model's logits, readable and assignable."""
        self._require_trace_of_logits()
        try:
            return self._unembed().logits_of(part(self.model, self.record.unembed).output)
        except Exception as error:
            reword(error, "vlm.logits")
            raise

    @logits.setter
    def logits(self, value: Tensor) -> None:
        self._require_trace_of_logits()
        try:
            part(self.model, self.record.unembed).output = self._unembed().output_for(value)
        except Exception as error:
            reword(error, "vlm.logits")
            raise

    def _require_trace_of_logits(self) -> None:
        if self.has_weights:
            require_trace("vlm.logits", part(self.model, self.record.unembed))

    # -- weights --

    def readout(self) -> tuple[Norm, Unembedding]:
        """Inside a trace: final norm and unembedding, with their weights even in a sandbox."""
        return self._norm(self.final_norm), self._unembed()

    def _unembed(self) -> Unembedding:
        scale, cap = (
            getattr(self.text_config, given, None) if isinstance(given, str) else given
            for given in (self.record.logit_scale, self.record.logit_cap)
        )
        embed, envoy = part(self.model, self.record.embed), part(self.model, self.record.unembed)
        return Unembedding(envoy, embed, self.d_model, 1.0 if scale is None else scale, cap)

    def projection(self, name: str, layer: int) -> Projection:
        """Inside a trace: a layer's projection, with its weight even in a sandbox.

        Args:
            name: "q_proj", "k_proj", "v_proj" or "o_proj".
            layer: the layer.
        """
        block = self.layer_parts[layer]
        width = self.n_heads * block.d_head if name == "o_proj" else self.d_model
        return Projection(part(block.attn, block.has(name)), part(self.model, self.record.embed), width)

    def write_path(self, layer: int) -> "WritePath":
        """Inside a trace: how the heads' outputs reach the residual stream.

        Read it after the layer's `z` and before its `attn_out`.

        Raises:
            ModelError: where a norm stands in between that is no RMSNorm.
        """
        block, o_proj = self.layer_parts[layer], self.projection("o_proj", layer)
        w_o, b_o, kind = o_proj.weight, o_proj.bias, block.kind
        if kind.attn_out == kind.attention:
            gate, is_open = block.gate("attn_out"), block.is_open("attn_out")
            factor = gate if gate is not None else kind.scale
            if kind.scale != 1 or gate is not None:
                by_row = factor[:, None] if isinstance(factor, Tensor) else factor
                w_o, b_o = w_o * by_row, None if b_o is None else b_o * factor
            return WritePath(w_o, b_o, None if is_open is None else torch.where(is_open != 0, 1.0, torch.inf))
        norm = self._norm(part(block.envoy, block.has("attn_out")))
        if layer not in self._plain_norms:  # asked once: the answer has to wait for a GPU
            if norm.centres or norm.bias.any():
                raise ModelError(
                    f"The norm after the attention of layer {layer} is no RMSNorm: what it adds is no sum over heads and sources."
                )
            self._plain_norms.add(layer)
        gain = norm.gain * kind.scale
        divisor = rms(norm.envoy.input, norm.eps)
        return WritePath(w_o * gain.to(w_o)[:, None], None if b_o is None else b_o * gain.to(b_o), divisor)

    def mlp_norm(self, layer: int) -> Norm | None:
        """The norm between a layer's MLP and the residual stream, where there is one."""
        kind = self.record.kind(layer)
        if kind.mlp_out is None or kind.down_proj is None or f"{kind.down_proj}.".startswith(f"{kind.mlp_out}."):
            return None
        return self._norm(part(self.layer_parts[layer].envoy, kind.mlp_out))

    def _norm(self, envoy: Any) -> Norm:
        return Norm(envoy, part(self.model, self.record.embed), self.d_model, self.norm_eps)

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
        return Weights(self.n_layers, "W_Q", lambda layer: self._by_head(layer, "q"))

    @property
    def W_K(self) -> Weights:
        """The key weights, `W_K[layer]` [head d_model d_head]."""
        return Weights(self.n_layers, "W_K", lambda layer: self._by_head(layer, "k"))

    @property
    def W_V(self) -> Weights:
        """The value weights, `W_V[layer]` [head d_model d_head]."""
        return Weights(self.n_layers, "W_V", lambda layer: self._by_head(layer, "v"))

    @property
    def W_O(self) -> Weights:
        """The output weights, `W_O[layer]` [head d_head d_model]."""
        return Weights(self.n_layers, "W_O", lambda layer: self._out_by_head(layer))

    def _out_by_head(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        return out_heads(self.projection("o_proj", layer).weight, self.layer_parts[layer].d_head)

    def _by_head(self, layer: int, name: str) -> Float[Tensor, "head d_model d_head"]:
        block = self.layer_parts[layer]
        weight = self.projection(f"{name}_proj", layer).weight.T
        by_head = in_columns(weight, block.columns(name), block.n_heads(name), block.d_head)
        by_head = rearrange(by_head, "d_model head d_head -> head d_model d_head")
        n = len(by_head)  # n_kv_heads for k and v, each shared by a group of query heads
        return by_head if n == self.n_heads else by_head.repeat_interleave(self.n_heads // n, dim=0)
