"""The base class of results: frozen, with units, and methods to save, tabulate and plot them."""

import json
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

RESULT_FORMAT = 2
"""Version of a saved result. Version 1, which names none, counts the layers of attention, heads and
neurons from 1, and holds a tokenizer's pieces for the tokens' texts."""


@dataclass(frozen=True)
class Result:
    """A typed result: tensors with named axes, and the settings they were made with.

    >>> result.save("lens.safetensors")
    >>> LogitLensResult.load("lens.safetensors").to_frame()

    Attributes:
        units: of the tensors.
        renamed: {name in files of earlier versions: present name} of the fields that were renamed.
        texts: the fields that hold tokens' texts. Files of the first format hold the tokenizer's
            pieces there, with marks such as `▁`; `load` turns them into text.
    """

    units: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {}
    texts: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        """The shapes of the tensors and the short settings, without any values of the tensors."""
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                shown.append(f"{f.name}: {list(value.shape)}")
            elif isinstance(value, str | int | float) or (isinstance(value, tuple) and len(value) < 5):
                shown.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_frame(self) -> pd.DataFrame:
        """The result as a tidy table, one value a row.

        Raises:
            TypeError: for a result that has no table.
        """
        raise TypeError(f"{type(self).__name__} has no table of its own.")

    def plot(self, ax=None):
        """Plot the result with matplotlib, on `ax` or a new pyplot figure, which a notebook shows.

        Returns:
            The axes.

        Raises:
            TypeError: for a result that has no plot.
        """
        names = ", ".join(field.name for field in fields(self))
        raise TypeError(f"There is no plot of a {type(self).__name__}. Its numbers are in {names}.")

    def save(self, path: str | PathLike) -> None:
        """Write one .safetensors file: tensors as they are, other fields as JSON in the header.

        Raises:
            FileNotFoundError: when the folder does not exist.
        """
        tensors, settings = {}, {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                tensors[f.name] = value.detach().cpu().contiguous().clone()
            else:
                settings[f.name] = value
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"Nothing can be saved as {path}: the folder {Path(path).parent} is not there.")
        header = {"mechvlm": type(self).__name__, "format": str(RESULT_FORMAT), "fields": json.dumps(settings)}
        save_file(tensors, path, metadata=header)

    @classmethod
    def load(cls, path: str | PathLike) -> Any:
        """Read a file that `save` wrote.

        Raises:
            ValueError: when the file holds another kind of result, or a newer mechvlm wrote it.
        """
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("mechvlm") != cls.__name__:
                kind = header.get("mechvlm", "no mechvlm result")
                raise ValueError(f"{path} holds {kind}, not {cls.__name__}: load it with the class that saved it.")
            values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        file_format = int(header.get("format", 1))
        if file_format > RESULT_FORMAT:
            raise ValueError(
                f"{path} was written by a newer mechvlm (format {file_format}; this one reads up to {RESULT_FORMAT}). "
                "Update: pip install -U mechvlm."
            )
        values |= {key: _tuples(value) for key, value in json.loads(header["fields"]).items()}
        values = {cls.renamed.get(key, key): value for key, value in values.items()}
        if file_format == 1:
            values |= {name: as_text(values[name]) for name in cls.texts if name in values}
            values = cls.counted_from_0(values)
        return cls(**values)

    @classmethod
    def counted_from_0(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file of format 1, with their layers counted from 0."""
        return values


def as_text(pieces):
    """Tokens as text out of a tokenizer's pieces, in tuples of any depth; numbers stay as they are.

    For files that hold no tokenizer. `Ġ` and `Ċ` tell byte-level pieces from SentencePiece's.
    """
    from tokenizers import decoders

    marks = set("".join(_strings(pieces)))
    if marks & set("ĠĊ") and "▁" not in marks:
        decoder = decoders.ByteLevel()
    else:
        decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

    def decoded(value):
        if isinstance(value, tuple):
            return tuple(map(decoded, value))
        return decoder.decode([value]) if isinstance(value, str) else value

    return decoded(pieces)


def _strings(value) -> list[str]:
    if isinstance(value, tuple):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def long_frame(values: Tensor, **axes) -> pd.DataFrame:
    """A tensor as a table with one row per entry.

    Args:
        values: the tensor.
        axes: name and labels of each axis, in the tensor's order. Each becomes a column.

    Returns:
        The table; the entries are in the column `value`.
    """
    index = pd.MultiIndex.from_product([list(labels) for labels in axes.values()], names=list(axes))
    return pd.DataFrame({"value": np.asarray(values.detach().cpu().float()).reshape(-1)}, index=index).reset_index()


def to_cpu(x: Tensor) -> Tensor:
    """The tensor on the CPU, detached; floating-point numbers of any precision as float32."""
    x = x.detach().cpu()
    return x.float() if x.is_floating_point() else x


def float32(numbers: Any) -> Tensor:
    """Numbers as a float32 tensor on the CPU, whatever torch's default dtype is."""
    return torch.tensor(numbers, dtype=torch.float32)


def stack(rows: list[Tensor]) -> Tensor:
    """The rows as one tensor on the CPU, along a new first axis; see `to_cpu`."""
    return torch.stack([to_cpu(row) for row in rows])
