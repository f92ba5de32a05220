"""Batches that do not fit into memory, or hold an example that cannot be read, are halved."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mechvlm.datasets import Example, Pair
from mechvlm.errors import InputError, NonFiniteError
from mechvlm.ndif.connection import retrying
from mechvlm.vlm.vlm import VLM


def read_or_halve(
    vlm: VLM,
    items: Sequence[Example] | Sequence[Pair],
    batch: range,
    read_batch: Callable[[list], Any],
    set_aside: list[dict],
    halved: list[dict],
) -> Iterator[tuple[range, Any]]:
    """Read the items at the indices `batch` in one forward; where that fails, each half by itself.

    Gives (indices, what `read_batch` gave) for each part that could be read. Halving ends at single
    items: one that cannot be read alone is appended to `set_aside`, with its reason. Batches that
    were halved for lack of memory are appended to `halved`.
    """
    members = [items[index] for index in batch]
    kind = "pair" if isinstance(members[0], Pair) else "example"
    try:
        results = retrying(lambda: read_batch(members))
    except (InputError, NonFiniteError) as error:
        reason = str(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = f"it does not fit into the memory of {vlm.device}, even alone ({first_line(error)})"
        if len(batch) > 1:
            halved.append({"first": members[0].id, f"{kind}s": len(batch)})
    else:
        yield batch, results
        return
    # Outside of the except block, since an error's traceback holds the failed forward's tensors.
    if vlm.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(batch) == 1:
        set_aside.append({kind: members[0].id, "reason": reason})
        return
    half = len(batch) // 2
    yield from read_or_halve(vlm, items, batch[:half], read_batch, set_aside, halved)
    yield from read_or_halve(vlm, items, batch[half:], read_batch, set_aside, halved)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means too little memory. PyTorch's wording differs between devices."""
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
        or "alloc_failed" in text
    )


def first_line(error: BaseException) -> str:
    """An error's first line; its type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
