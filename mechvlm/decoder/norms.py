"""The final norm: (x - its mean or 0) / r * g + b, with r = sqrt(mean of squares + eps).

RMSNorm, with a gain of `weight` or of `1 + weight`, and LayerNorm are all of this form. What a norm
is shows when it is called, so nothing about its class needs to be known:

1. b is its output for zeros.
2. g is what it makes of 1, -1, 1, -1, ..., whose mean is 0 and whose r is sqrt(1 + eps).
3. It centres if a number added to every entry changes nothing.

All code that needs the divisor r or the gain g gets them from this file.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechvlm.decoder.projections import output_for
from mechvlm.decoder.weights import has_weights


def rms(x: Float[Tensor, "*axes d_model"], eps: float, centres: bool = False) -> Float[Tensor, "*axes 1"]:
    """The divisor r of a norm, in float32: TransformerLens' hook_scale."""
    x = x.float()
    if centres:
        x = x - x.mean(-1, keepdim=True)
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


class Norm:
    """A norm inside a trace: callable, with its gain even in a sandbox.

    Args:
        envoy: nnsight's envoy of the norm, or the module.
        embed: nnsight's envoy of the token embedding, whose output shows dtype and device.
        width: width of the states.
        eps: epsilon of the norm.
    """

    def __init__(self, envoy: Any, embed: Any, width: int, eps: float):
        self.envoy, self.eps, self._embed, self._width = envoy, eps, embed, width
        self._parts: tuple[Tensor, Tensor, Tensor] | None = None
        self._centres: bool | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.envoy(x)

    def in_float32(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """The normed states, computed in float32 whatever the norm's weight is in."""
        return self.centred(x) / self.rms(x) * self.gain.float() + self.bias.float()

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        """The gain g."""
        return self._read()[0]

    @property
    def bias(self) -> Float[Tensor, " d_model"]:
        """The bias b, zeros for an RMSNorm."""
        return self._read()[1]

    @property
    def centres(self) -> bool:
        """Whether the mean of a state is subtracted from it first, as a LayerNorm does."""
        if self._centres is None:
            self._centres = bool(self._read()[2])
        return self._centres

    def rms(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes 1"]:
        """The divisor r of these states, in float32."""
        return rms(x, self.eps, self.centres)

    def centred(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """The states in float32, less their mean if the norm subtracts it."""
        return x.float() - x.float().mean(-1, keepdim=True) if self.centres else x.float()

    def _read(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._parts is None:
            with torch.no_grad():
                self._parts = parts_of(self.envoy, self._width, self.eps, self._embed)
        return self._parts


def parts_of(norm: Any, width: int, eps: float, embed: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """(g, b, whether it centres) of a norm, by calling it; nothing waits for a GPU.

    Where its weights are here, a copy of the norm in float32 is called, so that nothing is rounded.
    """

    def probes(_, size: int, device: Any, dtype: Any) -> Tensor:
        signs = torch.ones(size, device=device, dtype=dtype)
        signs[1::2] = -1
        return torch.stack([torch.zeros_like(signs), signs, signs + 1])

    if has_weights(norm):
        exact = _in_float32(getattr(norm, "_module", norm))
        given = probes(None, width, next(exact.parameters()).device, torch.float32)
        out = exact(given)
    else:
        out = output_for(norm, embed, probes, width)
        given = probes(None, width, out.device, torch.float32)
    zero, signs, shifted = out
    gain = (signs - zero) * given[1].to(signs) * (1 + eps) ** 0.5
    # 2, 0, 2, 0, ... is 1, -1, 1, -1, ... once its mean is gone.
    centres = (shifted - signs).abs().max() < 1e-2 * signs.abs().max().clamp(min=1e-6)
    return gain, zero, centres


def _in_float32(module: nn.Module) -> nn.Module:
    """A copy of a small module with its weights in float32, and without hooks.

    A hook that runs on the copy would tell nnsight that the module itself had run.
    """
    twin = copy.copy(module)
    state = {name: value.copy() if isinstance(value, dict) else value for name, value in twin.__dict__.items()}
    state.pop("forward", None)
    for name in [name for name in state if name.endswith("hooks")]:
        state[name] = type(state[name])()
    for kind in ("_parameters", "_buffers"):
        state[kind] = {
            name: t.detach().float() if t is not None and t.is_floating_point() else t
            for name, t in state[kind].items()
        }
    state["_modules"] = {name: None if m is None else _in_float32(m) for name, m in state["_modules"].items()}
    twin.__dict__ = state
    return twin


@torch.no_grad()
def fold(norm: nn.Module, unembed: nn.Module, eps: float) -> None:
    """Multiply an RMSNorm's gain into a copy of the unembedding's weight, and set the gain to one.

    The logits stay the same: W_U (x / r * g) = (W_U g) (x / r).
    """
    w_u = unembed.get_parameter("weight")
    gain, _, _ = parts_of(norm, w_u.shape[1], eps)
    unembed.weight = nn.Parameter(w_u * gain.to(w_u))
    weight = norm.get_parameter("weight")
    # Some norms multiply with 1 + weight.
    own = float((gain.float() - weight.float()).abs().max()) < 0.5
    norm.weight = nn.Parameter(torch.ones_like(weight) if own else torch.zeros_like(weight))
