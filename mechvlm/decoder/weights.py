"""Weights of every layer, and whether they are in this process at all."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor


def has_weights(envoy: Any) -> bool:
    """Whether this process holds the module's weight: not on a client of NDIF, nor in its sandbox."""
    weight = getattr(envoy, "weight", None)
    return weight is not None and weight.device.type != "meta"


class Weights:
    """One weight of every layer, per head: views of the model's own parameters.

    Grouped keys and values are repeated, so that every query head has its own.
    """

    def __init__(self, n: int, name: str, read: Callable[[int], Tensor]):
        self._n, self._name, self._read = n, name, read

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, layer: int) -> Float[Tensor, "head _ _"]:
        if not -self._n <= layer < self._n:
            raise IndexError(f"{self._name}[{layer}]: the decoder has layers 0 to {self._n - 1}.")
        return self._read(layer)
