"""Batches that do not fit into memory, or hold an example that cannot be read, are halved."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mechvlm.datasets import Example, Pair
from mechvlm.errors import InputError, NonFiniteError
from mechvlm.ndif.connection import retrying
from mechvlm.tracing.memory import Failed, in_halves
from mechvlm.vlm.vlm import VLM


def read_or_halve(
    vlm: VLM,
    items: Sequence[Example] | Sequence[Pair],
    batch: range,
    read_part: Callable[[range], Any],
    set_aside: list[dict],
    halved: list[dict],
) -> Iterator[tuple[range, Any]]:
    """Read the items at the indices `batch` in one forward; where that fails, each half by itself.

    Gives (indices, what `read_part` gave) for each part that could be read. Halving ends at single
    items: one that cannot be read alone is appended to `set_aside`, with its reason. Batches that
    were halved for lack of memory are appended to `halved`.
    """
    kind = "pair" if isinstance(items[batch[0]], Pair) else "example"

    for part, outcome in in_halves(
        batch, lambda part: retrying(lambda: read_part(part)), refused=(InputError, NonFiniteError)
    ):
        name = items[part[0]].id
        if not isinstance(outcome, Failed):
            yield part, outcome
        elif len(part) == 1:
            alone = f"it does not fit into the memory of {vlm.device}, even alone ({outcome.reason})"
            set_aside.append({kind: name, "reason": alone if outcome.memory else outcome.reason})
        elif outcome.memory:
            halved.append({"first": name, f"{kind}s": len(part)})
