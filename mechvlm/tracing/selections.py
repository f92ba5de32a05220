"""What an intervention was asked for, made plain: layers, sites, positions and heads by number."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mechvlm.vlm.vlm import VLM

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
"""What of a layer can be changed, in the order of its forward (z is [batch pos head d_head])."""


Selection = Any
"""An int, a sequence or tensor of ints; or per example a list with one sequence or tensor of them, or None, for each."""


Layers = Any
"""An int, or several: a sequence or tensor of ints, or anything else that gives them one by one."""


def _site(vlm: VLM, at: str):
    if at not in SITES:
        raise ValueError(f"There is no site {at!r} to change. Sites: {', '.join(SITES)}.")
    return getattr(vlm, at)


def _layers(vlm: VLM, layers: Layers, what: str) -> list[int]:
    """In the order of the forward, each once."""
    asked = _whole(layers, f"{what}: layers")
    if not asked:
        raise ValueError(f"{what}: no layer was given; the decoder has 0 to {vlm.n_layers - 1}.")
    bad = [layer for layer in asked if not -vlm.n_layers <= layer < vlm.n_layers]
    if bad:
        raise IndexError(f"{what}: layers {bad} were asked for; the decoder has 0 to {vlm.n_layers - 1}.")
    return sorted({layer % vlm.n_layers for layer in asked})


def _rows(asked: Selection, batch: int, n: int, what: str) -> list[list[int]]:
    """A selection as numbers 0 to n - 1, per example of the batch."""
    if isinstance(asked, list | tuple) and any(_is_several(entry) for entry in asked):
        if len(asked) != batch:
            raise ValueError(
                f"{what}: {len(asked)} selections were given for a batch of {batch}: give one per example."
            )
        rows = [[] if entry is None else _numbers(entry, n, what) for entry in asked]
    elif isinstance(asked, Tensor) and asked.ndim == 2:
        return _rows(list(asked), batch, n, what)
    elif isinstance(asked, list | tuple) and len(asked) == batch > 1 and what != "heads":
        raise ValueError(
            f"{what}={list(asked)} for a batch of {batch} could be these positions in every example, or one in each. Write "
            f"torch.tensor({[int(i) for i in asked]}) for the first, and {[[int(i)] for i in asked]} for the second."
        )
    else:
        rows = [_numbers(asked, n, what)] * batch
    if not any(rows):
        raise ValueError(f"{what} is empty: select at least one.")
    return rows


def _is_several(entry) -> bool:
    return entry is None or (isinstance(entry, Iterable) and getattr(entry, "ndim", 1) > 0)


def _numbers(asked, n: int, what: str) -> list[int]:
    if isinstance(asked, str):
        raise ValueError(f"{what}={asked!r}: give numbers, such as inputs.tokens.select({asked!r}).")
    numbers = _whole(asked, what)
    bad = [i for i in numbers if not -n <= i < n]
    if bad:
        raise IndexError(f"{what}: {_short(bad)} was asked for; there are 0 to {n - 1}.")
    return list(dict.fromkeys(i % n for i in numbers))


def _whole(asked, what: str) -> list[int]:
    """One or several whole numbers as a list."""
    several = isinstance(asked, Iterable) and not isinstance(asked, Tensor | str)
    try:
        found = torch.as_tensor(list(asked) if several else asked)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"{what} takes whole numbers, not {asked!r}.") from None
    if found.numel() and (found.dtype == torch.bool or found.is_floating_point() or found.ndim > 1):
        raise ValueError(
            f"{what} takes whole numbers, not {found.dtype} {list(found.shape)}; of a mask, give mask.nonzero()[:, 0]."
        )
    return [int(i) for i in found.reshape(-1)]


def _heads(heads, at: str, old: Tensor, rows: list[list[int]], what: str) -> list[Tensor]:
    """Per example, what of its states changes: all of them, or at z the heads asked for [head 1]."""
    if heads is None:
        return [torch.ones((), dtype=torch.bool, device=old.device)] * len(old)
    if at != "z":
        raise ValueError(f"heads={heads!r} were given at {at!r}: only at='z' are there heads.")
    chosen = _rows(heads, len(old), old.shape[2], "heads")
    if not any(positions and some for positions, some in zip(rows, chosen, strict=True)):
        raise ValueError(f"{what}: no example has both a position and a head.")
    found = torch.zeros(len(old), old.shape[2], 1, dtype=torch.bool, device=old.device)
    for row, some in enumerate(chosen):
        found[row, some] = True
    return list(found)


def _short(items: list) -> str:
    return (
        str(items) if len(items) < 9 else f"[{', '.join(repr(i) for i in items[:4])}, ... {items[-1]!r}] ({len(items)})"
    )
