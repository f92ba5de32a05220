"""Accessors read and replace activations inside a trace, under TransformerLens' names.

    with vlm.trace(inputs):
        state = nnsight.save(vlm.resid_post[3])  # [batch pos d_model]
        vlm.z[5] = torch.zeros_like(vlm.z[5])  # [batch pos head d_head]

Every accessor is indexed by layer, 0 to n_layers - 1 (or -1 for the last). A trace runs the forward
once, so read in the order in which the model computes: layer by layer, and within a layer
`resid_pre`, `q`, `k`, `v`, `pattern`, `z`, `attn_out`, `resid_mid`, `mlp_out`, `resid_post`.

Assigning `resid_mid` changes the tensor in place, since both the MLP's norm and the residual sum
read it. A tensor that was read from it before changes too. To keep the clean state save
`vlm.resid_mid[l].clone()`, and for a gradient through it read `vlm.resid_mid[l] * 1`.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from mechvlm.decoder.attention import Attention, attention_call, attention_rows, read_attention
from mechvlm.decoder.mistakes import layer_number, require_trace, reword
from mechvlm.decoder.projections import child
from mechvlm.families.record import Architecture

T = TypeVar("T")


class Accessor(Generic[T]):
    """One activation of every layer.

    `accessor[layer]` reads it, and `accessor[layer] = value` replaces it.
    """

    def __init__(self, name: str, layers, read: Callable, write: Callable, has_weights: bool = True):
        self.name, self._layers, self._read, self._write = name, layers, read, write
        self._has_weights = has_weights

    def __repr__(self) -> str:
        return f"<{self.name} of layers 0 to {len(self) - 1}: {self.name}[layer], inside a trace>"

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: Any) -> T:
        return self._at(layer, self._read)

    def __setitem__(self, layer: Any, value: T) -> None:
        self._at(layer, self._write, value)

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"{self.name} is one activation of every layer, and has no {name!r}. Choose a layer: {self.name}[2].{name}."
        )

    def _at(self, layer: Any, work: Callable, *args):
        """work(envoy of the layer, *args), with errors about the accessor instead of nnsight's."""
        number = layer_number(self.name, layer, len(self._layers))
        what, envoy = f"vlm.{self.name}[{number}]", self._layers[number]
        if self._has_weights:
            require_trace(what, envoy)
        try:
            return work(envoy, *args)
        except Exception as error:
            reword(error, what)
            raise


class PatternAccessor(Accessor[Tensor]):
    """Attention weights [batch head dest src], recomputed from q and k.

    The model keeps its own attention implementation. `pattern[layer]` gives all rows.
    `pattern[layer, rows]` gives those of the destinations `rows`, which are numbers for every
    example or [batch row]. Rows of padding mean nothing. After `pattern[layer] = weights` the
    layer's heads write their values averaged with these weights.
    """

    def __init__(self, layers, attention: Callable, write: Callable, has_weights: bool = True):
        Accessor.__init__(self, "pattern", layers, attention, write, has_weights)

    def __getitem__(self, index) -> Tensor:  # type: ignore[override]
        layer, rows = index if isinstance(index, tuple) and len(index) == 2 else (index, None)
        a = self._at(layer, self._read)
        if rows is not None:
            rows = torch.as_tensor(rows, device=a.q.device)
            rows = rows.reshape(1, -1).expand(a.q.shape[0], -1) if rows.ndim < 2 else rows
            n = a.q.shape[2]
            if not ((rows >= -n) & (rows < n)).all():
                raise IndexError(
                    f"pattern[{layer}, rows]: rows {rows.tolist()} were asked for; there are rows 0 to {n - 1}."
                )
            rows = rows % n
        return attention_rows(a.q, a.k, a.mask, a.scale, rows, a.q.dtype)


def build_accessors(layers, record: Architecture, d_head: int, has_weights: bool = True) -> dict[str, Accessor[Any]]:
    """A decoder's accessors by name, on the nnsight envoys of its layers.

    Args:
        layers: envoys of the decoder's layers.
        record: record of the model's class.
        d_head: width of a head.
        has_weights: False for a block in NDIF's sandbox. A change in place stays inside the
            sandbox, so `resid_mid` is replaced there by assigning to the sum that computes it.
    """

    def attn(layer):
        if not has_weights:
            # `mid_sum` needs the layer's source, which nnsight must rewrite before the layer runs.
            layer.source  # noqa: B018
        return getattr(layer, record.attention)

    def proj(layer, name):
        # `pattern` may be read later in this trace. nnsight must rewrite the attention's source
        # before the attention runs, so ask for it now.
        attention_call(attn(layer), record)
        return child(attn(layer), getattr(record, f"{name}_proj"))

    def heads(x):
        return rearrange(x, "batch pos (head d_head) -> batch pos head d_head", d_head=d_head)

    def flat(x):
        return rearrange(x, "batch pos head d_head -> batch pos (head d_head)")

    def attention(layer) -> Attention:
        return read_attention(attn(layer), record)

    def write_resid_pre(layer, value):
        layer.input = value

    def read_resid_mid(layer):
        return getattr(layer, record.mid_norm).input if has_weights else getattr(layer.source, record.mid_sum).output

    def write_resid_mid(layer, value):
        if not has_weights:
            getattr(layer.source, record.mid_sum).output = value
            return
        # The norm and the sum with the MLP's output both read this tensor: change it in place.
        getattr(layer, record.mid_norm).input[:] = value

    def write_resid_post(layer, value):
        layer.output = value

    def write_attn_out(layer, value):
        attn(layer).output = (value, *attn(layer).output[1:])

    def write_mlp_out(layer, value):
        getattr(layer, record.mlp).output = value

    def write_z(layer, value):
        proj(layer, "o").input = flat(value)

    def write_pattern(layer, value):
        v = attention(layer).v
        v = v.repeat_interleave(value.shape[1] // v.shape[1], dim=1)
        write_z(layer, rearrange(value.to(v.dtype) @ v, "batch head pos d_head -> batch pos head d_head"))

    def write_proj(name):
        def write(layer, value):
            proj(layer, name).output = flat(value)

        return write

    # Name: (read, write).
    functions = {
        "resid_pre": (lambda x: x.input, write_resid_pre),
        "resid_mid": (read_resid_mid, write_resid_mid),
        "resid_post": (lambda x: x.output, write_resid_post),
        "attn_out": (lambda x: attn(x).output[0], write_attn_out),
        "mlp_out": (lambda x: getattr(x, record.mlp).output, write_mlp_out),
        "q": (lambda x: heads(proj(x, "q").output), write_proj("q")),
        "k": (lambda x: heads(proj(x, "k").output), write_proj("k")),
        "v": (lambda x: heads(proj(x, "v").output), write_proj("v")),
        "z": (lambda x: heads(proj(x, "o").input), write_z),
    }
    accessors: dict[str, Accessor[Any]] = {
        name: Accessor(name, layers, *pair, has_weights) for name, pair in functions.items()
    }
    accessors["pattern"] = PatternAccessor(layers, attention, write_pattern, has_weights)
    accessors["attention"] = Accessor("attention", layers, attention, _refuse_write, has_weights)
    return accessors


def _refuse_write(layer, value):
    raise TypeError("attention is read-only: assign q, k, v or pattern.")
