"""Batches that do not fit into memory are halved, until their parts fit."""

import warnings
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch

from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import Batches
from mechvlm.progress import track
from mechvlm.vlm.vlm import VLM

T = TypeVar("T")


class Failed(NamedTuple):
    """Work that could not be done.

    reason: the error's text.
    memory: whether it lacked memory.
    """

    reason: str
    memory: bool


def in_halves(
    part: range, work: Callable[[range], T], refused: tuple[type[Exception], ...] = ()
) -> Iterator[tuple[range, T | Failed]]:
    """work(part), and where that fails, of each half by itself, down to single items.

    Work fails for lack of memory, or with an error of the types `refused`. Gives every part that
    was tried, in order, with its result or a `Failed`.
    """
    outcome = _attempt(work, part, refused)
    yield part, outcome
    if isinstance(outcome, Failed) and len(part) > 1:
        half = len(part) // 2
        yield from in_halves(part[:half], work, refused)
        yield from in_halves(part[half:], work, refused)


def _attempt(work: Callable[[range], T], part: range, refused: tuple[type[Exception], ...]) -> T | Failed:
    try:
        return work(part)
    except refused as error:
        failed = Failed(str(error), memory=False)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failed = Failed(first_line(error), memory=True)
    # Outside of the except block, since an error's traceback holds the failed forward's tensors.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return failed


def over_batches(vlm: VLM, batches: Batches, work: Callable[[Inputs, range], T], label: str) -> list[T]:
    """work(part, numbers) of all batches in order, one at a time, under one progress bar.

    A batch that does not fit into memory is halved, and those after it come in parts of the size
    that fitted; a warning says so. A part keeps its batch's padding, so positions stay the same.

    Args:
        vlm: the model.
        batches: the batches.
        work: gets a batch or a part of one, and the numbers of its examples among all.
        label: of the progress bar.

    Raises:
        torch.OutOfMemoryError: for an example that does not fit even alone.
    """
    results: list[T] = []
    size: int | None = None
    largest = 0

    def read_one(number: int, first: int) -> None:
        """All parts of one batch. It is freed on return, before the next one is prepared."""
        nonlocal size, largest
        batch = batches[number]

        def run(part: range) -> T:
            whole = len(part) == len(batch)
            return work(batch if whole else batch.take(part, trim=False), range(first + part.start, first + part.stop))

        step = size or len(batch)
        for start in range(0, len(batch), step):
            for part, outcome in in_halves(range(start, min(start + step, len(batch))), run):
                if not isinstance(outcome, Failed):
                    results.append(outcome)
                elif len(part) == 1:
                    raise torch.OutOfMemoryError(_advice(vlm, first + part.start, outcome.reason))
                else:
                    size, largest = -(-len(part) // 2), max(largest, len(part))

    for number, first in enumerate(track(list(accumulate(batches.sizes, initial=0))[:-1], label)):
        read_one(number, first)
    if size is not None:
        warnings.warn(
            f"{largest} examples at once did not fit into the memory of {_place(vlm)}: they were read {size} at a time. "
            f"vlm.inputs(images, prompts, batch_size={size}) spares the tries.",
            stacklevel=3,
        )
    return results


def _advice(vlm: VLM, number: int, reason: str) -> str:
    return (
        f"Example {number} does not fit into the memory of {_place(vlm)}, even alone ({reason}). Free memory that other "
        "programs or results hold, read fewer positions or destinations, or load the model with dtype='bfloat16' or "
        "device_map='auto'."
    )


def _place(vlm: VLM) -> str:
    return str(vlm.device) if vlm.has_weights else "the server"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means too little memory. PyTorch's wording differs between devices."""
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "not enough memory", "defaultcpuallocator", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in text for word in words)


def first_line(error: BaseException) -> str:
    """An error's first line; its type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
