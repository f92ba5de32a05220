"""Which examples an index means: a number, a slice, several numbers, or a mask."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from mechvlm.errors import InputError


def row_numbers(index: Any, n_examples: int) -> list[int]:
    """The numbers of the examples that an index means, 0 to n_examples - 1, in the index's order.

    >>> row_numbers([True, False, True], 3), row_numbers(-1, 3), row_numbers(slice(1, None), 3)
    ([0, 2], [2], [1, 2])

    Raises:
        IndexError: for an example that does not exist, or a mask of another length.
        InputError: for no example at all, or an index of another type.
    """
    held = f"these inputs hold 0 to {n_examples - 1}"
    if isinstance(index, slice):
        numbers = list(range(*index.indices(n_examples)))
    else:
        values = _listed(index)
        if values and all(isinstance(value, bool) for value in values):
            if len(values) != n_examples:
                raise IndexError(f"A mask of {len(values)} examples was given; {held}: give one bool for each.")
            numbers = [number for number, chosen in enumerate(values) if chosen]
        elif not all(isinstance(value, Integral) and not isinstance(value, bool) for value in values):
            raise InputError(f"Examples are chosen by number, slice, list of numbers or mask, not by {index!r}.")
        else:
            missing = [int(value) for value in values if not -n_examples <= value < n_examples]
            if missing:
                named = f"Example {missing[0]} was" if len(missing) == 1 else f"Examples {missing} were"
                raise IndexError(f"{named} asked for; {held}.")
            numbers = [int(value) % n_examples for value in values]
    if not numbers:
        raise InputError(f"The selection {index!r} holds no example; {held}.")
    return numbers


def _listed(index: Any) -> list:
    """The entries of an index that is no slice."""
    if not isinstance(index, Sequence | Integral):
        try:
            index = torch.as_tensor(index).tolist()  # a tensor, or an array of NumPy
        except (TypeError, ValueError, RuntimeError):
            index = [index]
    return list(index) if isinstance(index, Sequence) and not isinstance(index, str) else [index]
