"""RMSNorm: x / r * g, with r = sqrt(mean(x²) + eps). Every use of r and of the weight g is here."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechvlm.decoder.projections import output_for
from mechvlm.decoder.weights import has_weights


def rms(x: Float[Tensor, "*axes d_model"], eps: float) -> Float[Tensor, "*axes 1"]:
    """What an RMSNorm divides by, in float32: TransformerLens' hook_scale."""
    return (x.float().pow(2).mean(-1, keepdim=True) + eps).sqrt()


def gain(norm: Any) -> Float[Tensor, " d_model"]:
    """What a norm multiplies with once it has divided: the weight of an RMSNorm."""
    return norm.weight


class Norm:
    """An RMSNorm inside a trace: callable, with its gain wherever the block runs.

    Args:
        envoy: nnsight's.
        embed: nnsight's envoy of the token embedding, whose output shows dtype and device.
        width: of the states.
        eps: of the norm.
    """

    def __init__(self, envoy: Any, embed: Any, width: int, eps: float):
        self.envoy, self.eps, self._embed, self._width = envoy, eps, embed, width
        self._gain: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.envoy(x)

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        """The norm's own weight, or in a sandbox, which holds none, what its output shows of it."""
        if self._gain is None:
            self._gain = gain(self.envoy) if has_weights(self.envoy) else self._probed()
        return self._gain

    def rms(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes 1"]:
        """What the norm divides these states by, in float32."""
        return rms(x, self.eps)

    def _probed(self) -> Tensor:
        # The norm of a vector of ones is 1 / sqrt(1 + eps) times its gain.
        return output_for(self.envoy, self._embed, torch.ones, self._width)[0] * (1 + self.eps) ** 0.5


@torch.no_grad()
def fold(norm: nn.Module, unembed: nn.Module) -> None:
    """Multiply a norm's gain into a copy of the unembedding, and leave a gain of one in its place.

    The logits stay the same: W_U (x / r * g) = (W_U g) (x / r).
    """
    weight, w_u = gain(norm), unembed.get_parameter("weight")
    unembed.weight = nn.Parameter(w_u * weight)
    norm.weight = nn.Parameter(torch.ones_like(weight))
