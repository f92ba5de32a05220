"""A module of the model with its weight, wherever the trace's block runs.

A server runs the blocks of users whom it does not trust in a process that holds no weights: there a module can only be
called. What it is called with gives its weight back, exactly.
"""

from typing import Any

import torch
from torch import Tensor


class Part:
    """A linear module, or an RMSNorm, within a trace: callable, with its `weight` and `bias`.

    `envoy` is nnsight's; `embed` that of the token embedding, whose output shows the dtype in which the model computes;
    `width` of what it reads; `eps` of a norm.
    """

    def __init__(self, envoy: Any, embed: Any, width: int, eps: float | None = None):
        self.envoy, self._embed, self._width, self.variance_epsilon = envoy, embed, width, eps
        self._weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.envoy(x)

    @property
    def weight(self) -> Tensor:
        """[out in] of a linear module, [width] of a norm."""
        if self._weight is None:
            self._weight = self.envoy.weight if is_here(self.envoy) else self._read()
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        """[out] of a linear module, or None."""
        return getattr(self.envoy, "bias", None) if is_here(self.envoy) else self._call(torch.zeros)[0]

    def _call(self, made) -> Tensor:
        """The module's output for rows that `made` makes, in the model's dtype and on its device."""
        like = self._embed(torch.zeros(1, dtype=torch.long))
        return self.envoy(made(self._width, self._width, device=like.device, dtype=like.dtype))

    def _read(self) -> Tensor:
        if self.variance_epsilon is not None:  # an RMSNorm divides ones by the root of 1 + eps
            return self._call(torch.ones)[0] * (1 + self.variance_epsilon) ** 0.5
        return (self._call(torch.eye) - self._call(torch.zeros)).T


def is_here(envoy) -> bool:
    """Whether the process that runs this holds the module's weight."""
    weight = getattr(envoy, "weight", None)
    return weight is not None and weight.device.type != "meta"
