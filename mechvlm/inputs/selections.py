"""Selections of positions: the same forms for every option that takes them.

A selection is a name ("image", "last", ...), a word or a phrase of the text, a number (negative
from the end), or several of these: a list, a range, an array, a tensor. It holds for every example.
A list with one list (or array) per example gives each example its own: `[["red"], ["blue"]]`.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.numbers import whole_numbers
from mechvlm.inputs.tokens import POSITION_NAMES


def positions_of(selection: Any, inputs: Inputs, what: str) -> list[Int[Tensor, " n"]]:
    """The selected positions of each example, each once, in the selection's order.

    Raises:
        ValueError: as `parts_of`.
    """
    by_example = []
    for parts in parts_of(selection, inputs, what):
        numbers = torch.cat([positions for _, positions in parts]).tolist()
        by_example.append(torch.tensor(list(dict.fromkeys(numbers))))
    return by_example


def parts_of(selection: Any, inputs: Inputs, what: str) -> list[list[tuple[str, Int[Tensor, " n"]]]]:
    """For each example, the parts of a selection: (name or number, positions).

    >>> parts_of(["last", 7], inputs, "dst")
    [[('last', tensor([12])), ('7', tensor([7]))]]

    Args:
        selection: as the module's docstring says.
        inputs: the examples.
        what: the option's name, for messages.

    Raises:
        ValueError: for an empty selection, a position, name or word that is not there, another
            number of selections than examples, and a flat list that could be meant per example.
    """
    by_example = _by_example(selection, len(inputs), what)
    return [_example_parts(own, inputs, example, what) for example, own in enumerate(by_example)]


def part_of_selection(selection: Any, numbers: range, n_examples: int, what: str) -> Any:
    """The selection for the examples `numbers` of all `n_examples`; see `parts_of`.

    >>> part_of_selection([["red"], ["blue"], ["green"]], range(1, 3), 3, "dst")
    [['blue'], ['green']]

    Raises:
        ValueError: for another number of selections than examples, and a flat list that could be
            meant per example.
    """
    own = _by_example(selection, n_examples, what)[numbers.start : numbers.stop]
    # Written per example, because a flat list as long as the part would be ambiguous there.
    return own if isinstance(selection, Sequence | Tensor) and not isinstance(selection, str) else selection


def _by_example(selection: Any, n: int, what: str) -> list[Any]:
    """The selection of each of the n examples."""
    if getattr(selection, "ndim", 1) == 2:
        selection = list(selection)
    if isinstance(selection, Sequence) and not isinstance(selection, str) and any(map(_is_several, selection)):
        if len(selection) != n:
            raise ValueError(
                f"{what}: {len(selection)} selections were given for a batch of {n}: give one per example."
            )
        return list(selection)
    if isinstance(selection, list | tuple) and len(selection) == n > 1 and not set(selection) <= set(POSITION_NAMES):
        nested = [[entry] for entry in selection]
        raise ValueError(
            f"{what}={list(selection)} for a batch of {n} could be these positions in every example, or one in each. "
            f"Write {[list(selection)] * n} for the first, and {nested} for the second."
        )
    return [selection] * n


def _example_parts(selection: Any, inputs: Inputs, example: int, what: str) -> list[tuple[str, Tensor]]:
    entries: list[Any]
    if isinstance(selection, str | Integral):
        entries = [selection]
    elif isinstance(selection, Sequence) and any(isinstance(entry, str) for entry in selection):
        entries = list(selection)
    else:
        entries = whole_numbers(selection, what)
    if not entries:
        raise ValueError(f"{what} is empty: give at least one position, such as 'last'.")
    try:
        return [(str(entry), inputs.token_maps[example].select(entry)) for entry in entries]
    except ValueError as error:
        raise ValueError(f"{what}, example {example}: {error}") from None


def _is_several(entry: Any) -> bool:
    if isinstance(entry, str):
        return False
    return isinstance(entry, Sequence) or getattr(entry, "ndim", 0) > 0
