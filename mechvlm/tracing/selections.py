"""Selections of an intervention as plain numbers: layers, sites, positions and heads."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mechvlm.inputs.numbers import shortened, whole_numbers
from mechvlm.vlm.vlm import VLM

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
"""The activations of a layer that can be changed, in the order of its forward.

z is [batch pos head d_head], the others are [batch pos d_model].
"""
SITES_AFTER_ATTENTION = ("resid_post", "z", "attn_out", "resid_mid", "mlp_out")
"""Those whose change leaves the layer's own attention as it is."""


Selection = Any
"""Positions or heads: for every example an int, or a sequence or tensor of ints; or a list with one
of these, or None, per example."""


Layers = Any
"""One layer (an int), or several: a sequence, a tensor or another iterable of ints."""


def site(vlm: VLM, at: str):
    """The accessor of a site by its name."""
    if at not in SITES:
        raise ValueError(f"There is no site {at!r} to change. Sites: {', '.join(SITES)}.")
    return getattr(vlm, at)


def layer_numbers(vlm: VLM, layers: Layers, what: str) -> list[int]:
    """Layers as numbers 0 to n_layers - 1, each once, in the order of the forward."""
    numbers = whole_numbers(layers, f"{what}: layers")
    if not numbers:
        raise ValueError(f"{what}: no layer was given; the decoder has 0 to {vlm.n_layers - 1}.")
    bad = [layer for layer in numbers if not -vlm.n_layers <= layer < vlm.n_layers]
    if bad:
        raise IndexError(f"{what}: layers {bad} were asked for; the decoder has 0 to {vlm.n_layers - 1}.")
    return sorted({layer % vlm.n_layers for layer in numbers})


def rows_of(selection: Selection, batch: int, n: int, what: str) -> list[list[int]]:
    """A selection as numbers 0 to n - 1, one list per example of the batch."""
    if isinstance(selection, list | tuple) and any(_is_several(entry) for entry in selection):
        if len(selection) != batch:
            raise ValueError(
                f"{what}: {len(selection)} selections were given for a batch of {batch}: give one per example."
            )
        rows = [[] if entry is None else _numbers(entry, n, what) for entry in selection]
    elif isinstance(selection, Tensor) and selection.ndim == 2:
        return rows_of(list(selection), batch, n, what)
    elif isinstance(selection, list | tuple) and len(selection) == batch > 1 and what != "heads":
        raise ValueError(
            f"{what}={list(selection)} for a batch of {batch} could be these positions in every example, or one in "
            f"each. Write torch.tensor({[int(i) for i in selection]}) for the first, and "
            f"{[[int(i)] for i in selection]} for the second."
        )
    else:
        rows = [_numbers(selection, n, what)] * batch
    if not any(rows):
        raise ValueError(f"{what} is empty: select at least one.")
    return rows


def _is_several(entry) -> bool:
    return entry is None or (isinstance(entry, Iterable) and getattr(entry, "ndim", 1) > 0)


def _numbers(selection, n: int, what: str) -> list[int]:
    """One example's selection as numbers 0 to n - 1, each once, in its order."""
    if isinstance(selection, str):
        raise ValueError(f"{what}={selection!r}: give numbers, such as inputs.tokens.select({selection!r}).")
    numbers = whole_numbers(selection, what)
    bad = [i for i in numbers if not -n <= i < n]
    if bad:
        raise IndexError(f"{what}: {shortened(bad)} was asked for; there are 0 to {n - 1}.")
    return list(dict.fromkeys(i % n for i in numbers))


def heads_of(heads, at: str, old: Tensor, rows: list[list[int]], what: str) -> list[Tensor]:
    """Per example a mask of the states to change: everything, or at z the given heads, [head 1]."""
    if heads is None:
        return [torch.ones((), dtype=torch.bool, device=old.device)] * len(old)
    if at != "z":
        raise ValueError(f"heads={heads!r} were given at {at!r}: only at='z' are there heads.")
    chosen = rows_of(heads, len(old), old.shape[2], "heads")
    if not any(positions and numbers for positions, numbers in zip(rows, chosen, strict=True)):
        raise ValueError(f"{what}: no example has both a position and a head.")
    masks = torch.zeros(len(old), old.shape[2], 1, dtype=torch.bool, device=old.device)
    for row, numbers in enumerate(chosen):
        masks[row, numbers] = True
    return list(masks)
