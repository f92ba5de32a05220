"""The base of results: tables, files and names, with values that no symmetry hides."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

import mechvlm as mv
from helpers.uneven import uneven
from mechvlm.errors import InputError
from mechvlm.results import RESULT_FORMAT, Result, concat, long_frame, stack, to_cpu


@dataclass(frozen=True, repr=False)
class Made(Result):
    renamed: ClassVar[dict[str, str]] = {"old": "values"}

    values: Float[Tensor, "a b c"]
    pairs: tuple[tuple[str, int], ...]
    model: str


@dataclass(frozen=True, repr=False)
class Worded(Result):
    texts: ClassVar[tuple[str, ...]] = ("words",)

    layer: Int[Tensor, " a"]
    words: tuple[tuple[str, ...], ...]

    @classmethod
    def counted_from_0(cls, values):
        return values | {"layer": values["layer"] - 1}


@pytest.fixture
def made() -> Made:
    return Made(uneven(2, 3, 4), (("x", 1), ("y", 2)), "m")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = mv.LikelihoodResult(torch.tensor([[-1.5]]), "m")
    saved.save("~/x.safetensors")
    assert (tmp_path / "x.safetensors").is_file()
    assert torch.equal(mv.LikelihoodResult.load("~/x.safetensors").logprob, saved.logprob)
    with pytest.raises(mv.InputError, match=rf"{tmp_path}/none is not there"):
        mv.Study.open("~/none")


def test_a_table_has_each_value_at_its_own_place(made):
    frame = long_frame(made.values, a="pq", b=(5, 6, 7), c=range(4))
    assert list(frame) == ["a", "b", "c", "value"]
    rows = frame.set_index(["a", "b", "c"])["value"]
    assert len(rows) == 24
    for i, a in enumerate("pq"):
        for j, b in enumerate((5, 6, 7)):
            for k in range(4):
                assert rows[a, b, k] == made.values[i, j, k].item()


def test_a_result_comes_back_whole(made, tmp_path):
    made.save(tmp_path / "a.safetensors")
    back = Made.load(tmp_path / "a.safetensors")
    assert torch.equal(back.values, made.values)
    assert (back.pairs, back.model) == (made.pairs, made.model)

    class Other(Made):
        pass

    with pytest.raises(ValueError, match="holds Made, not Other: load it with the class that saved it"):
        Other.load(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="is not there"):
        made.save(tmp_path / "none" / "a.safetensors")


def test_a_transposed_tensor_is_saved_as_it_looks(made, tmp_path):
    turned = Made(made.values.permute(2, 1, 0), made.pairs, made.model)
    turned.save(tmp_path / "a.safetensors")
    assert torch.equal(Made.load(tmp_path / "a.safetensors").values, turned.values)


def test_names_of_earlier_versions_are_read(made, tmp_path):
    @dataclass(frozen=True, repr=False)
    class Before(Result):
        old: Float[Tensor, "a b c"]
        pairs: tuple[tuple[str, int], ...]
        model: str

    Before.__name__ = "Made"
    Before(made.values, made.pairs, made.model).save(tmp_path / "a.safetensors")
    assert torch.equal(Made.load(tmp_path / "a.safetensors").values, made.values)


def test_rows_are_stacked_first_and_floats_are_float32():
    rows = [uneven(3, 2), uneven(3, 2, seed=1).to(torch.bfloat16)]
    stacked = stack(rows)
    assert stacked.shape == (2, 3, 2)
    assert stacked.dtype == torch.float32
    assert torch.equal(stacked[1], rows[1].float())
    assert to_cpu(torch.tensor([2**40 + 1])).item() == 2**40 + 1, "whole numbers stay whole"
    assert not to_cpu(torch.ones(2, requires_grad=True)).requires_grad


def test_it_shows_shapes_and_short_settings(made):
    assert repr(made) == "Made(values: [2, 3, 4], pairs=(('x', 1), ('y', 2)), model='m')"
    with pytest.raises(TypeError, match="Made has no table"):
        made.to_frame()
    with pytest.raises(TypeError, match=r"There is no plot of a Made. Its numbers are in values, pairs, model"):
        made.plot()


@pytest.mark.parametrize(
    ("format", "layers", "words"),
    [({}, [2, 0], ((" red", "ish"), (" blue",))), ({"format": "2"}, [3, 1], (("▁red", "ish"), ("▁blue",)))],
)
def test_files_of_the_first_format_count_from_1_and_hold_pieces(tmp_path, format, layers, words):
    fields = json.dumps({"words": [["▁red", "ish"], ["▁blue"]]})
    path = tmp_path / "worded.safetensors"
    save_file({"layer": torch.tensor([3, 1])}, path, metadata={"mechvlm": "Worded", "fields": fields, **format})
    read = Worded.load(path)
    assert read.layer.tolist() == layers
    assert read.words == words


def test_a_file_of_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "worded.safetensors"
    header = {"mechvlm": "Worded", "fields": "{}", "format": str(RESULT_FORMAT + 1)}
    save_file({"layer": torch.tensor([3, 1])}, path, metadata=header)
    with pytest.raises(ValueError, match=r"newer mechvlm \(format 4; this one reads up to 3\)"):
        Worded.load(path)


@dataclass(frozen=True, repr=False)
class Joined(Result):
    values: Float[Tensor, "state example"]
    states: Int[Tensor, " state"]
    model: str


def test_values_are_joined_along_their_examples_and_settings_must_agree():
    parts = [Joined(uneven(3, n, seed=n), torch.arange(3), "m") for n in (2, 1, 4)]
    whole = concat(parts)
    assert torch.equal(whole.values, torch.cat([part.values for part in parts], 1))
    assert (whole.model, whole.states.tolist()) == ("m", [0, 1, 2])
    for change, message in [
        ({"states": torch.tensor([0, 1, 3])}, "Results 0 and 2 differ in `states`"),
        ({"model": "n"}, "Results 0 and 2 differ in `model`: 'm' and 'n'"),
        ({"values": parts[2].values.double()}, "`values` of results 0 and 2 differ"),
    ]:
        with pytest.raises(InputError, match=message):
            concat([*parts[:2], replace(parts[2], **change)])
