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


@dataclass(frozen=True)
class Result:
    """A typed result: tensors with named axes, and the settings they were made with.

    >>> result.save("lens.safetensors")
    >>> LogitLensResult.load("lens.safetensors").to_frame()

    Attributes:
        units: of the tensors.
        renamed: {name in files of earlier versions: present name} of the fields that were renamed.
    """

    units: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {}

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
        header = {"mechvlm": type(self).__name__, "fields": json.dumps(settings)}
        save_file(tensors, path, metadata=header)

    @classmethod
    def load(cls, path: str | PathLike) -> Any:
        """Read a file that `save` wrote.

        Raises:
            ValueError: when the file holds another kind of result.
        """
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("mechvlm") != cls.__name__:
                kind = header.get("mechvlm", "no mechvlm result")
                raise ValueError(f"{path} holds {kind}, not {cls.__name__}: load it with the class that saved it.")
            values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        values |= {key: _tuples(value) for key, value in json.loads(header["fields"]).items()}
        return cls(**{cls.renamed.get(key, key): value for key, value in values.items()})


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
