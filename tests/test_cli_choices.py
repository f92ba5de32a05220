"""What the commands pass on, which folder a study goes to, and what their help promises."""

import argparse
import json
import os
import re
import signal
from pathlib import Path

import pytest

from mechvlm import bundled, cli
from mechvlm.cli.options import DEFAULT_OUT, parser
from mechvlm.experiments.winoground import PROMPT


@pytest.fixture
def runs(monkeypatch, tmp_path) -> list[tuple]:
    """(models, data set, options) of each study that the command would run."""
    calls: list[tuple] = []
    monkeypatch.setattr(
        "mechvlm.study.run", lambda models, dataset, **options: calls.append((models, dataset, options))
    )
    monkeypatch.setattr("mechvlm.study.report.terminal.print_summary", lambda study: None)
    monkeypatch.chdir(tmp_path)
    return calls


def test_every_option_reaches_the_study(runs):
    typed = (
        "study --model a --model b --dataset coco:here --prompt Why --n 7 --seed 3 --device cpu --dtype bfloat16 --remote "
        "--batch-size 5 --out there --ray auto --workers 2 --gpus-per-worker 0.5"
    )  # fmt: skip
    assert cli.main(typed.split()) == 0
    ((models, dataset, options),) = runs
    del options["progress"]
    assert (models, dataset) == (["a", "b"], "coco:here")
    assert options == {
        "n": 7, "seed": 3, "prompt": "Why", "device": "cpu", "dtype": "bfloat16", "device_map": None, "remote": True,
        "batch_size": 5, "out": "there", "ray": "auto", "workers": 2, "gpus_per_worker": 0.5, "answers": False,
    }  # fmt: skip
    assert cli.main(["study", "--device-map", "auto"]) == 0
    models, dataset, options = runs[-1]
    del options["progress"]
    assert (models, dataset) == (bundled.NAMES, "scenes")
    assert options == {
        "n": None, "seed": 0, "prompt": PROMPT, "device": None, "dtype": None, "device_map": "auto", "remote": False,
        "batch_size": 16, "out": DEFAULT_OUT, "ray": None, "workers": None, "gpus_per_worker": None, "answers": False,
    }  # fmt: skip


def begin(folder: Path, age: float, seed: int = 0, finished: bool = False) -> None:
    """A study that was begun, and perhaps finished, `age` seconds ago."""
    folder.mkdir()
    settings = {"models": list(bundled.NAMES), "prompt": PROMPT, "seed": seed, "dtype": None, "batch_size": 16}
    file = folder / "settings.json"
    file.write_text(json.dumps({**settings, "dataset": {"name": "scenes", "n": 200}}))
    if finished:
        (folder / "run.json").write_text("{}")
    os.utime(file, (1e9 - age, 1e9 - age))


def test_the_latest_unfinished_study_with_the_same_settings_goes_on(runs, tmp_path, capsys):
    begin(tmp_path / DEFAULT_OUT, age=30)
    begin(tmp_path / f"{DEFAULT_OUT}-2", age=10)
    begin(tmp_path / f"{DEFAULT_OUT}-3", age=20)
    begin(tmp_path / f"{DEFAULT_OUT}-4", age=5, finished=True)
    begin(tmp_path / f"{DEFAULT_OUT}-5", age=0, seed=1)
    for typed, folder in (
        ([], "-2"), (["--resume"], "-2"), (["--seed", "1"], "-5"), (["--seed", "2"], "-6"), (["--n", "3"], "-6"),
        (["--seed", "2", "--resume"], "-5"),  # which names what differs
    ):  # fmt: skip
        assert cli.main(["study", *typed]) == 0
        assert runs[-1][2]["out"] == f"{DEFAULT_OUT}{folder}", typed
    assert f"This study goes to {DEFAULT_OUT}-6." in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("named", [True, False])
def test_a_stopped_study_says_by_what_and_how_to_go_on(runs, tmp_path, capsys, monkeypatch, number, code, named):
    def stop(*_, out, **__):
        begin(Path(out), age=0)
        os.kill(os.getpid(), number)
        os.getpid()  # the handler runs before the next step

    monkeypatch.setattr("mechvlm.study.run", stop)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    out = ["--out", "my studies"] if named else []
    assert cli.main(["study", "--n", "3", *out]) == code
    folder, command = ("my studies", "--out 'my studies'") if named else (DEFAULT_OUT, f"--out {DEFAULT_OUT}")
    said = f"Stopped. What is done stays in {folder}. Go on with:\n  mechvlm study --n 3 {command}\n"
    assert capsys.readouterr().err.endswith(said)
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers


def options_of(command: str) -> list[argparse.Action]:
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[command]._actions


@pytest.mark.parametrize("command", ["study", "view", "check"])
def test_the_defaults_are_those_that_the_help_names(command):
    numbers = {}
    for option in options_of(command):
        if found := re.search(r"\(default: (\d+)\)", option.help or ""):
            numbers[option.dest] = int(found[1])
            assert option.default == numbers[option.dest], option.dest
    assert numbers == {"study": {"seed": 0, "batch_size": 16}, "view": {"k": 5}, "check": {}}[command]


def test_models_have_their_sizes(capsys):
    assert cli.main(["models"]) == 0
    listed = dict(re.findall(r"^  (\S+) +([\d.]+) MB$", capsys.readouterr().out, re.MULTILINE))
    for name in bundled.NAMES:
        size = sum(os.path.getsize(f) for f in bundled.path(name).rglob("*") if f.is_file())
        assert float(listed[name]) == pytest.approx(size / 1_000_000, abs=0.051)
        assert size > 1e6
