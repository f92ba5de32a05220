"""What a server sends is read without running code, into no more memory than it has."""

import contextlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mechvlm as mv
from helpers.hostile_server import packed, saved
from mechvlm.ndif import plain_values as module
from mechvlm.ndif.plain_values import plain_values
from mechvlm.ndif.streams import unpacked

MOST = 10_000_000


def same(a, b) -> bool:
    """Equal in type, and in all that is in it."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b) and a.requires_grad == b.requires_grad
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


BASE = torch.arange(24.0).reshape(4, 6)
VALUES = {
    "scalars": [1, -(2**70), 2.5, True, None, "text é", b"bytes", 1j, bytearray(b"x")],
    "nested": ({"a": [1, (2, 3)], 4: {}, (1, "b"): []}, OrderedDict(z=1), {1, 2}, frozenset({"a"}), set(), ()),
    "views": [BASE, BASE[1:3, ::2], BASE.T, BASE[0, 0], torch.empty(0, 3), torch.ones(1).expand(5)],
    "kinds": [torch.ones(3, dtype=dtype) for dtype in module.STORAGES.values()] + [torch.tensor([True, False])],
    "grad": [torch.ones(2, requires_grad=True), torch.nn.Parameter(torch.ones(2)), torch.Size([1, 2]), torch.float16],
    "numpy": [np.float32(2.5), np.int64(3), np.bool_(True), np.arange(6).reshape(2, 3).T, np.ones((0, 2))],
    "device": torch.device("cpu"),
}


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("name", VALUES)
def test_plain_values_are_read_as_torch_reads_them(name, protocol):
    content = saved({name: VALUES[name]}, pickle_protocol=protocol)
    trusting = torch.load(io.BytesIO(content), weights_only=False)
    read = plain_values(content, MOST)
    assert same(read, trusting)
    assert same(read, {name: VALUES[name]})


def test_tensors_share_their_numbers_as_before():
    read = plain_values(saved({"a": BASE, "b": BASE[1]}), MOST)
    read["a"][1] = 7
    assert torch.equal(read["b"], torch.full((6,), 7.0))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda part: st.lists(part) | st.dictionaries(st.text() | st.integers(-100, 100), part) | st.tuples(part, part),
    max_leaves=30,
)


@pytest.mark.long
@given(st.dictionaries(st.text(), json_like), st.sampled_from([2, 3, 4]))
def test_any_plain_value_is_read(values, protocol):
    assert same(plain_values(saved(values, pickle_protocol=protocol), MOST), values)


class Runs:
    """Creates a file where it is unpickled."""

    def __init__(self, callee, *args):
        self.reduced = callee, args

    def __reduce__(self):
        return self.reduced


class Built:
    def __init__(self, state):
        self.__dict__.update(state)


def with_pickle(pickled: bytes, **records: bytes) -> bytes:
    """A file of torch.save with this pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", **records}.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def call(name: str, args: bytes) -> bytes:
    """A pickle of {"a": name(*args)}."""
    module_name, _, attribute = name.rpartition(".")
    return b"\x80\x02}X\x01\x00\x00\x00ac" + f"{module_name}\n{attribute}\n".encode() + args + b"Rs."


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_and_named(tmp_path, protocol):
    mark = tmp_path / "ran"
    for hostile, name in (
        (Runs(os.system, f"touch {mark}"), "posix.system"),
        (Runs(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
        (Runs(getattr, "text", "upper"), "builtins.getattr"),
        (Runs(pickle.loads, pickle.dumps(Runs(os.system, f"touch {mark}"))), "pickle.loads"),
        (Runs(torch.load, str(mark)), "torch.serialization.load"),
        (Runs(torch.hub.load, "x", "y"), "torch.hub.load"),
        (Decimal("1.5"), "decimal.Decimal"),
        (Built({"x": 1}), "test_plain_values.Built"),
        (os.system, "posix.system"),
    ):
        with pytest.raises(mv.RemoteError, match=rf"holds a .*{name}, .*could run code"):
            plain_values(saved({"a": [1, hostile]}, pickle_protocol=protocol), MOST)
    assert not mark.exists()


def tensor(offset: int, shape: tuple, strides: tuple) -> bytes:
    """A file whose tensor has two numbers in its storage, and claims this shape."""

    def numbers(values):
        return b"(" + b"".join(b"\x8a\x08" + value.to_bytes(8, "little", signed=True) for value in values) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
    args = b"(" + storage + numbers([offset])[1:-1] + numbers(shape) + numbers(strides) + b"\x89Nt"
    return with_pickle(call("torch._utils._rebuild_tensor_v2", args), **{"data/0": bytes(8)})


def test_a_tensor_lies_within_its_numbers():
    assert plain_values(tensor(0, (2,), (1,)), MOST)["a"].tolist() == [0.0, 0.0]
    assert plain_values(tensor(1, (1000,), (0,)), MOST)["a"].shape == (1000,)
    for offset, shape, strides, reason in (
        (0, (3,), (1,), "reaches beyond"),
        (1, (2,), (1,), "reaches beyond"),
        (-1, (1,), (1,), "sizes that are none"),
        (0, (2,), (-1,), "sizes that are none"),
        (0, (2**40,), (0,), "sizes that are none"),
        (0, (9_000_000, 9), (0, 0), "has 81,000,000 numbers"),
        (0, (1, 1), (1,), "broken"),
    ):
        with pytest.raises(mv.RemoteError, match=reason):
            plain_values(tensor(offset, shape, strides), MOST)


def text(n: int) -> bytes:
    return b"X" + n.to_bytes(4, "little") + b"x" * n


HEAD = b"\x80\x02}X\x01\x00\x00\x00a"
"""The beginning of a pickle of {"a": ...}."""
NESTED = HEAD + b"}K\x01" + b"\x85" + b"\x86".join(b"q%ch%c" % (at, at) for at in range(60)) + b"\x86K\x02ss."
COPIES = (
    HEAD + b"](c_codecs\nencode\nq\x00(" + text(900_000) + b"q\x01" + b"X\x06\x00\x00\x00latin1q\x02tR"
    + b"h\x00(h\x01h\x02tR" * 50 + b"es."
)  # fmt: skip
BOMBS = {
    "zeros": (call("builtins.bytearray", b"(\x8a\x05\x00\x00\x00\x00\x10t"), "bytearray in it is broken"),
    "copies": (COPIES, "larger than 10.0 MB"),
    "lists": (HEAD + b"](" + b"]" * 110_000 + b"es.", "steps to read"),
    "marks": (b"\x80\x02" + b"(" * 110_000 + b".", "steps to read"),
    "keys that hash alike": (HEAD + b"}\x8a\x08" + (2**61 - 1).to_bytes(8, "little") + b"K\x00ss.", "key of a dict"),
    "a key that takes for ever to hash": (NESTED, "key of a dict in it is a tuple"),
    "a copied extension": (b"\x80\x02\x82\x01.", "no whole file"),
    "a state": (HEAD + b"ctorch\nSize\n((K\x01ttR}bs.", "sets the state of"),
    "a number called": (HEAD + b"K\x01K\x02\x85Rs.", "calls what is no constructor"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name, monkeypatch):
    monkeypatch.setattr(module, "MOST_STEPS", 100_000)
    pickled, reason = BOMBS[name]
    with pytest.raises(mv.RemoteError, match=reason):
        plain_values(with_pickle(pickled), MOST)


def test_a_file_that_is_compressed_in_itself():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        file.writestr("archive/data/0", bytes(50_000_000))
    with pytest.raises(mv.RemoteError, match="compressed in itself"):
        plain_values(buffer.getvalue(), MOST)


def test_a_result_is_unpacked_up_to_its_limit():
    assert unpacked(packed(bytes(MOST)), MOST) == bytes(MOST)
    with pytest.raises(mv.RemoteError, match="too large"):
        unpacked(packed(bytes(MOST + 1)), MOST)
    with pytest.raises(mv.RemoteError, match="not compressed as it was asked"):
        unpacked(b"not zstd", MOST)


@given(st.data())
def test_a_damaged_file_is_refused_or_read(data):
    """Whatever single byte differs: nothing is raised but RemoteError."""
    content = bytearray(saved({"a": [BASE, np.ones(3), {"b": 1}]}))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(mv.RemoteError):
        plain_values(bytes(content), MOST)


@given(st.binary(max_size=200))
def test_any_pickle_is_refused_or_read(pickled):
    with contextlib.suppress(mv.RemoteError):
        plain_values(with_pickle(b"\x80\x02}" + pickled), MOST)


def test_what_is_no_dict_of_names():
    for value in ([1], torch.ones(2), {1: 2}):
        with pytest.raises(mv.RemoteError, match="not the saved values by their names"):
            plain_values(saved(value), MOST)
    with pytest.raises(mv.RemoteError, match="no whole file"):
        plain_values(b"hello", MOST)
