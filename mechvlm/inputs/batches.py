"""Several batches: each is prepared when it is reached, so that memory stays flat.

`vlm.inputs(images, prompts, batch_size=8)` gives `Batches`. Everything that reads a model takes one
batch, a list of batches, or `Batches`; `as_batches` makes one of the three.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.inputs.batch import Inputs

Answers = str | int | Sequence[str | int] | Tensor | None
"""A word or a token id for all examples, or one per example; None for the model's own answer."""


@dataclass(frozen=True)
class Pending:
    """A batch that is not prepared yet: its images are still to be opened.

    Attributes:
        pairs: (images, prompt) of each example.
        ids: the examples' names, or None.
        first: the number of the first example among those of all batches.
        build: makes the batch, as `mechvlm.inputs.build.build_inputs` does.
    """

    pairs: list[tuple]
    ids: tuple[str, ...] | None
    first: int
    build: Callable[..., Inputs]

    def __len__(self) -> int:
        return len(self.pairs)

    def prepare(self) -> Inputs:
        """Open the images and run the processor."""
        groups, prompts = zip(*self.pairs, strict=True)
        # Without groups the images stand in the conversations.
        images = None if groups[0] is None else [list(group) for group in groups]
        return self.build(images, list(prompts), ids=self.ids, first=self.first)


class Batches:
    """Batches of examples, in order; each is prepared when it is reached, and not kept.

    Numbers, slices and loops work as on a list.

    >>> batches = vlm.inputs(paths, "What is it?", batch_size=8, ids=names)
    >>> len(batches), batches.n_examples, batches[0].token_maps[3].last
    >>> lens, norms = mv.read(vlm, batches, mv.LogitLens(), mv.NormAttention())    # joined

    Attributes:
        sizes: how many examples each batch holds.
        ids: the examples' names over all batches, or None.

    Raises:
        InputError: for no batch, or where some batches have ids and others have none.
    """

    def __init__(self, parts: Sequence[Inputs | Pending]):
        if not parts:
            raise InputError("There is no batch: give at least one.")
        without = [number for number, part in enumerate(parts) if part.ids is None]
        if 0 < len(without) < len(parts):
            raise InputError(
                f"Batches {without} have no ids and the others do: give ids for all examples, or for none."
            )
        self._parts = tuple(parts)
        self.sizes = tuple(len(part) for part in parts)
        self.ids: tuple[str, ...] | None = None if without else sum((part.ids or () for part in parts), ())

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Inputs]:
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        return f"Batches({self.n_examples} examples in batches of {', '.join(map(str, sorted(set(self.sizes))))})"

    @property
    def n_examples(self) -> int:
        """How many examples the batches hold together."""
        return sum(self.sizes)

    @overload
    def __getitem__(self, number: int) -> Inputs: ...

    @overload
    def __getitem__(self, number: slice) -> "Batches": ...

    def __getitem__(self, number):
        """One batch, prepared now; or several of them, for a slice.

        Raises:
            IndexError: for a batch that does not exist.
            InputError: for an image or prompt of it that cannot be used, or a slice of no batch.
        """
        if isinstance(number, slice):
            return Batches(self._parts[number])
        if not -len(self) <= number < len(self):
            raise IndexError(f"Batch {number} was asked for; there are 0 to {len(self) - 1}.")
        part = self._parts[number]
        return part.prepare() if isinstance(part, Pending) else part


def build_batches(pairs: Sequence[tuple], batch_size: int, ids: tuple[str, ...] | None, build: Callable) -> Batches:
    """Pairs of (images, prompt) as batches of `batch_size` examples; the last one may be smaller.

    Raises:
        InputError: for a batch_size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} was asked for; a batch holds at least 1 example.")
    starts = range(0, len(pairs), batch_size)
    chosen = [slice(start, start + batch_size) for start in starts]
    return Batches([Pending(list(pairs[s]), ids and ids[s], s.start, build) for s in chosen])


def as_batches(inputs: Any) -> Batches:
    """One batch or several, as `Batches`.

    Raises:
        InputError: for anything else, or an empty list.
    """
    if isinstance(inputs, Batches):
        return inputs
    batches = [inputs] if isinstance(inputs, Inputs) or not isinstance(inputs, Sequence) else list(inputs)
    wrong_types = sorted({type(batch).__name__ for batch in batches if not isinstance(batch, Inputs)})
    if wrong_types or not batches:
        raise InputError(
            "Give a batch that vlm.inputs(images, prompts) returns, or a list of such batches, not "
            f"{', '.join(wrong_types) or 'an empty list'}."
        )
    return Batches(batches)


def by_batch(batches: Batches, answers: Answers) -> list[Any]:
    """The answers of each batch.

    Args:
        batches: the batches.
        answers: one answer for all examples, None, or one answer for each example of all batches,
            in order.

    Raises:
        InputError: when the number of answers is not that of the examples.
    """
    parts, start = [], 0
    for size in batches.sizes:
        parts.append(answers_of(answers, range(start, start + size), batches.n_examples))
        start += size
    return parts


def answers_of(answers: Answers, numbers: range, n_examples: int) -> Any:
    """The answers of the examples `numbers`, out of those of all `n_examples`; see `by_batch`."""
    answers = answers.tolist() if isinstance(answers, Tensor) else answers
    if answers is None or isinstance(answers, str | int):
        return answers
    if len(answers) != n_examples:
        raise InputError(
            f"{len(answers)} answers were given for {n_examples} examples: give one for all, or one each, over all batches "
            "in order."
        )
    return list(answers)[numbers.start : numbers.stop]
