"""A module's weight, wherever the trace's block runs.

A server runs the blocks of users whom it does not trust in a process that holds no weights: there every module is on the
meta device, and can only be called. What it is called with gives its weight back, exactly.
"""

import torch
from torch import Tensor


def weight_of(module, embed) -> Tensor:
    """The weight of a linear module [out in], an embedding or an RMSNorm, given as nnsight's envoy.

    `embed` is the token embedding, whose output shows the dtype in which the model computes.
    """
    own = module.weight
    if own.device.type != "meta":
        return own
    if module.path == embed.path:
        return module(torch.arange(own.shape[0]))
    like = embed(torch.zeros(1, dtype=torch.long))
    if own.ndim == 1:  # an RMSNorm divides ones by the root of 1 + eps
        return module(torch.ones_like(own, device=like.device, dtype=like.dtype)) * (1 + module.variance_epsilon) ** 0.5
    eye = torch.eye(own.shape[1], device=like.device, dtype=like.dtype)
    return (module(eye) if module.bias is None else module(eye) - module(torch.zeros_like(eye))).T


def bias_of(module, embed) -> Tensor | None:
    """The bias of a linear module [out], or None."""
    own = module.bias
    if own is None or own.device.type != "meta":
        return own
    like = embed(torch.zeros(1, dtype=torch.long))
    return module(torch.zeros(1, module.weight.shape[1], device=like.device, dtype=like.dtype))[0]
