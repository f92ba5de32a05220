"""Every method on every family, as the table of models says: it works, or is refused by name."""

import json
from functools import lru_cache

import pytest

import mechvlm as mv
from helpers import every_answer, families  # noqa: F401  (it registers its methods)
from helpers.every_method import METHODS, REFUSALS, Case, outcome
from mechvlm.families.table import TABLE, load_table


@lru_cache(maxsize=2)
def case_of(name: str) -> Case:
    return Case(name)


@pytest.mark.parametrize("name", families.cases())
def test_a_family_is_as_the_table_says(name):
    """One test a family: a case is made once, and its methods share it."""
    row = load_table()[name]
    if "refused" in row:
        with pytest.raises(mv.ModelError) as caught:
            case_of(name)
        assert str(caught.value) == row["refused"]
        return
    case = case_of(name)
    got = {method: outcome(METHODS[method], case) for method in METHODS}
    assert got == row["methods"]
    assert row["class"] == case.vlm.record.hf_class


@pytest.mark.parametrize("name", [p for p in families.cases(refused=True) if families.FAMILIES[p.values[0]].refused])
def test_what_cannot_be_read_is_refused(name):
    with pytest.raises(mv.ModelError) as caught:
        mv.load(*families.build(name))
    assert load_table()[name]["refused"] == str(caught.value)


def test_the_table_has_every_family_and_method():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert set(table) == {name for name, family in families.FAMILIES.items()}
    for row in table.values():
        assert "refused" in row or "untried" in row or list(row["methods"]) == list(METHODS)


def test_a_wrong_number_is_no_refusal():
    def wrong(case):
        raise AssertionError("off by 0.3")

    with pytest.raises(AssertionError, match="off by"):
        outcome(wrong, None)  # type: ignore[arg-type]
    assert all(issubclass(kind, ValueError) for kind in REFUSALS)
