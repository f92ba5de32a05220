"""The base class of results: frozen, with units, and methods to save, tabulate and plot them.

`concat` joins results of several batches. It reads from the annotations which axes run over
examples: `Float[Tensor, "layer example head"]` is joined along its second.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

import numpy as np
import pandas as pd
import torch
from jaxtyping import jaxtyped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.outside.integrity import SEAL, check_size, check_type, digest, parse_json
from mechvlm.outside.pieces import as_text

RESULT_FORMAT = 3
"""Version of a saved result. Version 1, which names none, counts the layers of attention, heads and
neurons from 1, and holds a tokenizer's pieces for the tokens' texts."""
SEALED_FORMAT = 3
"""From this version on a saved result carries a checksum."""
SHOWN_UP_TO = 36
"""Letters up to which a result shows one of its settings."""
EXAMPLE_AXES = {"example", "point", "pair"}
"""Names of axes along which results of several batches follow each other."""


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
        per_example: the fields that are tuples with one entry per example.
        computed: the fields that are no settings, and that `joined` gives.
        apart: why results of several batches cannot be joined; empty where they can.
        example_ids: the examples' names, from `vlm.inputs(..., ids=...)`, or None.
    """

    units: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {}
    texts: ClassVar[tuple[str, ...]] = ()
    per_example: ClassVar[tuple[str, ...]] = ()
    computed: ClassVar[tuple[str, ...]] = ()
    apart: ClassVar[str] = ""

    example_ids: tuple[str, ...] | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        """The shapes of the tensors and the short settings, without any values of the tensors."""
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                shown.append(f"{f.name}: {list(value.shape)}")
            elif f.name in self.per_example or _is_table(value):
                continue  # no settings
            elif isinstance(value, str | int | float | tuple) and len(text := repr(value)) <= SHOWN_UP_TO:
                shown.append(f"{f.name}={text}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_frame(self) -> pd.DataFrame:
        """The result as a tidy table, one value a row.

        Raises:
            TypeError: for a result that has no table.
        """
        raise TypeError(f"{type(self).__name__} has no table of its own.")

    def with_ids(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A table that has a column `example`, with a column `id` after it where there are ids."""
        if self.example_ids is not None:
            ids = np.array(self.example_ids, dtype=object)[frame["example"]]
            frame.insert(frame.columns.get_loc("example") + 1, "id", ids)
        return frame

    # -- how `concat` joins results; a result overrides what does not hold for it --

    @property
    def seq_length(self) -> int | None:
        """The length of the padded sequences, in a result that holds positions."""
        return None

    def padded(self, length: int) -> "Result":
        """The same result, as if its sequences had been padded on the left to this length."""
        return self

    def count_examples(self) -> int:
        """How many examples the result holds."""
        sizes = {value.shape[axis] for value, axis in _example_axes(self).values()}
        return sizes.pop() if sizes else 0

    @classmethod
    def joined(cls, results: Sequence[Any]) -> dict[str, Any]:
        """The fields of a joined result that are more than its parts', one after the other."""
        return {}

    def single(self, example: int) -> Any:
        """The result of one example, which then has number 0.

        Raises:
            InputError: for a result that holds no numbers of single examples.
            IndexError: for an example that is not there.
        """
        axes, n = _example_axes(self), self.count_examples()
        if not axes:
            raise InputError(f"A {type(self).__name__} holds nothing of single examples. {self.apart}".strip())
        if not 0 <= example < n:
            raise IndexError(f"Example {example} was asked for; this result holds 0 to {n - 1}.")
        tuples = [*self.per_example, *(["example_ids"] if self.example_ids else [])]
        values: dict[str, Any] = {name: value.narrow(axis, example, 1) for name, (value, axis) in axes.items()}
        return replace(self, **values, **{name: getattr(self, name)[example : example + 1] for name in tuples})

    def plot(self, ax=None, title=None, figsize=None, example=None):
        """Plot the result with matplotlib; `mechvlm.figures.canvas` explains the arguments.

        Returns:
            The axes, given or of a new pyplot figure, which a notebook shows.

        Raises:
            TypeError: for a result that has no plot.
        """
        names = ", ".join(field.name for field in fields(self) if field.name != "example_ids")
        raise TypeError(f"There is no plot of a {type(self).__name__}. Its numbers are in {names}.")

    def save(self, path: str | PathLike) -> None:
        """Write one .safetensors file: tensors as they are, other fields as JSON in the header.

        The header also holds the SHA-256 of all that. The file appears whole or not at all: an
        earlier one of that name is there until then.

        Raises:
            FileNotFoundError: when the folder does not exist.
        """
        path = Path(path).expanduser()
        tensors, settings = {}, {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                tensors[f.name] = value.detach().cpu().contiguous().clone()
            else:
                settings[f.name] = value
        if not path.parent.is_dir():
            raise FileNotFoundError(f"Nothing can be saved as {path}: the folder {path.parent} is not there.")
        header = {"mechvlm": type(self).__name__, "format": str(RESULT_FORMAT), "fields": json.dumps(settings)}
        header[SEAL] = _digest_of_result(header, tensors)
        unfinished = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a save that was killed
        try:
            unfinished.mkdir()
            save_file(tensors, unfinished / path.name, metadata=header)
            (unfinished / path.name).replace(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @classmethod
    def load(cls, path: str | PathLike) -> Any:
        """Read a file that `save` wrote.

        A file of an earlier version carries no checksum: it is read after a warning that says so.

        Raises:
            InputError: when the file is damaged, it holds another kind of result or other fields,
                or a newer mechvlm wrote it.
            FileNotFoundError: when there is no such file.
        """
        path = Path(path).expanduser()
        try:
            check_size(path)
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("mechvlm") != cls.__name__:
                    kind = header.get("mechvlm", "no mechvlm result")
                    raise InputError(f"{path} holds {kind}, not {cls.__name__}: load it with the class that saved it.")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            file_format = _format_of(header)
            if file_format > RESULT_FORMAT:
                raise InputError(
                    f"{path} was written by a newer mechvlm (format {file_format}; this one reads up to {RESULT_FORMAT}). "
                    "Update: pip install -U mechvlm."
                )
            if SEAL in header and header[SEAL] != _digest_of_result(header, tensors):
                raise ValueError("its content does not match its checksum")
            if SEAL not in header and file_format >= SEALED_FORMAT:
                raise ValueError("it carries no checksum")
            values = tensors | {key: _tuples(value) for key, value in parse_json(header.get("fields", "")).items()}
            values = {cls.renamed.get(key, key): value for key, value in values.items()}
            if file_format == 1:
                values |= {name: as_text(values[name]) for name in cls.texts if name in values}
                values = cls.counted_from_0(values)
            _check_fields(cls, values)
        except (InputError, FileNotFoundError):
            raise
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"{path} is damaged ({reason}). Copy it again, or save the result again.") from error
        if SEAL not in header:
            warnings.warn(
                f"{path} is of an earlier mechvlm, which wrote no checksums: damage in it would not be seen.",
                stacklevel=2,
            )
        return cls(**values)

    @classmethod
    def counted_from_0(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file of format 1, with their layers counted from 0."""
        return values


def _is_table(value: Any) -> bool:
    """Whether a value is tuples of tuples of tuples, such as the members of sets of heads."""
    rows = [row for row in value if isinstance(row, tuple)] if isinstance(value, tuple) else []
    return any(isinstance(cell, tuple) for row in rows for cell in row)


def _digest_of_result(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of a saved result: its header without the digest, and its tensors' bytes."""
    sha = hashlib.sha256(digest({key: value for key, value in header.items() if key != SEAL}).encode())
    for name in sorted(tensors):
        value = tensors[name]
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _format_of(header: dict[str, str]) -> int:
    text = header.get("format", "1")
    if not (text.isdecimal() and len(text) < 9):
        raise ValueError(f"its format is {text[:20]!r}, no number")
    return int(text)


def _check_fields(cls: type[Result], values: dict[str, Any]) -> None:
    """Raise ValueError unless these are the fields of the class, each of its type."""
    known = {f.name: f for f in fields(cls)}
    if extra := [name for name in values if name not in known]:
        raise ValueError(f"{cls.__name__} has no field {', '.join(extra)[:80]}")
    with jaxtyped("context"):  # axes of the same name have the same length in all fields
        for name, annotation in get_type_hints(cls).items():
            value = values.get(name)
            if isinstance(value, Tensor):
                if not isinstance(value, annotation):
                    raise ValueError(f"{name} is a tensor {list(value.shape)} of {value.dtype}, which does not fit")
            elif name in values:
                check_type(value, annotation, name)
            elif name in known and known[name].default is MISSING:
                raise ValueError(f"it lacks {name}")


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


R = TypeVar("R", bound=Result)


def concat(results: Sequence[R]) -> R:
    """Results of several batches as one: their examples one after the other, numbered through.

    The same as if one batch had held all examples: the anisotropy baseline is that of all of them,
    and positions are those of sequences that were padded on the left to the longest.

    >>> parts = [mv.logit_lens(vlm, batch) for batch in batches]
    >>> mv.concat(parts).to_frame()    # examples 0, 1, 2, ... over all batches

    Args:
        results: of one type, model and setting.

    Returns:
        A result of the same type.

    Raises:
        InputError: for no result, results of several types, models, settings or shapes (it names
            the difference), or a type whose results cannot be joined.
    """
    results = list(results)
    _check_joinable(results)
    if len(results) == 1:
        return results[0]
    cls = type(results[0])
    lengths = [length for result in results if (length := result.seq_length) is not None]
    aligned: list[Any] = [result.padded(max(lengths)) for result in results] if lengths else results
    axes = _example_axes(aligned[0])
    listed = {*axes, *cls.per_example, *cls.computed, "example_ids"}
    settings = [f.name for f in fields(cls) if f.name not in listed]
    _refuse_other_settings(aligned, settings)
    values = {name: getattr(aligned[0], name) for name in settings} | {"example_ids": _joined_ids(aligned)}
    values |= cls.joined(aligned)
    for name in (f.name for f in fields(cls) if f.name not in values):
        parts = [getattr(result, name) for result in aligned]
        values[name] = _joined_tensors(name, parts, axes[name][1]) if name in axes else sum(parts, ())
    return cls(**values)


def _check_joinable(results: list) -> None:
    if not results:
        raise InputError("concat() was given no result.")
    types = list(dict.fromkeys(type(result).__name__ for result in results))
    if len(types) > 1 or not isinstance(results[0], Result):
        hint = (
            " mv.read gives a tuple per call: [mv.concat(parts) for parts in zip(*reads)]." if "tuple" in types else ""
        )
        raise InputError(f"concat() joins results of one type, not {' and '.join(types)}.{hint}")
    if results[0].apart and len(results) > 1:
        raise InputError(f"Results of type {types[0]} are not joined: {results[0].apart}")


def _refuse_other_settings(results: list, names: list[str]) -> None:
    for name in names:
        first, *others = [getattr(result, name) for result in results]
        for number, other in enumerate(others, 1):
            same = torch.equal(first, other) if isinstance(first, Tensor) else first == other
            if not same:
                raise InputError(
                    f"Results 0 and {number} differ in `{name}`: {first!r} and {other!r}. Only results of one model and one "
                    "setting are joined."
                )


def _example_axes(result: Result) -> dict[str, tuple[Tensor, int]]:
    """The tensors that hold something for each example, with the number of that axis."""
    axes = {}
    for name, annotation in get_type_hints(type(result)).items():
        kinds = (annotation, *get_args(annotation))  # the tensor alone, or the tensor or None
        names: list[str] = next((kind.dim_str.split() for kind in kinds if hasattr(kind, "dim_str")), [])
        value = getattr(result, name)
        if isinstance(value, Tensor) and EXAMPLE_AXES & set(names):
            axes[name] = value, next(i for i, axis in enumerate(names) if axis in EXAMPLE_AXES)
    return axes


def _joined_ids(results: Sequence[Result]) -> tuple[str, ...] | None:
    ids = [result.example_ids for result in results]
    without = [number for number, names in enumerate(ids) if names is None]
    if 0 < len(without) < len(ids):
        raise InputError(f"Results {without} have no ids and the others do: give ids for all examples, or for none.")
    return None if without else sum((names or () for names in ids), ())


def _joined_tensors(name: str, parts: list[Tensor], axis: int) -> Tensor:
    shapes = [[size for i, size in enumerate(part.shape) if i != axis] for part in parts]
    for number, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        if shape != shapes[0] or part.dtype != parts[0].dtype:
            raise InputError(
                f"`{name}` of results 0 and {number} differ in shape beside their examples: {list(parts[0].shape)} and "
                f"{list(part.shape)}. They were not read in the same way."
            )
    return torch.cat(parts, dim=axis)


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
    """The rows as one tensor on the CPU, along a new first axis, in one copy a device; `to_cpu`."""
    parts = [to_cpu(torch.stack(list(part))) for _, part in groupby(rows, key=lambda row: row.device)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
