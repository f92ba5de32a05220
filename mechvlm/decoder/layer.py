"""One decoder layer inside a trace: reads and replaces what its `LayerKind` says where to find.

`attn_out` and `mlp_out` are what is ADDED to the residual stream. Where a norm stands between the
output projection and the stream (Gemma), it is the norm's output; where a factor does (Granite), or
a gate (Flamingo's tanh), it is the product. So for every family

    resid_mid = resid_pre + attn_out,    resid_post = resid_mid + mlp_out

and where attention and MLP read the same state (no `resid_mid`), resid_post is the sum of all
three.

A memory layer attends to the image's memory and to no position (`LayerKind.memory`). Its keys and
values are the memory's, [batch memory kv_head d_head].
"""

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from mechvlm.decoder.attention import Attention, attention_call, read_attention
from mechvlm.decoder.projections import in_columns, write_columns
from mechvlm.errors import ModelError
from mechvlm.families.record import LayerKind, part


class Layer:
    """A layer's activations, inside a trace.

    Args:
        envoy: nnsight's envoy of the layer.
        number: its number, for errors.
        kind: what it is made of.
        d_head: width of a head.
        adds_between: whether features are added to its output afterwards, in place.
        has_weights: False for a block in NDIF's sandbox. A change in place stays inside the
            sandbox, so `resid_mid` is replaced there by assigning to the sum that computes it.
    """

    def __init__(
        self,
        envoy: Any,
        number: int,
        kind: LayerKind,
        d_head: int,
        adds_between: bool = False,
        has_weights: bool = True,
    ):
        self.envoy, self.number, self.kind, self.has_weights = envoy, number, kind, has_weights
        self._adds_between = adds_between
        self.d_head = kind.d_head or d_head
        if kind.flat or kind.memory:
            self._watch_arguments()

    def has(self, name: str) -> str:
        """The path of a part of this layer.

        Raises:
            ModelError: for a part that it does not have.
        """
        path = getattr(self.kind, name)
        if path is None:
            raise ModelError(f"Layer {self.number} of this model {LACKS[name]}")
        return path

    def _watch_arguments(self) -> None:
        """Keep what later activations do not show of the running forward's arguments.

        That is the number of examples, where activations are flat or run over images, and which
        positions are open.
        """
        if not self.has_weights:
            raise ModelError(
                "This model's layers are read with parameters or arguments of their forward that NDIF's sandbox does not show: "
                "load it here, without remote=True."
            )

        module = self.envoy._module
        if keep_arguments not in module._forward_pre_hooks.values():  # a model may be loaded again
            module.register_forward_pre_hook(keep_arguments, with_kwargs=True)
            # Another forward must not be read with these.
            module.register_forward_hook(forget_arguments, always_call=True)

    def _shaped(self, x: Tensor) -> Tensor:
        """[batch pos d], as a view, of an activation that may be flat."""
        return x.unflatten(0, (self.envoy._module.n_examples, -1)) if self.kind.flat and x.ndim == 2 else x

    @property
    def attn(self) -> Any:
        """The attention, as nnsight's envoy."""
        return part(self.envoy, self.has("attention"))

    def prepare(self) -> None:
        """Have nnsight rewrite the attention's forward, before any forward runs."""
        if self.kind.attention is not None:
            attention_call(self.attn)

    def prepare_mid(self) -> None:
        """In a sandbox: have nnsight rewrite the layer's own forward, before the layer runs.

        `mid_sum` needs it, and whatever else is read of this layer may come first.
        """
        if not self.has_weights and self.kind.mid_norm is not None:
            self.envoy.source  # noqa: B018

    def proj(self, name: str) -> Any:
        """A projection of the attention, as nnsight's envoy."""
        # `pattern` may be read later in this trace. nnsight must rewrite the attention's source
        # before the attention runs, so ask for it now.
        self.prepare()
        return part(self.attn, self.has(f"{name}_proj"))

    def attention(self) -> Attention:
        if self.kind.memory:
            raise ModelError(
                f"Layer {self.number} of this model attends to the image's memory, and to no position: take vlm.memory_pattern"
                f"[{self.number}], vlm.memory_attention[{self.number}] or mv.memory_attention."
            )
        return read_attention(self.attn)

    def memory_attention(self) -> Attention:
        if not self.kind.memory:
            raise ModelError(
                f"Layer {self.number} of this model attends to positions, and to no memory: take vlm.pattern[{self.number}] or "
                f"vlm.attention[{self.number}]. vlm.memory_layers are the layers that read an image's memory."
            )
        return read_attention(self.attn)

    # -- the residual stream --

    def read_resid_pre(self) -> Tensor:
        return self.envoy.input

    def write_resid_pre(self, value: Tensor) -> None:
        self.envoy.input = value

    def read_resid_mid(self) -> Tensor:
        norm = part(self.envoy, self.has("mid_norm"))
        return self._shaped(norm.input) if self.has_weights else getattr(self.envoy.source, self.kind.mid_sum).output

    def write_resid_mid(self, value: Tensor) -> None:
        norm = part(self.envoy, self.has("mid_norm"))
        if not self.has_weights:
            getattr(self.envoy.source, self.kind.mid_sum).output = value
            return
        # The norm and the sum with the MLP's output both read this tensor: change it in place.
        self._shaped(norm.input)[:] = value

    def read_resid_post(self) -> Tensor:
        out = first(self.envoy.output)
        return out.clone() if self._adds_between else out

    def write_resid_post(self, value: Tensor) -> None:
        self.envoy.output = with_first(self.envoy.output, value)

    # -- what is added to it --

    def read_attn_out(self) -> Tensor:
        return self._write_of("attn_out")

    def write_attn_out(self, value: Tensor) -> None:
        self._replace_write("attn_out", value)

    def read_mlp_out(self) -> Tensor:
        return self._write_of("mlp_out")

    def write_mlp_out(self, value: Tensor) -> None:
        self._replace_write("mlp_out", value)

    def _write_of(self, name: str) -> Tensor:
        out = self._shaped(first(part(self.envoy, self.has(name)).output))
        factor = self._factor(name)
        return out if factor is None else out * factor

    def _replace_write(self, name: str, value: Tensor) -> None:
        module = part(self.envoy, self.has(name))
        out, factor = module.output, self._factor(name)
        if isinstance(factor, Tensor) and (value.masked_fill(factor != 0, 0) != 0).any():
            raise ModelError(
                f"Layer {self.number} adds no {name} at some of these positions or dimensions: its gate is 0 there, or the "
                f"position is closed to the image. Assign resid_mid or resid_post instead."
            )
        if factor is not None:
            value = (value / factor).masked_fill(factor == 0, 0) if isinstance(factor, Tensor) else value / factor
        module.output = with_first(out, value.reshape(first(out).shape))

    def _factor(self, name: str) -> Tensor | float | None:
        """What multiplies the output of the module `name` where it is added; None for nothing.

        A number, or with a gate a tensor that broadcasts to [batch pos d_model].
        """
        gate, is_open = self.gate(name), self.is_open(name)
        if gate is None:
            return None if self.kind.scale == 1 else self.kind.scale
        return gate if is_open is None else gate * is_open

    def gate(self, name: str) -> Tensor | None:
        """The gate's tanh by which `name` ("attn_out" or "mlp_out") is multiplied; None without.

        [1], or [d_model] where each dimension has its own.
        """
        path = getattr(self.kind, name.replace("_out", "_gate"))
        return None if path is None else part(self.envoy._module, path).tanh().flatten()

    def is_open(self, name: str) -> Tensor | None:
        """Where `name` is added, [batch pos 1] of 0 and 1; None for every position.

        It is known once something inside the layer was read: the layer runs then.
        """
        argument = getattr(self.kind, name.replace("_out", "_open"))
        arguments = getattr(self.envoy._module, "given", {})
        if argument is not None and not arguments:
            raise ModelError(f"Layer {self.number} does not run now: read its z, attn_out or mlp_out first.")
        given = None if argument is None else arguments[argument]
        return None if given is None else (given != 0).to(given).reshape(len(given), -1, 1)

    def read_neurons(self) -> Tensor:
        """The MLP's neurons [batch pos d_mlp]: the input of its last projection."""
        return self._shaped(part(self.envoy, self.has("down_proj")).input)

    # -- inside the attention --

    def read_q(self) -> Tensor:
        return self._heads_of("q")

    def read_k(self) -> Tensor:
        return self._heads_of("k")

    def read_v(self) -> Tensor:
        return self._heads_of("v")

    def write_q(self, value: Tensor) -> None:
        self._replace_heads("q", value)

    def write_k(self, value: Tensor) -> None:
        self._replace_heads("k", value)

    def write_v(self, value: Tensor) -> None:
        self._replace_heads("v", value)

    def read_z(self) -> Tensor:
        return rearrange(self.proj("o").input, "batch pos (head d_head) -> batch pos head d_head", d_head=self.d_head)

    def write_z(self, value: Tensor) -> None:
        self.proj("o").input = rearrange(value, "batch pos head d_head -> batch pos (head d_head)")

    def write_pattern(self, value: Tensor) -> None:
        self._write_averages(value, self.attention().v)

    def write_memory_pattern(self, value: Tensor) -> None:
        self._write_averages(value, self.memory_attention().v)

    def _write_averages(self, value: Tensor, v: Tensor) -> None:
        v = v.repeat_interleave(value.shape[1] // v.shape[1], dim=1)
        self.write_z(rearrange(value.to(v.dtype) @ v, "batch head pos d_head -> batch pos head d_head"))

    def columns(self, name: str) -> tuple[int, int] | None:
        """(start, step) of q's, k's or v's heads in a fused matrix; None for one of its own."""
        return self.kind.columns["qkv".index(name)] if self.kind.columns else None

    def _heads_of(self, name: str) -> Tensor:
        out = self.proj(name).output
        if self.kind.memory and name != "q":  # a row for each image, in Mllama for each tile
            out = out.reshape(self.envoy._module.n_examples, -1, out.shape[-1])
        return in_columns(out, self.columns(name), self.n_heads(name), self.d_head)

    def _replace_heads(self, name: str, value: Tensor) -> None:
        projection = self.proj(name)
        if (columns := self.columns(name)) is None:
            new = rearrange(value, "batch pos head d_head -> batch pos (head d_head)")
            projection.output = new.reshape(projection.output.shape) if self.kind.memory else new
        else:
            projection.output = write_columns(projection.output, columns, value)

    def n_heads(self, name: str) -> int | None:
        """How many heads of q, k or v lie in a fused matrix; None for a matrix of their own."""
        return self.kind.n_heads["qkv".index(name)] if self.kind.columns else None


def keep_arguments(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Hook of a layer: keeps how many examples enter it, and by name what else, while it runs."""
    layer.n_examples = len(args[0] if args else kwargs["hidden_states"])  # type: ignore[assignment]
    layer.given = kwargs  # type: ignore[assignment]


def forget_arguments(layer: nn.Module, args: tuple, out: Any) -> None:
    """Hook of a layer: forgets them when it has run."""
    layer.given = {}  # type: ignore[assignment]


LACKS = {
    "attention": "has no attention whose weights could be read (linear attention or a convolution).",
    "q_proj": "has no matrix whose output are its queries. vlm.attention[layer] gives them, and vlm.pattern[layer] the weights.",
    "k_proj": "has no matrix whose output are its keys. vlm.attention[layer] gives them, and vlm.pattern[layer] the weights.",
    "v_proj": "has no matrix whose output are its values. vlm.attention[layer] gives them.",
    "mid_norm": "has no state between attention and MLP: both read resid_pre.",
    "attn_out": "has no module whose output is what its attention adds to the residual stream.",
    "mlp_out": "has no module whose output is what its MLP adds to the residual stream.",
    "down_proj": "has no single MLP whose neurons could be read (a mixture of experts).",
}


def first(output: Any) -> Tensor:
    """The tensor of a module's output, which may be a tuple with more in it."""
    return output[0] if isinstance(output, tuple | list) else output


def with_first(output: Any, value: Tensor) -> Any:
    """A module's output with another tensor, and all else of it as it is."""
    return (value, *output[1:]) if isinstance(output, tuple | list) else value
