"""The scripts that measure studies: what they write and how they count, without timing."""

import sys
from pathlib import Path

import pytest

import mechvlm as mv
from mechvlm.datasets import load_dataset

sys.path.insert(0, str(Path(mv.__file__).parents[1] / "scripts"))

import study_memory
import study_scaling


def test_pictures_repeat_under_other_names(tmp_path, monkeypatch):
    monkeypatch.setattr(study_memory, "PICTURES", 2)
    study_memory.write_pictures(5, tmp_path)
    data = load_dataset(f"folder:{tmp_path}")
    assert data.set_aside == ()
    assert {e.id for e in data.examples} == {f"{i}.png" for i in range(5)}
    files = [(tmp_path / f"{i}.png").read_bytes() for i in range(5)]
    assert files == [files[0], files[1], files[0], files[1], files[0]]
    assert files[0] != files[1]
    captions = {e.id: e.captions for e in data.examples}
    assert captions["3.png"] == captions["1.png"]
    assert len(set(captions["1.png"])) == 5


def test_memory_tenth_by_tenth():
    """Of 20 examples, read in batches of 3 and 5: what was measured last before 2, 4, ... 20."""
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert study_memory.by_tenths({3: 10.0, 8: 20.0, 13: 5.0, 20: 40.0}, 20) == [nan, 10, 10, 20, 20, 20, 5, 5, 5, 40]


def test_memory_of_a_study(monkeypatch, capsys):
    """Each stage's peak is that at its start; only the numbers of the reading stage are tenths."""

    def run(names, dataset, out, progress):
        assert (names, len(load_dataset(dataset))) == (["tiny-llava"], 4)
        for stage, done in (("loading", 0), ("reading tiny-llava", 2), ("reading tiny-llava", 4), ("report", 1)):
            memory["now"] += 10
            progress(stage, done, 4)

    memory = {"now": 100.0}
    monkeypatch.setattr("mechvlm.study.run", run)
    monkeypatch.setattr(study_memory, "resident", lambda: memory["now"])
    monkeypatch.setattr(study_memory, "peak", lambda: 1000 + memory["now"])
    study_memory.main(["4", "--here"])
    first, tenths, *stages = capsys.readouterr().out.splitlines()
    assert first.startswith("4 examples in ")
    assert tenths.split() == ["nan"] * 4 + ["120"] * 5 + ["130"]
    assert [stage.strip() for stage in stages] == [
        "peak until loading: 1110 MB", "peak until reading tiny-llava: 1120 MB", "peak until report: 1140 MB",
        "peak: 1140 MB",
    ]  # fmt: skip


def test_each_number_has_a_process_of_its_own(monkeypatch):
    started = []
    monkeypatch.setattr(study_memory.subprocess, "run", lambda command, check: started.append((command[1:], check)))
    study_memory.main([])
    assert started == [([study_memory.__file__, "--here", n], True) for n in ("500", "5000")]


def test_reading_without_workers_makes_every_shard():
    seconds, size = study_scaling.measure(2, 0)
    assert 0 < seconds < 600
    assert size > 1000, "the shards of two examples"


def test_speeds_are_multiples_of_one_worker(monkeypatch, capsys):
    monkeypatch.setattr(study_scaling, "measure", lambda n, workers: ({0: 8, 1: 10, 2: 5, 4: 4}[workers], 1000 * n))
    study_scaling.main(["40"])
    title, _, *table, _, shards = capsys.readouterr().out.splitlines()
    assert title.startswith("40 scenes, tiny-llava, ")
    assert table[2:] == [
        "| one process, without Ray | 5.0 | |", "| 1 worker | 4.0 | 1.00 |", "| 2 workers | 8.0 | 2.00 |",
        "| 4 workers | 10.0 | 2.50 |",
    ]  # fmt: skip
    assert shards == "Shards: 1.00 kB an example"


@pytest.mark.parametrize("script", [study_memory, study_scaling])
def test_help_says_what_is_measured(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0
    assert f"python scripts/{script.__name__}.py" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        script.main(["0"])
    assert ended.value.code == 2
