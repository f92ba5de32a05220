"""The encodings of several examples as one batch, and some examples of a batch again.

A processor returns two kinds of keys for an example of L tokens:

- sequences, [1 L ...]: `input_ids`, `attention_mask`, `token_type_ids`. A batch has one row an
  example, padded on the left.
- parts of images, [n ...]: one row an image, a tile or a patch. A batch has the rows of all
  examples one after another. Later axes that differ, such as the number of tiles or the height, are
  filled up with zeros at their end: models tell real pixels by the sizes or masks beside them.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechvlm.families.record import Architecture


@dataclass(frozen=True)
class Parts:
    """How the examples of a batch share the tensor of one key.

    Attributes:
        shapes: the shape of each example's own tensor.
        sequence: True for one padded row an example, False for the rows of images.
    """

    shapes: tuple[tuple[int, ...], ...]
    sequence: bool


def forward_keys(record: Architecture) -> frozenset[str]:
    """The names of the arguments of the model's forward."""
    return frozenset(record.arguments) or _of_transformers(record.hf_class)


@cache
def _of_transformers(hf_class: str) -> frozenset[str]:
    import transformers  # here: a study is opened without it

    return frozenset(inspect.signature(getattr(transformers, hf_class).forward).parameters)


def kept_keys(encoding: Mapping[str, Any], record: Architecture) -> dict[str, Tensor]:
    """What the model's forward takes of an encoding, without `labels`, which are for training."""
    return {key: value for key, value in encoding.items() if key in forward_keys(record) and key != "labels"}


def is_sequence(key: str, encoding: Mapping[str, Tensor], processor, right_padded: Sequence[str]) -> bool:
    """Whether a key of one example's encoding has an entry a token.

    The image processor's own keys have none, whatever their shape is.
    """
    if key in right_padded:
        return True
    if key in processor.image_processor.model_input_names:
        return False
    return encoding[key].shape[:2] == encoding["input_ids"].shape


def collate(
    encodings: Sequence[Mapping[str, Tensor]], sequences: Collection[str], right_padded: Collection[str], fill: Mapping
) -> tuple[dict[str, Tensor], dict[str, Parts]]:
    """The encodings of all examples as one batch, and how they share it.

    Args:
        encodings: of each example alone.
        sequences: the keys that have an entry a token.
        right_padded: the sequences that are padded on the right; the others are on the left.
        fill: the value of padding, by key; 0 for the others.
    """
    batch, parts = {}, {}
    for key in encodings[0]:
        values, side = [encoding[key] for encoding in encodings], "end"
        shapes = tuple(tuple(value.shape) for value in values)
        parts[key] = Parts(shapes, key in sequences)
        if key in sequences and key not in right_padded:
            side = "start"
        sizes = _largest(shapes)
        batch[key] = torch.cat([_fill_up(value, sizes, side, fill.get(key, 0)) for value in values])
    return batch, parts


def take_rows(
    batch: Mapping[str, Tensor],
    parts: Mapping[str, Parts],
    rows: Sequence[int],
    kept: Mapping[str, Bool[Tensor, " pos"]],
    trim: bool,
) -> tuple[dict[str, Tensor], dict[str, Parts]]:
    """Some examples of a batch, and how they share it.

    Args:
        batch: the batch.
        parts: how its examples share it; a key that is not there is a sequence.
        rows: the examples' numbers.
        kept: the positions to keep, for each sequence.
        trim: cut later axes to what these examples need.
    """
    taken, taken_parts = {}, {}
    for key, value in batch.items():
        shared = parts.get(key, Parts((), True))
        shapes = tuple(shared.shapes[row] for row in rows) if shared.shapes else ()
        if shared.sequence:
            value = value[rows][:, kept[key]]
        else:
            ends = list(accumulate(shape[0] for shape in shared.shapes))
            numbers = [n for row in rows for n in range(ends[row] - shared.shapes[row][0], ends[row])]
            value = value[numbers]
        if trim and shapes:
            first = 2 if shared.sequence else 1
            value = value[(slice(None),) * first + tuple(slice(size) for size in _largest(shapes)[first:])]
        taken[key] = value
        if key in parts:
            taken_parts[key] = Parts(shapes, shared.sequence)
    return taken, taken_parts


def cut(
    batch: Mapping[str, Tensor],
    keys: Collection[str],
    starts: Sequence[int],
    stops: Sequence[int],
    fill: Mapping[str, int],
) -> dict[str, Tensor]:
    """A batch whose sequences hold the positions starts[row] to stops[row] - 1 of each row.

    They are padded on the left again, to the longest of them.

    Args:
        batch: the batch.
        keys: its sequences that are cut; the others stay as they are.
        starts: of each row, its first position without padding.
        stops: of each row.
        fill: the value of padding, by key; 0 for the others.
    """
    longest = max(stop - start for start, stop in zip(starts, stops, strict=True))
    shortened = {}
    for key in keys:
        rows = [batch[key][[row], start:stop] for row, (start, stop) in enumerate(zip(starts, stops, strict=True))]
        sizes = (1, longest, *batch[key].shape[2:])
        shortened[key] = torch.cat([_fill_up(row, sizes, "start", fill.get(key, 0)) for row in rows])
    return {**batch, **shortened}


def _largest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def _fill_up(value: Tensor, sizes: tuple[int, ...], side: str, fill: int) -> Tensor:
    """The tensor with all axes but the first as long as `sizes`; `side` says where axis 1 grows."""
    pad: list[int] = []
    for axis in range(value.ndim - 1, 0, -1):  # torch.nn.functional.pad starts at the last axis
        missing = sizes[axis] - value.shape[axis]
        pad += (missing, 0) if axis == 1 and side == "start" else (0, missing)
    return torch.nn.functional.pad(value, pad, value=fill) if any(pad) else value
