"""The command line as its user sees it: exit codes, messages, files."""

import json
import re
import resource
import subprocess
import sys
from importlib.metadata import version

import pandas as pd
import pytest
import torch

import mechvlm as mv
from helpers.datasets import write_folder
from helpers.images import noise_image
from helpers.models import instructblip, llava
from helpers.patch_results import large_inputs
from mechvlm import bundled, cli, explore
from mechvlm.cli.console import free_name
from mechvlm.families.table import load_table


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both families as folders on disk."""
    paths = []
    for name, make in (("a-llava", llava), ("a-blip", instructblip)):
        model, processor = make()
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        paths.append(str(folder))
    return paths


def call(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.long
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
    # The paths in the record are those that were typed.
    assert record["settings"]["out"] == str(out)


# --- view ---


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a picture.png"
    noise_image(0).save(path)
    return path


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (0, []),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [(1, []), (0, ["--answer", "a red cat"]), (0, ["--no-answer"])]
        ),
    ],
)
def test_view_writes_the_patch_view_of_all_text_after_the_image(capsys, folders, picture, tmp_path, family, options):
    out = tmp_path / "page.html"
    code, printed, _ = call(
        capsys, "view", folders[family], picture, "--prompt", "what is this", "--k", 3, "--device", "cpu", "--dtype",
        "float32", "--out", out, *options,
    )  # fmt: skip
    assert code == 0
    vlm = mv.load(folders[family])
    inputs = vlm.inputs(picture, "what is this")
    text = [p for p in inputs.tokens.text.tolist() if p > inputs.tokens.image[0]]
    assert len(text) > 2
    if family == 0:
        assert len(text) < len(inputs.tokens.text), "text before the image cannot read it"
    answer = "" if options == ["--no-answer"] else "a red cat" if options else str(vlm.generate(inputs)[0])
    if options != ["--no-answer"]:
        inputs = inputs.answered("a red cat") if options else vlm.generate(inputs)[0].inputs
        text = sorted({*text, *inputs.tokens.writing.tolist()})
        assert text[-1] == inputs.tokens.last - 1, "what the answer's last token read wrote nothing of it"
    results = mv.read(
        vlm, inputs, mv.LogitLens(k=3), mv.NormAttention(dst=text), *([mv.QueryReading()] if family else [])
    )
    assert out.read_text(encoding="utf-8") == mv.view.patches(inputs, *results).html()
    *said, size = printed.splitlines()
    assert size.endswith(f"MB. Open {out}")
    assert said == ([f"Answer: {answer}"] if answer else [])


def test_a_view_of_an_answer_that_ended_at_once_is_of_the_prompt(capsys, folders, picture, tmp_path, monkeypatch):
    monkeypatch.setattr("mechvlm.explore.with_answer", lambda vlm, inputs, answer: inputs)
    code, printed, _ = call(capsys, "view", folders[0], picture, "--prompt", "a", "--out", tmp_path / "x.html")
    assert code == 0
    assert printed.startswith("Answer: none. The model ended it at once, and the page shows the prompt alone.\n")


@pytest.mark.long
def test_a_view_without_room_for_all_its_text_says_so(capsys, folders, picture, tmp_path, monkeypatch):
    vlm = mv.load(folders[0])
    inputs = vlm.inputs(picture, "what is this")
    text = inputs.tokens.text[inputs.tokens.text > inputs.tokens.image[0]]
    row_size = 4 * vlm.n_layers * vlm.n_heads * len(inputs.tokens)  # characters
    assert explore.destinations(vlm, inputs.tokens, room=3 * row_size + 1).tolist() == text[-3:].tolist()
    assert explore.destinations(vlm, inputs.tokens, room=0).tolist() == [inputs.tokens.last]
    monkeypatch.setattr(vlm, "n_layers", 32)
    monkeypatch.setattr(vlm, "n_heads", 32)
    tokens = large_inputs().tokens
    n_dest = [len(explore.destinations(vlm, tokens, room)) for room in (explore.PAGE_ROOM, explore.GALLERY_ROOM)]
    assert (n_dest, len(tokens.text)) == ([39, 7], 43), "at the size of 7B; four words stand before the image"
    monkeypatch.setattr("mechvlm.explore.destinations", lambda vlm, tokens, room=0: text if room else text[-2:])
    for option, which in (("--no-answer", "the prompt's last"), ("--answer=a cat", "the answer's before the prompt's")):
        code, printed, _ = call(
            capsys, "view", folders[0], picture, "--prompt", "what is this", "--out", tmp_path / f"{which}.html", option
        )
        assert code == 0
        assert f"2 of {len(text)} tokens can be picked, {which}; with all, the page would be too large." in printed


def test_view_of_several_images_and_of_no_prompt(capsys, folders, picture, tmp_path):
    other = tmp_path / "other.png"
    noise_image(1).save(other)
    out = tmp_path / "page.html"
    code, printed, _ = call(capsys, "view", folders[0], picture, other, "--no-answer", "--k", 1, "--out", out)
    assert code == 0
    assert printed.startswith("Asked: Describe the scene. (--prompt asks something else)\n")
    vlm = mv.load(folders[0])
    inputs = vlm.inputs([[picture, other]], "Describe the scene.")
    assert len(inputs.images[0]) == 2
    dest = explore.destinations(vlm, inputs.tokens)
    assert out.read_text(encoding="utf-8") == explore.patch_view(vlm, inputs, dest, 1).html()
    code, _, err = call(capsys, "view", folders[0], picture, "gone.png", "--out", tmp_path / "x.html")
    assert code == 1
    assert "No image at gone.png" in err


def test_view_without_out_writes_over_nothing(capsys, folders, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "view.html").write_text("mine")
    for expected in ("view-2.html", "view-3.html"):
        code, printed, _ = call(capsys, "view", folders[0], picture, "--prompt", "a")
        assert code == 0
        assert f"Open {expected}" in printed
    assert (tmp_path / "view.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "gone.png"], "Error: No image at gone.png: there is no such file."),
        (["MODEL", "."], "it is a folder"),
        (["MODEL", "https://somewhere.example/a.png"], "is an address: fetch it first"),
        (["MODEL", "TEXT"], "cannot be read"),
        (["tiny-lava", "IMAGE"], "Did you mean tiny-llava?"),
        (
            ["notes.png", "MODEL"],
            "Error: notes.png is a file, and no model. The model comes first: mechvlm view MODEL IMAGE",
        ),
        (["MODEL", "IMAGE", "--device", "abacus"], "cannot be put on the device 'abacus'"),
        (["MODEL", "IMAGE", "--dtype", "float33"], "Error: There is no dtype 'float33'"),
        (["MODEL", "IMAGE", "--prompt", "word " * 3000], "leaves no room"),
        (["MODEL", "IMAGE", "--answer", " "], "Error: --answer is empty. Give the words to read"),
        (["MODEL", "IMAGE", "--answer", "word " * 3000], "leaves no room"),
        (["MODEL", "IMAGE", "--out", "nowhere/view.html"], "Error: The folder nowhere is not there. Make it first"),
        (["MODEL", "IMAGE", "--out", "there.html"], "Error: there.html is there already, and is not written over"),
        (["MODEL", "IMAGE", "--out", "."], "Error: . is a folder"),
        (["MODEL", "IMAGE", "--out", "/proc/view.html"], "Error: Nothing can be written to /proc/view.html"),
    ],
)
def test_a_view_that_cannot_be_made_gives_one_message(
    capsys, folders, picture, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "there.html").write_text("keep")
    before = sorted(tmp_path.iterdir())
    names = {"MODEL": folders[0], "IMAGE": picture, "TEXT": "notes.png"}
    prompt = [] if "--prompt" in arguments else ["--prompt", "what is this"]
    code, printed, err = call(capsys, "view", *(names.get(a, a) for a in arguments), *prompt)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert printed == ""
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.html").read_text() == "keep"


def test_errors_come_before_the_model_is_loaded(capsys, picture, tmp_path, monkeypatch):
    monkeypatch.setattr("mechvlm.vlm.loading.load", lambda *_, **__: pytest.fail("the model was loaded"))
    for wrong in (
        ["gone.png"],
        [picture, "--out", tmp_path],
        [picture, "--device", "abacus"],
        [picture, "--answer", ""],
    ):
        assert call(capsys, "view", "tiny-llava", *wrong, "--prompt", "a")[0] == 1


def test_a_folder_of_images(capsys, folders, tmp_path, undrawn):
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
        (["--device", "abacus"], "cannot be put on the device 'abacus'"),
        (["--out", "/proc/nothing"], "Error: Nothing can be written to /proc/nothing"),
        (["--model", "MODEL", "--model", "MODEL"], "Error: Give one or more models, each once"),
        (["--model", "MODEL", "--dtype", "float33"], "Error: There is no dtype 'float33'"),
        (["--model", "MODEL", "--prompt", "word " * 3000], "leaves no room"),
        (["--model", "EMPTY"], "holds no config.json"),
    ],
)
def test_a_study_that_cannot_be_run_gives_one_message(capsys, folders, tmp_path, arguments, message):
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["study", "--n", "many"], ["study", "--colour"], ["studdy"], ["view", "tiny-llava"],
        ["view", "tiny-llava", "--prompt", "a"], ["view", "tiny-llava", "a.png", "--prompt", "a", "--k", "0"],
        ["view", "tiny-llava", "a.png", "--prompt", "a", "--no-answer", "--answer", "a"],
    ],
)  # fmt: skip
def test_usage(capsys, arguments):
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert err.startswith("usage: mechvlm")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["study", "--modle", "tiny-llava"], "unrecognized arguments: --modle tiny-llava. Did you mean --model?"),
        (["study", "--datset=scenes"], "unrecognized arguments: --datset=scenes. Did you mean --dataset?"),
        (["view", "tiny-llava", "a.png", "--pompt", "a"], "unrecognized arguments: --pompt a. Did you mean --prompt?"),
        (["models", "extra"], "unrecognized arguments: extra\n"),
        (["study", "--workers", "2"], "need a Ray cluster"),
    ],
)
def test_wrong_options_show_the_commands_own_usage(capsys, arguments, said):
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert err.startswith(f"usage: mechvlm {arguments[0]} ")
    assert said in err


def test_the_version_is_the_packages(capsys):
    assert call(capsys, "--version") == (0, f"mechvlm {mv.__version__}\n", "")
    assert mv.__version__ == version("mechvlm")


def test_no_command_shows_the_help(capsys):
    code, out, _ = call(capsys)
    assert code == 2
    assert "study" in out


def test_without_out_no_study_is_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_name("s") == "s"
    (tmp_path / "s").mkdir()
    assert free_name("s") == "s", "an empty folder is free"
    (tmp_path / "s" / "run.json").touch()
    (tmp_path / "s-2").touch()
    assert free_name("s") == "s-3"


def test_an_interrupt_is_130(capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mechvlm.study.run", stop)
    code, _, err = call(capsys, "study")
    assert code == 130
    assert "Stopped." in err
    assert "Traceback" not in err


def test_a_bug_shows_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("mechvlm.study.run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["study"])


def test_too_little_memory_says_what_to_try(capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mechvlm.study.run", fail)
    code, _, err = call(capsys, "study")
    assert code == 1
    assert "--batch-size" in err


def test_models_lists_models_and_classes(capsys):
    code, out, _ = call(capsys, "models")
    assert code == 0
    for name in (*bundled.NAMES, *load_table(), "Llava ", "InstructBlip "):
        assert name in out


def test_in_a_terminal_of_80_columns_no_line_is_wider(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call(capsys, "models")
    assert max(map(len, out.split("\n"))) <= 80
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    _, file, _ = call(capsys, "models")
    assert out.split() == file.split(), "the same words; in a file each entry is one line"
    assert max(map(len, file.split("\n"))) > 80


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("study", ["model", "dataset", "prompt", "n", "seed", "device", "dtype", "batch-size", "out", "resume"]),
        ("view", ["prompt", "answer", "no-answer", "k", "device", "dtype", "out"]),
    ],
)
def test_help_needs_no_torch(command, options):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"import sys; from mechvlm import cli\ntry: cli.main(['{command}', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in options:
        assert re.search(f"--{option}[ \n]", done.stdout)
    # The aim is one second; slow machines may take three. Counted is the processor's time, since
    # other tests run beside this one.
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.long
def test_images_may_be_odd(capsys, folders, tmp_path):
    """Grey images, palettes with transparency, and single pixels are read."""
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
