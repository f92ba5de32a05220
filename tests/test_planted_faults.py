"""The lists of planted faults are true; the runner tells a caught fault from a survivor."""

import subprocess
import sys
from pathlib import Path

import pytest

import mechvlm

sys.path.insert(0, str(Path(mechvlm.__file__).parents[1] / "scripts"))

import planted_faults
from planted_faults import ROOT, read_lists, stale

SCRIPTS = ROOT / "scripts"


def test_every_text_stands_in_its_file_once():
    assert stale(read_lists(ROOT), ROOT) == []


LIST = """
tests = ["tests/test_sums.py"]
[[fault]]
name = "caught"
file = "toy/sums.py"
text = "a + b"
into = "a - b"
breaks = "sums"
[[fault]]
name = "survives"
file = "toy/sums.py"
text = "2 * a"
into = "3 * a"
breaks = "what no test looks at"
"""


@pytest.fixture
def toy(tmp_path):
    """A repository with one package, one test, and a list of two faults."""
    for name, text in {
        "toy/__init__.py": "",
        "toy/sums.py": "def add(a, b):\n    return a + b\n\n\ndef twice(a):\n    return 2 * a\n",
        "tests/test_sums.py": "from toy.sums import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n",
        "scripts/planted_faults/sums.toml": LIST,
        "pyproject.toml": "[tool.pytest.ini_options]\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(toy: Path, *options: str) -> tuple[int, str]:
    """The runner in a process of its own: it forks, and must not have loaded the package."""
    code = "import sys, planted_faults as p; p.PRELOADED = (); sys.exit(p.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--root", str(toy), *options], cwd=SCRIPTS, capture_output=True, text=True
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.long
def test_one_fault_is_caught_and_one_survives(toy):
    before = {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()}
    code, said = run(toy, "--jobs", "2")
    outcomes = {line.split("sums/")[1].split(":")[0]: line.split()[0] for line in said.splitlines() if "sums/" in line}
    assert outcomes == {"caught": "caught", "survives": "SURVIVED"}
    assert said.splitlines()[-2:] == [f"{name:16}    1 of    2 caught, 50.0%" for name in ("sums", "total")]
    assert code == 1, "below the bar"
    assert all(path.read_bytes() == content for path, content in before.items()), "faults are planted in copies"
    code, said = run(toy, "--only", "caught")
    assert code == 0
    assert "1 of    1 caught, 100.0%" in said


def test_a_fault_that_is_no_longer_there_is_named(toy):
    (toy / "toy" / "sums.py").write_text("def add(a, b):\n    return a + b + (a + b)\n")
    code, said = run(toy)
    assert code == 1
    assert "sums/caught: 'a + b' stands 2 times in toy/sums.py, not once." in said
    assert "sums/survives: '2 * a' stands 0 times in toy/sums.py, not once." in said


def test_a_test_that_fails_anyway_catches_nothing(toy):
    (toy / "tests" / "test_sums.py").write_text("def test_add():\n    assert False, 'as ever'\n")
    code, said = run(toy)
    assert code == 1
    assert "tests/test_sums.py does not pass without a fault" in said
    assert "as ever" in said


@pytest.mark.long
def test_a_fault_in_a_script_is_run_from_its_copy(toy):
    """Tests import a script by its own name, and a package's file with the package."""
    for name, text in {
        "scripts/steps/half.py": "def half(a):\n    return a / 2\n",
        "tests/test_half.py": (
            "import pathlib\nimport sys\n\nimport toy\n\n"
            'sys.path.insert(0, str(pathlib.Path(toy.__file__).parents[1] / "scripts" / "steps"))\n'
            "import half\n\n\ndef test_half():\n    assert half.half(4) == 2\n"
        ),
        "scripts/planted_faults/steps.toml": LIST.split("[[fault]]")[0].replace("sums", "half")
        + '[[fault]]\nname = "third"\nfile = "scripts/steps/half.py"\ntext = "a / 2"\ninto = "a / 3"\nbreaks = "halves"\n',
    }.items():
        (toy / name).parent.mkdir(exist_ok=True)
        (toy / name).write_text(text)
    modules = {fault.name: fault.module for fault in read_lists(toy)}
    assert modules == {"caught": "toy", "survives": "toy", "third": "half"}
    code, said = run(toy, "--only", "third")
    assert code == 0, said
    assert "1 of    1 caught, 100.0%" in said


def test_bad_lists_are_named(toy):
    lists = toy / "scripts" / "planted_faults"
    (lists / "more.toml").write_text(LIST)
    with pytest.raises(ValueError, match="used twice: caught, survives"):
        read_lists(toy)
    (lists / "more.toml").write_text(LIST.replace('into = "a - b"', "").replace("caught", "lacks"))
    with pytest.raises(ValueError, match=r"more\.toml: lacks has the keys tests, name, file, text, breaks"):
        read_lists(toy)


def test_a_trial_without_end_is_stopped(toy):
    (toy / "tests" / "test_sums.py").write_text("import time\n\n\ndef test_add():\n    time.sleep(60)\n")
    fault = read_lists(toy)[0]
    code = (
        "import sys, pathlib, planted_faults as p; root = pathlib.Path(sys.argv[1]); "
        "print([t.outcome for t in p.trials(p.read_lists(root)[:1], root, 1, seconds=0.5)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(toy)], cwd=SCRIPTS, capture_output=True, text=True, timeout=30
    )
    assert done.stdout.strip() == str([planted_faults.OVERTIME]), fault.name
