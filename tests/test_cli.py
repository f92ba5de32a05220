"""The command line as its user sees it: exit codes, plain messages, the folder."""

import json
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import noise_image
from models import instructblip, llava
from test_datasets import write_folder

from mechvlm import bundled, cli


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both families as folders on disk."""
    made = []
    for name, make in (("a-llava", llava), ("a-blip", instructblip)):
        model, processor = make()
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        made.append(str(folder))
    return made


def call(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_study_of_two_folders(capsys, folders, tmp_path):
    out = tmp_path / "out"
    code, printed, bars = call(
        capsys, "study", "--model", folders[0], "--model", folders[1], "--n", 4, "--seed", 3, "--batch-size", 3,
        "--prompt", "what is this", "--dtype", "float32", "--device", "cpu", "--dataset", "scenes", "--out", out,
    )  # fmt: skip
    assert code == 0
    assert "a-llava" in printed.replace("\n", "")
    assert str(out / "report.html") in printed
    assert "reading" in bars
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["models"] == folders
    assert (record["seed"], record["settings"]["batch_size"], record["settings"]["prompt"]) == (3, 3, "what is this")
    assert all(len(about["sha256"]) == 64 for about in record["models"].values())
    assert (out / "report.html").is_file()
    # The models were not installed under these names: no path but the one that was typed.
    assert record["settings"]["out"] == str(out)


def test_a_folder_of_images(capsys, folders, tmp_path):
    lines = [{"image": f"{i}.png", "captions": [f"number {i} of a dog"]} for i in range(3)]
    spec = write_folder(tmp_path / "d", [*lines, "{"], ["0.png", "1.png"])
    (tmp_path / "d" / "2.png").write_text("no picture")
    code, printed, _ = call(
        capsys, "study", "--model", folders[0], "--dataset", spec, "--out", tmp_path / "out", "--n", 9
    )
    assert code == 0
    assert "2 set aside" in printed
    assert len(pd.read_csv(tmp_path / "out" / "skipped.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "coco"], "Error: There is no data set 'coco'. Known: scenes"),
        (["--dataset", "folder:/not/there"], "Error: /not/there is not there"),
        (["--n", 0], "Error: 0 examples were asked for"),
        (["--batch-size", 0], "Error: A batch of 0"),
        (["--device", "abacus"], "Error: The device 'abacus' cannot be used"),
        (["--out", "/proc/nothing"], "Error: Nothing can be written to /proc/nothing"),
        (["--model", "MODEL", "--model", "MODEL"], "Error: Give one or more models, each once"),
        (["--model", "MODEL", "--dtype", "float33"], "Error: There is no dtype 'float33'"),
        (["--model", "MODEL", "--prompt", "word " * 3000], "leaves no room"),
        (["--model", "EMPTY"], "holds no config.json"),
    ],
)
def test_what_cannot_be_used_is_one_message(capsys, folders, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    names = {"MODEL": folders[0], "EMPTY": tmp_path / "empty"}
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    code, _, err = call(capsys, "study", *(names.get(a, a) for a in arguments), *out)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_left_alone(capsys, folders, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    code, _, err = call(capsys, "study", "--model", folders[0], "--out", tmp_path)
    assert code == 1
    assert "is not empty" in err


@pytest.mark.parametrize("arguments", [["study", "--n", "many"], ["study", "--colour"], ["studdy"]])
def test_usage(capsys, arguments):
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert err.startswith("usage: mechvlm")


def test_no_command_shows_the_help(capsys):
    code, out, _ = call(capsys)
    assert code == 2
    assert "study" in out


def test_without_out_no_study_is_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli._free("s") == "s"
    (tmp_path / "s").mkdir()
    assert cli._free("s") == "s", "an empty folder will do"
    (tmp_path / "s" / "run.json").touch()
    (tmp_path / "s-2").touch()
    assert cli._free("s") == "s-3"


def test_an_interrupt_is_130(capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mechvlm.study.run", stop)
    code, _, err = call(capsys, "study")
    assert code == 130
    assert "Stopped." in err
    assert "Traceback" not in err


def test_a_bug_is_not_dressed_up(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("mechvlm.study.run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["study"])


def test_too_little_memory_says_what_to_try(capsys, monkeypatch):
    import torch

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mechvlm.study.run", fail)
    code, _, err = call(capsys, "study")
    assert code == 1
    assert "--batch-size" in err


def test_models_lists_what_there_is(capsys):
    code, out, _ = call(capsys, "models")
    assert code == 0
    for name in (*bundled.NAMES, "LlavaForConditionalGeneration", "InstructBlipForConditionalGeneration"):
        assert name in out


def test_help_needs_no_torch():
    started = time.perf_counter()
    code = "import sys; from mechvlm import cli\ntry: cli.main(['study', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in ("model", "dataset", "prompt", "n", "seed", "device", "dtype", "batch-size", "out"):
        assert f"--{option} " in done.stdout
    # A second is the aim; slow machines get some more.
    assert time.perf_counter() - started < 3


def test_images_may_be_odd(capsys, folders, tmp_path):
    """Grey, palette with transparency, and one pixel: all are pictures."""
    folder = tmp_path / "d"
    folder.mkdir()
    noise_image(0).convert("L").save(folder / "grey.png")
    noise_image(1).convert("P").save(folder / "palette.gif")
    noise_image(2, (1, 1)).save(folder / "dot.png")
    names = ["grey.png", "palette.gif", "dot.png"]
    spec = write_folder(folder, [{"image": n, "caption": "a dog"} for n in names])
    code, printed, _ = call(capsys, "study", "--model", folders[1], "--dataset", spec, "--out", tmp_path / "out")
    assert code == 0
    assert "set aside" not in printed
