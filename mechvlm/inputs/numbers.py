"""Whole numbers out of every form in which a user gives them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def whole_numbers(value: Any, what: str) -> list[int]:
    """A whole number, or several, as a list.

    Args:
        value: an int, or a list, range, array, tensor or another iterable of ints.
        what: what the numbers are, for the message.

    Raises:
        ValueError: for anything else, such as a mask.
    """
    is_iterable = isinstance(value, Iterable) and not isinstance(value, Tensor | str)
    try:
        numbers = torch.as_tensor(list(value) if is_iterable else value)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"{what} takes whole numbers, not {value!r}.") from None
    if numbers.numel() and (numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.ndim > 1):
        raise ValueError(
            f"{what} takes whole numbers, not {numbers.dtype} {list(numbers.shape)}; for a mask, give "
            "mask.nonzero()[:, 0]."
        )
    return [int(i) for i in numbers.reshape(-1)]


def state_numbers(states: Any, n_layers: int, what: str) -> list[int]:
    """States as numbers 0 to n_layers, each once and in order; negative ones count from the end.

    Raises:
        ValueError: for none, or a state that is not there.
    """
    numbers = whole_numbers(states, f"{what}: states")
    if not numbers:
        raise ValueError(f"{what}: no state was given; there are 0 (embeddings) to {n_layers}.")
    bad = [state for state in numbers if not -n_layers - 1 <= state <= n_layers]
    if bad:
        raise ValueError(f"{what}: states {shortened(bad)} were asked for; there are 0 (embeddings) to {n_layers}.")
    return sorted({state % (n_layers + 1) for state in numbers})


def shortened(items: list) -> str:
    """A list for a message; of nine items or more the first four, the last and the count."""
    if len(items) < 9:
        return str(items)
    return f"[{', '.join(repr(i) for i in items[:4])}, ... {items[-1]!r}] ({len(items)})"
