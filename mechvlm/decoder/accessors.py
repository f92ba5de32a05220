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
from torch import Tensor

from mechvlm.decoder.attention import Attention, attention_rows
from mechvlm.decoder.layer import Layer
from mechvlm.decoder.mistakes import layer_number, require_trace, reword

T = TypeVar("T")


class Accessor(Generic[T]):
    """One activation of every layer.

    `accessor[layer]` reads it, and `accessor[layer] = value` replaces it.
    """

    def __init__(self, name: str, layers: list[Layer], read: Callable, write: Callable):
        self.name, self._layers, self._read, self._write = name, layers, read, write

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

    def _at(self, number: Any, work: Callable, *args):
        """work(layer, *args), with errors about the accessor instead of nnsight's."""
        number = layer_number(self.name, number, len(self._layers))
        what, layer = f"vlm.{self.name}[{number}]", self._layers[number]
        if layer.has_weights:
            require_trace(what, layer.envoy)
        try:
            layer.prepare_mid()
            return work(layer, *args)
        except Exception as error:
            reword(error, what)
            raise


class PatternAccessor(Accessor[Tensor]):
    """Attention weights [batch head dest src], recomputed from q and k.

    The model keeps its own attention implementation. `pattern[layer]` gives all rows.
    `pattern[layer, rows]` gives those of the destinations `rows`, which are numbers for every
    example or [batch row]. Rows of padding mean nothing. After `pattern[layer] = weights` the
    layer's heads write their values averaged with these weights.

    `memory_pattern` is the same for layers that read an image's memory: [batch head dest memory].
    """

    def __getitem__(self, index) -> Tensor:  # type: ignore[override]
        layer, rows = index if isinstance(index, tuple) and len(index) == 2 else (index, None)
        a = self._at(layer, self._read)
        if rows is not None:
            rows = torch.as_tensor(rows, device=a.q.device)
            rows = rows.reshape(1, -1).expand(a.q.shape[0], -1) if rows.ndim < 2 else rows
            n = a.q.shape[2]
            if not ((rows >= -n) & (rows < n)).all():
                raise IndexError(
                    f"{self.name}[{layer}, rows]: rows {rows.tolist()} were asked for; there are rows 0 to {n - 1}."
                )
            rows = rows % n
        return attention_rows(a, rows, a.q.dtype)


def build_accessors(layers: list[Layer]) -> dict[str, Accessor[Any]]:
    """The accessors of a decoder's layers, by name."""
    functions: dict[str, tuple[Callable, Callable]] = {
        name: (getattr(Layer, f"read_{name}"), getattr(Layer, f"write_{name}"))
        for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z")
    }
    accessors: dict[str, Accessor[Any]] = {name: Accessor(name, layers, *pair) for name, pair in functions.items()}
    for name, read in (("attention", Layer.attention), ("memory_attention", Layer.memory_attention)):
        accessors[name] = Accessor[Attention](name, layers, read, _refuse_write)
    accessors["pattern"] = PatternAccessor("pattern", layers, Layer.attention, Layer.write_pattern)
    accessors["memory_pattern"] = PatternAccessor(
        "memory_pattern", layers, Layer.memory_attention, Layer.write_memory_pattern
    )
    return accessors


def _refuse_write(layer, value):
    raise TypeError("attention is read-only: assign q, k, v, pattern or memory_pattern.")
