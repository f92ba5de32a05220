"""A module of the model with its weight, wherever the trace's block runs.

A server runs the blocks of users whom it does not trust in a process that holds no weights: there every module is on the
meta device, and can only be called. What it is called with gives its weight back, exactly.
"""

from typing import Any

import torch
from torch import Tensor


class Part:
    """A linear module, an RMSNorm or an embedding within a trace: callable, with its `weight` and `bias`.

    `envoy` is nnsight's, `embed` that of the token embedding, whose output shows the dtype in which the model computes.
    """

    def __init__(self, envoy: Any, embed: Any):
        self.envoy, self._embed = envoy, embed
        self._weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.envoy(x)

    @property
    def weight(self) -> Tensor:
        """[out in] of a linear module, [d_model] of a norm, [d_vocab d_model] of an embedding."""
        if self._weight is None:
            own = self.envoy.weight
            self._weight = self._read(own) if own.device.type == "meta" else own
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        own = getattr(self.envoy, "bias", None)
        if own is None or own.device.type != "meta":
            return own
        return self.envoy(self._like(torch.zeros(1, self.envoy.weight.shape[1])))[0]

    @property
    def variance_epsilon(self) -> float:
        return self.envoy.variance_epsilon

    def _like(self, x: Tensor) -> Tensor:
        return x.to(self._embed(torch.zeros(1, dtype=torch.long)))

    def _read(self, own: Tensor) -> Tensor:
        """The weight by calling the module, where it has none that could be looked at."""
        if self.envoy.path == self._embed.path:
            return self.envoy(torch.arange(own.shape[0]))
        if own.ndim == 1:  # an RMSNorm divides ones by the root of 1 + eps
            return self.envoy(self._like(torch.ones(own.shape))) * (1 + self.variance_epsilon) ** 0.5
        rows = self.envoy(self._like(torch.eye(own.shape[1])))
        bias = self.bias
        return (rows if bias is None else rows - bias).T
