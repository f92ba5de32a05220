"""`mechvlm study` stops with an exit code that tells why, and says how to go on."""

import errno
import os
import signal
from pathlib import Path

import pytest

from helpers.models import llava
from helpers.small_study import PROMPT, small  # noqa: F401  (a fixture)
from mechvlm import cli
from mechvlm.errors import StoppedError
from mechvlm.study import run
from mechvlm.study.running import shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, processor = llava(layers=2)
    path = tmp_path_factory.mktemp("model") / "a-llava"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def call(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


@pytest.mark.kills
@pytest.mark.parametrize(
    ("number", "code", "going_on"), [(signal.SIGINT, 130, []), (signal.SIGTERM, 143, ["--resume"])]
)
def test_a_signal_stops_it_and_says_how_to_go_on(capsys, folder, tmp_path, monkeypatch, number, code, going_on):
    monkeypatch.chdir(tmp_path)
    make = shards.make_shard

    def stop_at_second(plan, vlm, model, number_of, *rest):
        if number_of == 1:
            os.kill(os.getpid(), number)
        make(plan, vlm, model, number_of, *rest)

    options = ["study", "--model", folder, "--n", 5, "--batch-size", 2, "--prompt", PROMPT]
    with monkeypatch.context() as patch:
        patch.setattr("mechvlm.study.running.workers.make_shard", stop_at_second)
        got, printed, err = call(capsys, *options)
    assert got == code
    assert printed == ""
    command = f"mechvlm study --model {folder} --n 5 --batch-size 2 --prompt 'what is this' --out mechvlm-study"
    assert err.endswith(f"Stopped. What is done stays in mechvlm-study. Go on with:\n  {command}\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [p.name for p in Path("mechvlm-study/shards").iterdir()] == ["0-00000"]
    # With another seed it is another study: --resume refuses it, and without --resume it gets a
    # folder of its own. The same command goes on, with --resume or without.
    assert call(capsys, *options, "--resume", "--seed", 1)[0] == 1
    with monkeypatch.context() as patch:
        patch.setattr("mechvlm.study.running.workers.make_shard", stop_at_second)
        got, _, err = call(capsys, *options, "--seed", 1)
    assert got == code
    assert "Unfinished studies with other settings are here: mechvlm-study. This study goes to mechvlm-study-2." in err
    assert "--seed 1 --out mechvlm-study-2" in err
    assert [p.name for p in Path("mechvlm-study/shards").iterdir()] == ["0-00000"]
    got, printed, _ = call(capsys, *options, *going_on)
    assert got == 0
    assert "Open mechvlm-study/report.html" in printed
    got, printed, _ = call(capsys, *options, *going_on, "--seed", 1)
    assert (got, "Open mechvlm-study-2/report.html" in printed) == (0, True)
    got, printed, err = call(capsys, *options, "--resume")
    assert got == 1
    assert "There is no unfinished mechvlm-study here" in err
    got, printed, _ = call(capsys, *options, "--out", "mechvlm-study")
    assert got == 0
    assert "finished before" in printed
    got, printed, err = call(capsys, *options, "--out", "nothing", "--resume")
    assert got == 1
    assert "holds no study to go on with" in err
    got, printed, _ = call(capsys, *options)
    assert (got, "Open mechvlm-study-3/report.html" in printed) == (0, True)


@pytest.mark.long
def test_a_full_disk_is_3(capsys, monkeypatch, folder, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    command = ["study", "--model", folder, "--n", 2]
    with monkeypatch.context() as patch:
        patch.setattr("mechvlm.study.running.shards.write_folder", full)
        for out in ([], ["--out", "named"]):
            code, _, err = call(capsys, *command, *out)
            assert code == 3
            said = (
                f"What is done stays in {out[1] if out else 'mechvlm-study'}; if the disk is full, make room. The same"
            )
            assert (
                f"Error: The study stopped: [Errno 28] No space left on device. {said} command goes on from there."
                in err
            )
            assert "Traceback" not in err
        with pytest.raises(
            StoppedError, match=r"No space left on device. It was given no folder: nothing of it is kept"
        ):
            run([str(folder)], n=2)
    code, printed, _ = call(capsys, *command)
    assert (code, "Open mechvlm-study/report.html" in printed) == (0, True)
    assert [p.name for p in Path().glob("mechvlm-study*")] == ["mechvlm-study"]
