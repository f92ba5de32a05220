"""RMSNorm: x / r * g, with r = sqrt(mean(x²) + eps).

All code that needs the divisor r or the gain g (the norm's weight) gets it from this file.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechvlm.decoder.projections import output_for
from mechvlm.decoder.weights import has_weights, weight_and_bias


def rms(x: Float[Tensor, "*axes d_model"], eps: float) -> Float[Tensor, "*axes 1"]:
    """The divisor r of an RMSNorm, in float32: TransformerLens' hook_scale."""
    return (x.float().pow(2).mean(-1, keepdim=True) + eps).sqrt()


def gain(norm: Any) -> Float[Tensor, " d_model"]:
    """The gain g of an RMSNorm: its weight."""
    return weight_and_bias(norm)[0]


class Norm:
    """An RMSNorm inside a trace: callable, with its gain even in a sandbox.

    Args:
        envoy: nnsight's envoy of the norm.
        embed: nnsight's envoy of the token embedding, whose output shows dtype and device.
        width: width of the states.
        eps: epsilon of the norm.
    """

    def __init__(self, envoy: Any, embed: Any, width: int, eps: float):
        self.envoy, self.eps, self._embed, self._width = envoy, eps, embed, width
        self._gain: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.envoy(x)

    def in_float32(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """The normed states, computed in float32 whatever the norm's weight is in."""
        return x.float() / self.rms(x) * self.gain.float()

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        """The gain g: the norm's weight, or in a sandbox computed from an output of the norm."""
        if self._gain is None:
            self._gain = gain(self.envoy) if has_weights(self.envoy) else self._probed()
        return self._gain

    def rms(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes 1"]:
        """The divisor r of these states, in float32."""
        return rms(x, self.eps)

    def _probed(self) -> Tensor:
        # The norm of a vector of ones is 1 / sqrt(1 + eps) times its gain.
        return output_for(self.envoy, self._embed, torch.ones, self._width)[0] * (1 + self.eps) ** 0.5


@torch.no_grad()
def fold(norm: nn.Module, unembed: nn.Module) -> None:
    """Multiply a norm's gain into a copy of the unembedding's weight, and set the gain to one.

    The logits stay the same: W_U (x / r * g) = (W_U g) (x / r).
    """
    weight, w_u = gain(norm), unembed.get_parameter("weight")
    unembed.weight = nn.Parameter(w_u * weight)
    norm.weight = nn.Parameter(torch.ones_like(weight))
