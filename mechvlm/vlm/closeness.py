"""How close two tensors are that should be the same."""

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1, torch.float64: 1e-6}
"""Largest difference allowed in a check, relative to the largest entry.

Far above rounding, far below the effect of a wrong part.
"""


def difference_of(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest entry.

    NaN where an entry is not finite, infinity for other shapes.
    """
    if a.shape != b.shape:
        return float("inf")
    b = b.to(a.device).float()
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("nan")
    return float((a.float() - b).abs().max() / b.abs().max().clamp(min=1e-6))


def describe(difference: float) -> str:
    """How far a claim is from holding, for a message."""
    return "other shapes" if difference == float("inf") else f"off by {difference:.2g} of the largest entry"
