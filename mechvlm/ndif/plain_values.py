"""Reads the values in a file of `torch.save` without running code.

A server answers with a pickle, and a pickle can call any function on the machine that reads it.
`plain_values` knows a few constructors, all its own: of numbers, texts, bytes, lists, tuples, dicts
and sets, of dense tensors, and of NumPy's numbers and arrays. Any other name is refused before it
is looked up, so nothing is imported and nothing runs.

What it makes is bounded too. Each step of the pickle and each byte that a constructor copies is
counted, a tensor must lie within its bytes, and keys of dicts are of a few kinds, since hashing
others could take for ever.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mechvlm.errors import RemoteError

LARGEST_PICKLE = 100_000_000
"""Bytes of the pickle itself, without those of its tensors."""
MOST_STEPS = 1_000_000
"""Steps of a pickle: about one for a number, two for a text. Each takes about 100 bytes."""
MOST_RECORDS = 100_000
"""Records in the file, one for each tensor."""
LARGEST_KEY = 2**32
"""Whole numbers as keys are smaller: larger ones can be chosen so that all hash alike."""

NUMPY_KINDS = "biufc"
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
TORCH_DTYPES = {str(dtype): dtype for dtype in STORAGES.values()}


class Stored(NamedTuple):
    """The numbers of one or several tensors, in one row."""

    values: Tensor


class Constructor:
    """Stands for a name of the pickle, and is all that the pickle can call."""

    def __init__(self, build: Callable[..., Any]):
        self.build = build


def plain_values(content: bytes, most: int) -> dict[str, Any]:
    """The values by their names, from the bytes of a file that `torch.save` wrote.

    `most` is the largest number of bytes of a tensor, and of all that constructors copy.

    Raises:
        RemoteError: for a file that is broken, names a class or function other than the few that
            are known, or would become larger than it is.
    """
    try:
        values = _Reader(content, most).load()
    except RemoteError:
        raise
    except Exception as error:  # whatever a forged file leads pickle, zipfile, NumPy or torch to
        raise RemoteError(
            f"NDIF's result cannot be read: it is no whole file of torch.save ({type(error).__name__})."
        ) from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise RemoteError(f"NDIF's result is a {type(values).__name__}, and not the saved values by their names.")
    return values


def _refuse(reason: str) -> RemoteError:
    return RemoteError(f"NDIF's result is not read: {reason}.")


PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Reader(PythonUnpickler):
    """Python's own unpickler, which asks this class for every name, call and key."""

    def __init__(self, content: bytes, most: int):
        self.records = _records(content)
        (pickled,) = [name for name in self.records if name.endswith("/data.pkl")]
        self.top = pickled.removesuffix("data.pkl")
        self.content, self.most, self.left, self.steps = zipfile.ZipFile(BytesIO(content)), most, most, MOST_STEPS
        self.stored: dict[str, Stored] = {}
        if self.records[pickled] > LARGEST_PICKLE:
            raise _refuse(
                f"it holds {self.records[pickled] / 1e6:,.1f} MB besides its tensors. Save tensors, not lists"
            )
        if self._record("byteorder", b"little") != b"little":
            raise _refuse("its numbers are big-endian")
        super().__init__(BytesIO(self._record("data.pkl")))

    def _record(self, name: str, default: bytes = b"") -> bytes:
        return self.content.read(self.top + name) if self.top + name in self.records or not default else default

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise _refuse(f"it would become larger than {self.most / 1e6:,.1f} MB")

    # -- what the pickle may do -------------------------------------------------------------------

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if path in TORCH_DTYPES:
            return TORCH_DTYPES[path]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if path not in CONSTRUCTORS:
            raise _refuse(
                f"it holds a {path}, and reading that could run code of the server's here. Save tensors, numbers, texts, lists "
                "and dicts in the block, such as the tensors of this object"
            )
        build = CONSTRUCTORS[path]
        return Constructor(lambda *args: build(self, *args))

    def persistent_load(self, pid: Any) -> Stored:
        _, dtype, key, _, _ = pid
        if key not in self.stored:
            content = bytearray(self.content.read(f"{self.top}data/{key}"))
            plain = torch.uint8 if dtype is torch.bool else dtype
            values = torch.frombuffer(content, dtype=plain) if content else torch.empty(0, dtype=plain)
            self.stored[key] = Stored(values.ne(0) if dtype is torch.bool else values)
        if self.stored[key].values.dtype != dtype:
            raise _refuse("two tensors read the same numbers as different types")
        return self.stored[key]

    def call(self) -> None:
        args, callee = self.stack.pop(), self.stack[-1]
        if type(callee) is not Constructor or type(args) is not tuple:
            raise _refuse("it calls what is no constructor")
        self.stack[-1] = callee.build(*args)

    def set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.dtype):
            if state[1] not in ("<", "|", "="):
                raise _refuse("its numbers are big-endian")
        elif isinstance(target, np.ndarray) and target.size == 0:
            _fill(self, target, *state)
        else:
            raise _refuse(f"it sets the state of a {type(target).__name__}")

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def set_items(self) -> None:
        items = self.pop_mark()
        for at in range(0, len(items), 2):
            self._set(items[at], items[at + 1])

    def _set(self, key: Any, value: Any) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise _refuse("it sets items of what is no dict")
        target[_key(key)] = value

    def add_items(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise _refuse("it adds to what is no set")
        self.stack[-1].update(_key(item) for item in items)

    def frozen(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(_key(item) for item in items))


def _records(content: bytes) -> dict[str, int]:
    """The sizes of the records in the file, none of them compressed, which fit into it."""
    if content.count(b"PK\x01\x02") > MOST_RECORDS:
        raise _refuse(f"it holds more than {MOST_RECORDS:,} tensors")
    with zipfile.ZipFile(BytesIO(content)) as file:
        records = file.infolist()
    if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
        raise _refuse("it is compressed in itself")
    if sum(r.file_size for r in records) > len(content):
        raise _refuse("its records overlap")
    return {r.filename: r.file_size for r in records}


def _counted(step: Callable[[_Reader], None]) -> Callable[[_Reader], None]:
    def counted(reader: _Reader) -> None:
        reader.steps -= 1
        if reader.steps < 0:
            raise _refuse(f"it takes more than {MOST_STEPS:,} steps to read. Save tensors, not lists of numbers")
        step(reader)

    return counted


def _dispatch() -> dict[int, Callable[[_Reader], None]]:
    """The operations of pickles that are read: those that torch.save and its server write."""
    known = (
        "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE "
        "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 "
        "TUPLE2 TUPLE3 EMPTY_DICT EMPTY_SET BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID"
    )
    steps = {getattr(pickle, name)[0]: PythonUnpickler.dispatch[getattr(pickle, name)[0]] for name in known.split()}
    ours = {
        "REDUCE": _Reader.call,
        "BUILD": _Reader.set_state,
        "SETITEM": _Reader.set_item,
        "SETITEMS": _Reader.set_items,
        "ADDITEMS": _Reader.add_items,
        "FROZENSET": _Reader.frozen,
    }
    steps |= {getattr(pickle, name)[0]: step for name, step in ours.items()}
    return {code: _counted(step) for code, step in steps.items()}


def _key(value: Any) -> Any:
    """A key of a dict or a member of a set, if hashing it is quick."""
    parts = value if type(value) is tuple and len(value) <= 8 else (value,)
    for part in parts:
        small = isinstance(part, int) and abs(part) < LARGEST_KEY
        if not (small or part is None or isinstance(part, str | bytes)):
            raise _refuse(
                f"the key of a dict in it is a {type(part).__name__}: keys are texts and whole numbers to 2**32"
            )
    return value


# -- constructors ----------------------------------------------------------------------------------


def _tensor(reader: _Reader, stored: Any, offset: Any, shape: Any, strides: Any, grad: Any = False, *_: Any) -> Tensor:
    if type(stored) is not Stored or len(shape) != len(strides) or len(shape) > 64:
        raise _refuse("a tensor in it is broken")
    if not all(type(number) is int and 0 <= number <= reader.most for number in (offset, *shape, *strides)):
        raise _refuse("a tensor in it has sizes that are none")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= len(stored.values):
        raise _refuse("a tensor in it reaches beyond its numbers")
    if math.prod(shape) * stored.values.element_size() > reader.most:
        raise _refuse(f"a tensor in it has {math.prod(shape):,} numbers")
    if not math.prod(shape):
        return torch.empty(shape, dtype=stored.values.dtype)
    return stored.values.as_strided(shape, strides, offset).requires_grad_(grad is True)


def _parameter(_: _Reader, data: Tensor, grad: Any, *__: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(data, requires_grad=grad is True)


def _bytes(reader: _Reader, text: str = "", encoding: str = "latin1") -> bytes:
    reader.spend(len(text))
    return text.encode({"latin1": "latin1", "latin-1": "latin1"}[encoding])


def _bytearray(reader: _Reader, content: Any = b"") -> bytearray:
    if not isinstance(content, bytes):  # a number would make that many zeros
        raise _refuse("a bytearray in it is broken")
    reader.spend(len(content))
    return bytearray(content)


def _set(reader: _Reader, items: Any = ()) -> set:
    reader.spend(100 * len(items))
    return {_key(item) for item in items}


def _size(reader: _Reader, sizes: tuple) -> torch.Size:
    reader.spend(100 * len(sizes))
    return torch.Size(sizes)


def _complex(_: _Reader, real: float, imaginary: float) -> complex:
    return complex(float(real), float(imaginary))


def _device(_: _Reader, kind: str, number: int | None = None) -> torch.device:
    return torch.device(kind) if number is None else torch.device(kind, number)


def _dtype(_: _Reader, name: str, *__: Any) -> np.dtype:
    if not isinstance(name, str) or name[:1] not in NUMPY_KINDS or not name[1:].isdigit():
        raise _refuse(f"NumPy's type {name!r:.40} in it is no type of numbers")
    return np.dtype(name)


def _number(reader: _Reader, dtype: np.dtype, content: bytes) -> Any:
    reader.spend(len(content))
    (number,) = np.frombuffer(content, dtype)
    return number


def _array(_: _Reader, __: Any, shape: Any, ___: Any) -> np.ndarray:
    if shape != (0,):
        raise _refuse("an array in it is broken")
    return np.empty(0)  # `_fill` fills it


def _fill(reader: _Reader, array: np.ndarray, version: Any, shape: Any, dtype: Any, fortran: Any, content: Any) -> None:
    sizes = all(type(size) is int and 0 <= size <= reader.most for size in shape)
    if not (sizes and isinstance(dtype, np.dtype) and isinstance(content, bytes)):
        raise _refuse("an array in it is broken")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise _refuse("an array in it reaches beyond its numbers")
    reader.spend(len(content))
    cast(Any, array).__setstate__((1, tuple(shape), dtype, fortran is True, content))


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": lambda _: OrderedDict(),
    "_codecs.encode": _bytes,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytearray,
    "builtins.set": _set,
    "builtins.frozenset": lambda reader, items=(): frozenset(_set(reader, items)),
    "builtins.complex": _complex,
    "nnsight.schema.response.Status": lambda _, name: f"{name:.20}",
    "numpy.dtype": _dtype,
    "numpy.ndarray": lambda _: None,  # named beside `_reconstruct`, and never called
    "numpy._core.multiarray.scalar": _number,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.multiarray._reconstruct": _array,
}
"""The names that a pickle may call, and what makes their values here."""

_Reader.dispatch = _dispatch()
