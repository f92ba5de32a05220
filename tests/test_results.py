"""The base of results: tables, files and names, with values that no symmetry hides."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.uneven import uneven
from mechvlm.results import Result, long_frame, stack, to_cpu


@dataclass(frozen=True, repr=False)
class Made(Result):
    renamed: ClassVar[dict[str, str]] = {"old": "values"}

    values: Float[Tensor, "a b c"]
    pairs: tuple[tuple[str, int], ...]
    model: str


@pytest.fixture
def made() -> Made:
    return Made(uneven(2, 3, 4), (("x", 1), ("y", 2)), "m")


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
