"""Scripts whose figures are published: what they compare and how they count, without timing."""

import sys
from pathlib import Path

import pytest
import torch

import mechvlm as mv
from mechvlm.families.table import load_table

sys.path.insert(0, str(Path(mv.__file__).parents[1] / "scripts"))

import benchmark_imports
import benchmark_probes
import benchmark_sweeps
import model_table
from benchmark_measure import Peak

ROOT = Path(mv.__file__).parents[1]

# -- the table of models --

HEAD = {"class": "A", "text": "llama"}
TABLE = {
    "one": {**HEAD, "methods": {"lens": "", "bridge": "There is none."}},
    "two": {**HEAD, "refused": "It is an encoder."},
    "three": {**HEAD, "methods": {"lens": "It has no norm.", "bridge": "There is none."}},
    "four": {"class": "B", "text": "", "untried": "It needs a package"},
}


def test_a_reason_of_the_table_stands_once_under_its_number():
    page = model_table.page(TABLE)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows == [
        "| family | class | language model | lens | bridge |", "|---|---|---|---|---|",
        "| one | A | llama | ● | ○<sup>1</sup> |", "| three | A | llama | ○<sup>2</sup> | ○<sup>1</sup> |",
    ]  # fmt: skip
    why, refused, untried = page.split("\n## ")[1:]
    assert why.splitlines() == ["Why not", "", "1. There is none.", "2. It has no norm."]
    assert refused.splitlines() == ["Refused", "", "- **two** (A): It is an encoder."]
    assert untried.splitlines() == ["Not tried", "", "- **four** (B): It needs a package"]


def test_the_page_of_models_is_that_of_the_rows():
    assert model_table.page(load_table()) == (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_a_row_says_what_became_of_each_method(monkeypatch):
    """Of a family that loads, one that is refused, and one whose package is missing."""
    from helpers import every_answer, every_method, families  # noqa: F401  (it registers its methods)

    def works(case):
        assert case.name == "llava"

    def refused(case):
        raise mv.ModelError("It has\nnone.")

    monkeypatch.setattr(every_method, "METHODS", {"works": works, "refused": refused})
    assert model_table.row_of("llava") == {
        "class": "LlavaForConditionalGeneration", "text": "llama", "methods": {"works": "", "refused": "It has none."},
    }  # fmt: skip
    row = model_table.row_of("blip2_t5")
    assert (row["text"], "methods" in row) == ("t5", False)
    assert "encoder-decoder" in row["refused"]

    def lacking(name):
        raise ImportError("LlavaProcessor requires\n a package. Install it.")

    monkeypatch.setattr(families, "build", lacking)
    untried = {"class": "LlavaForConditionalGeneration", "text": "", "untried": "LlavaProcessor requires a package"}
    assert model_table.row_of("llava") == untried


# -- the benchmark --


def seconds_of(**given: float):
    """In place of `times`: every case runs once, and has these seconds, or else 1."""

    def times(cases, *_):
        for case in cases.values():
            case()
        return {name: given.get(name, 1.0) for name in cases}

    return times


@pytest.mark.long
def test_sweeps_are_held_to_whole_forwards_in_bare_ones(monkeypatch):
    times = seconds_of(**{"bare forward": 2.0, "image -> last": 3.0, "image -> last, whole forwards": 12.0})
    monkeypatch.setattr(benchmark_sweeps, "times", times)
    rows = {row["case"]: row for row in benchmark_sweeps.sweeps(layers=2, width=128, repeats=1)}
    experiments = ["image -> question", "image -> last", "causal trace, image"]
    assert list(rows) == ["bare forward", *experiments, *(f"{name}, whole forwards" for name in experiments)]
    assert rows["image -> last"]["of 2 bare forwards"] == 0.75
    assert rows["image -> last, whole forwards"]["of 2 bare forwards"] == 3
    for name in experiments:
        assert 0 <= rows[name]["apart"] < 1e-3
    assert not any("apart" in row for name, row in rows.items() if name not in experiments)


@pytest.mark.long
def test_a_sweep_that_gives_other_numbers_is_told(monkeypatch):
    """Whole forwards that restore a layer too many are apart from the causal trace."""
    monkeypatch.setattr(benchmark_sweeps, "times", seconds_of())
    patch = mv.patch
    monkeypatch.setattr(mv, "patch", lambda vlm, x, pos, at_layer, at: patch(vlm, 2 * x, pos, at_layer, at=at))
    rows = {row["case"]: row for row in benchmark_sweeps.sweeps(layers=2, width=128, repeats=1)}
    assert rows["causal trace, image"]["apart"] > 1e-3
    assert rows["image -> last"]["apart"] < 1e-3


@pytest.mark.long
def test_probes_cost_bare_forwards_and_floors(monkeypatch):
    """The floor of the lens is the forward and its own product; of all three, both products."""
    three, others = "all three in one read", ["(a) Hugging Face, eager", "(b) TransformerBridge", "(d) plain hooks"]
    given = {
        "bare forward": 2.0, "unembedding product": 0.5, "Gram products": 1.5, "LogitLens": 5.0, three: 8.0, "bare": 0.25,
        "empty": 0.75,
    }  # fmt: skip
    monkeypatch.setattr(benchmark_probes, "times", seconds_of(**given))
    monkeypatch.setattr(
        benchmark_probes, "peaks", lambda cases, *_: {name: Peak(4 if name == three else 2, 1) for name in cases}
    )
    rows = benchmark_probes.probes("llava", 2, 256, batch=1, repeats=1, device="cpu", dtype=torch.float32)
    by_case = {row["case"]: row for row in rows}
    assert by_case["LogitLens"]["of a bare forward"] == 2.5
    assert by_case["LogitLens"]["of its floor"] == 2
    assert by_case["Contextualization"]["of its floor"] == 0.5
    assert by_case[three]["of its floor"] == 2
    assert (by_case[three]["peak of bare"], by_case[three]["memory bar"]) == (2, benchmark_probes.MEMORY_BAR)
    assert all(0 <= by_case[name]["apart"] < 1e-3 for name in others)
    assert "apart" not in by_case[three]
    assert by_case["tracing 32 layers"]["seconds"] == 0.5
    assert by_case["tracing 32 layers"]["of a bare forward"] == 0.25


@pytest.mark.long
def test_all_pairs_are_the_same_pair_by_pair(monkeypatch):
    monkeypatch.setattr(benchmark_probes, "times", seconds_of(ours=2.0, theirs=30.0))
    ours, theirs = benchmark_probes.pairs(256, 1, "cpu")
    assert (ours["seconds"], theirs["seconds"], theirs["times as long"]) == (2, 30, 15)
    assert 0 <= theirs["apart"] < 1e-4


def test_imports_are_multiples_of_nnsights(monkeypatch):
    code = {}

    def times(cases, repeats):
        code.update(cases)
        return {"import nnsight": 4.0, "import mechvlm": 5.0, "mechvlm --help": 0.5} | dict.fromkeys(
            list(cases)[2:4], 8.0
        )

    monkeypatch.setattr(benchmark_imports, "times", times)
    started = []
    monkeypatch.setattr(benchmark_imports.subprocess, "run", lambda command, **_: started.append(command[1:]))
    rows = {row["case"]: row for row in benchmark_imports.imports(1)}
    assert rows["import mechvlm"]["of import nnsight"] == 1.25
    assert rows["import mechvlm"]["limit"] == 4 + benchmark_imports.IMPORT_MARGIN
    assert rows["mechvlm --help"]["limit"] == benchmark_imports.HELP_LIMIT
    assert rows["mechvlm, every public name"]["limit"] is None
    for case in code.values():
        case()
    assert started == [["-c", text] for text in benchmark_imports.CODE.values()]
