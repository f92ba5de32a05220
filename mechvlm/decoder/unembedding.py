"""From normed states to logits: the unembedding, and what a family does to its output.

Logits are c tanh(s u / c) of the unembedding's output u, with a factor s (Granite, Cohere) and a
cap c (Gemma 2), where a family has them.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.decoder.projections import Projection


def n_logits(unembed: Any) -> int:
    """How many logits an unembedding gives. Idefics' does not count its added tokens."""
    return unembed.out_features + getattr(unembed, "out_additional_features", 0)


class Unembedding(Projection):
    """The unembedding inside a trace: callable on normed states, gives logits.

    Its `weight` and `bias` are the module's own: those of the output before factor and cap.

    Args:
        envoy, embed, width: see `Projection`.
        scale: factor on the module's output.
        cap: bound of the logits, or None.
    """

    def __init__(self, envoy: Any, embed: Any, width: int, scale: float = 1.0, cap: float | None = None):
        Projection.__init__(self, envoy, embed, width)
        self.scale, self.cap = scale, cap

    def __call__(self, x: Tensor) -> Tensor:
        return self.logits_of(Projection.__call__(self, x))

    def in_float32(self, x: Float[Tensor, "*axes in"]) -> Float[Tensor, "*axes out"]:
        """The logits of few states, computed in float32 whatever the weights are in."""
        return self.logits_of(Projection.in_float32(self, x))

    def logits_of(self, out: Tensor) -> Tensor:
        """The logits for an output of the module."""
        out = out if self.scale == 1 else out * self.scale
        return out if self.cap is None else torch.tanh(out / self.cap) * self.cap

    def uncapped(self, x: Tensor) -> Tensor:
        """The logits for normed states before the cap: linear in the states."""
        return Projection.__call__(self, x) * self.scale

    def output_for(self, logits: Tensor) -> Tensor:
        """The output of the module that gives these logits.

        Raises:
            ValueError: for a logit that the cap lets no output have.
        """
        if self.cap is not None:
            if not (logits.abs() < self.cap).all():
                raise ValueError(
                    f"Logits of up to {float(logits.abs().max()):.3g} were assigned; this model caps them below {self.cap:g}."
                )
            logits = torch.atanh(logits / self.cap) * self.cap
        return logits if self.scale == 1 else logits / self.scale
