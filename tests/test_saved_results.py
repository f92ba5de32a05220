"""Saved results: damage is seen, other fields are refused, and an earlier file stays whole."""

import json
import os
import random
import struct
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from helpers.uneven import uneven
from mechvlm import results
from mechvlm.errors import InputError
from mechvlm.outside.integrity import SEAL
from mechvlm.results import RESULT_FORMAT, Result, _digest_of_result


@dataclass(frozen=True, repr=False)
class Kept(Result):
    values: Float[Tensor, "layer example"]
    shares: Float[Tensor, "layer example"] | None
    layers: tuple[int, ...]
    names: tuple[tuple[str, float], ...]
    model: str
    n: int | None = None


@pytest.fixture
def kept() -> Kept:
    return Kept(uneven(3, 4), None, (2, 0, 1), (("a", 0.5), ("b", 1.5)), "m", example_ids=("x", "y", "z", "é"))


@pytest.fixture
def path(kept, tmp_path):
    kept.save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def same(a: Kept, b: Kept) -> bool:
    return torch.equal(a.values, b.values) and {**vars(a), "values": 0} == {**vars(b), "values": 0}


@pytest.mark.parametrize(
    "trials", [pytest.param(60, id="sample"), pytest.param(1000, marks=pytest.mark.long, id="all")]
)
def test_a_flipped_bit_is_named_or_changes_nothing(kept, path, trials):
    assert same(Kept.load(path), kept)
    whole, rng, refused = path.read_bytes(), random.Random(trials), 0
    for _ in range(trials):
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            assert same(Kept.load(path), kept)
        except InputError as error:
            refused += str(path) in str(error)
    assert refused > 0.9 * trials


def write(path, tensors, fields, **header) -> None:
    """A file that is sealed, whatever it holds."""
    about = {"mechvlm": "Kept", "format": str(RESULT_FORMAT), "fields": fields} | header
    save_file(tensors, path, metadata=about | {SEAL: _digest_of_result(about, tensors)})


FIELDS = {"shares": None, "layers": [1], "names": [["a", 1.0]], "model": "m", "n": 2, "example_ids": ["x"]}
DEEP = "[" * 40 + "]" * 40
REFUSED = [
    ({"more": 1}, {}, "Kept has no field more"),
    ({"model": 3}, {}, "model: input should be a valid string"),
    ({"layers": ["1"]}, {}, r"layers\.0: input should be a valid integer"),
    ({"layers": None}, {}, "layers: input should be a valid tuple"),
    ({"names": [["a"]]}, {}, r"lacks names\.0\.1"),
    ({"n": 1.5}, {}, "n.*: input should be a valid integer"),
    ({}, {"values": torch.zeros(3)}, r"values is a tensor \[3\] of torch\.float32, which does not fit"),
    ({}, {"values": torch.zeros(3, 4, dtype=torch.int64)}, "values is a tensor .* of torch.int64"),
    ({}, {"shares": torch.zeros(3, 5)}, r"shares is a tensor \[3, 5\]"),
    ({}, {"values": torch.zeros(3, 4), "other": torch.zeros(1)}, "Kept has no field other"),
]


@pytest.mark.parametrize(("changes", "tensors", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_fields_that_do_not_fit_are_refused(tmp_path, changes, tensors, message):
    path = tmp_path / "a.safetensors"
    fields = {name: value for name, value in FIELDS.items() if name not in tensors}
    write(path, {"values": torch.zeros(3, 4)} | tensors, json.dumps(fields | changes))
    with pytest.raises(InputError, match=rf"{path} is damaged \(.*{message}"):
        Kept.load(path)


def test_fields_that_are_missing_deep_or_too_many_are_refused(tmp_path):
    path, values = tmp_path / "a.safetensors", {"values": torch.zeros(3, 4)}
    without = {name: value for name, value in FIELDS.items() if name != "layers"}
    for fields, message in (
        (json.dumps(without), "it lacks layers"),
        (json.dumps(FIELDS).replace("[1]", DEEP), "no JSON object of at most 32 levels"),
        (json.dumps(FIELDS).replace("[1]", "[" * 100_000), "no JSON object of at most 32 levels"),
        (f"[{'0,' * 5_000_000}0]", "5,000,001 entries, and at most 4,000,000 are read"),
        ("[1]", "it holds a list"),
        ("{", "Expecting property name"),
    ):
        write(path, values, fields)
        with pytest.raises(InputError, match=message):
            Kept.load(path)
    write(path, {}, json.dumps(FIELDS))
    with pytest.raises(InputError, match="it lacks values"):
        Kept.load(path)
    write(path, values, json.dumps(FIELDS), format="three")
    with pytest.raises(InputError, match="its format is 'three', no number"):
        Kept.load(path)


def test_what_is_no_file_of_ours_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for content in (b"", b"{}", struct.pack("<Q", 2**62), struct.pack("<Q", 2) + b"{}", os.urandom(99)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=str(path)):
            Kept.load(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="it is no regular file"):
        Kept.load(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        Kept.load(tmp_path / "none")


def test_a_file_of_an_earlier_version_is_read_after_a_line(tmp_path):
    path, values = tmp_path / "a.safetensors", {"values": torch.zeros(3, 4)}
    header = {"mechvlm": "Kept", "fields": json.dumps(FIELDS)}
    save_file(values, path, metadata=header | {"format": "2"})
    with pytest.warns(UserWarning, match=rf"{path} is of an earlier mechvlm, which wrote no checksums"):
        assert Kept.load(path).n == 2
    save_file(values, path, metadata=header | {"format": "3"})
    with pytest.raises(InputError, match="it carries no checksum"):
        Kept.load(path)


def test_a_save_that_fails_leaves_the_earlier_file(kept, path, monkeypatch):
    def full(tensors, to, metadata):
        to.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(results, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        kept.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_tensors_without_entries_or_axes_come_back(tmp_path):
    @dataclass(frozen=True, repr=False)
    class Odd(Result):
        empty: Float[Tensor, "a b"]
        lone: Int[Tensor, ""]
        half: Float[Tensor, " a"]

    odd = Odd(torch.zeros(0, 3), torch.tensor(5), torch.zeros(0, dtype=torch.bfloat16))
    odd.save(tmp_path / "odd.safetensors")
    back = Odd.load(tmp_path / "odd.safetensors")
    assert (back.empty.shape, back.lone.item(), back.half.dtype) == ((0, 3), 5, torch.bfloat16)


@pytest.mark.long
def test_phases_come_back_with_their_evidence(tmp_path):
    from helpers.studies import made_study

    phases = made_study({"m": 12}, n=5).phases["m"]
    phases.save(tmp_path / "phases.safetensors")
    back = type(phases).load(tmp_path / "phases.safetensors")
    assert back.evidence == phases.evidence
