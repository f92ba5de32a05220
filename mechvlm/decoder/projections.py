"""Linear modules inside a trace: callable, with their weight and bias even in a sandbox.

NDIF runs the blocks of users whom it does not trust in a sandbox, a process without weights. A
module can still be called there, and its outputs for the unit vectors are its weight, exactly.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechvlm.decoder.weights import has_weights, weight_and_bias

ROWS_CAST_AT_ONCE = 4096
"""Rows of a weight that are held in float32 at once: 64 MB at a width of 4096."""


class Projection:
    """A linear module inside a trace.

    Args:
        envoy: nnsight's envoy of the module.
        embed: nnsight's envoy of the token embedding, whose output shows dtype and device.
        width: width of the module's input.
    """

    def __init__(self, envoy: Any, embed: Any, width: int):
        self.envoy, self._embed, self._width = envoy, embed, width
        self._parts: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.envoy(x)

    def in_float32(self, x: Float[Tensor, "*axes in"]) -> Float[Tensor, "*axes out"]:
        """The module's output for few states, computed in float32 whatever its weights are in.

        The weight is cast some rows at a time, so that no second copy of it exists.
        """
        if self.weight.dtype == torch.float32:
            return self.envoy(x.float())
        out = torch.cat([x.float() @ rows.float().T for rows in self.weight.split(ROWS_CAST_AT_ONCE)], dim=-1)
        return out if self.bias is None else out + self.bias.float()

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight that the module computes with, adapters included and dequantized.

        In a sandbox it is computed from the module's outputs for the unit vectors.
        """
        return self._read()[0]

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        """The module's bias, or None; in a sandbox its output for the zero vector."""
        return self._read()[1]

    def _read(self) -> tuple[Tensor, Tensor | None]:
        if self._parts is None:
            self._parts = weight_and_bias(self.envoy) if has_weights(self.envoy) else self._probed()
        return self._parts

    def _probed(self) -> tuple[Tensor, Tensor]:
        units, zeros = (output_for(self.envoy, self._embed, make, self._width) for make in (torch.eye, torch.zeros))
        return (units - zeros).T, zeros[0]


def in_columns(x: Tensor, columns: tuple[int, int] | None, n_heads: int | None, d_head: int) -> Tensor:
    """Heads [*axes head d_head] out of the columns of a projection's output, as a view.

    columns: (start, step): head h lies in the columns from start + h * step on. None: the heads are
        all columns, side by side.

    >>> in_columns(torch.arange(6), (2, 2), 2, 1)  # of [q q k k v v] the second and the third head
    tensor([[2],
            [4]])
    """
    if columns is None or n_heads is None:
        return rearrange(x, "... (head d_head) -> ... head d_head", d_head=d_head)
    start, step = columns
    return x[..., start:].unfold(-1, d_head, step)[..., :n_heads, :]


def write_columns(x: Tensor, columns: tuple[int, int], heads: Tensor) -> Tensor:
    """A copy of a projection's output with heads [*axes head d_head] put into its columns."""
    new = x.clone()
    in_columns(new, columns, heads.shape[-2], heads.shape[-1])[:] = heads.to(new.dtype)
    return new


def output_for(envoy: Any, embed: Any, make: Callable[..., Tensor], width: int) -> Tensor:
    """The module's output for the tensor `make(width, width)`, in the model's dtype."""
    like = embed(torch.zeros(1, dtype=torch.long))
    return envoy(make(width, width, device=like.device, dtype=like.dtype))


def out_heads(weight: Float[Tensor, "d_model heads_d_head"], d_head: int) -> Float[Tensor, "head d_head d_model"]:
    """The output projection's weight by head, in TransformerLens' layout."""
    return rearrange(weight, "d_model (head d_head) -> head d_head d_model", d_head=d_head)
