"""Weights by layer and head, and whether this process holds any weights."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechvlm.decoder.mistakes import layer_number


def has_weights(envoy: Any) -> bool:
    """Whether this process holds the module's weight: not on NDIF's clients, nor in its sandbox."""
    weight = getattr(envoy, "weight", None)
    return weight is not None and weight.device.type != "meta"


class Weights:
    """One weight of every layer, by head: `weights[layer]` is a view of the model's parameters.

    Grouped keys and values are repeated, so that every query head has its own.

    Args:
        n_layers: number of the decoder's layers.
        name: TransformerLens' name of the weight, for the error text.
        read: gives the weight of a layer.
    """

    def __init__(self, n_layers: int, name: str, read: Callable[[int], Tensor]):
        self._n_layers, self._name, self._read = n_layers, name, read

    def __len__(self) -> int:
        return self._n_layers

    def __getitem__(self, layer: Any) -> Float[Tensor, "head _ _"]:
        return self._read(layer_number(self._name, layer, self._n_layers))
