"""Text and paths of others: escapes are written out, and names stay in their folder."""

import json
import os
import shutil
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechvlm import bundled
from mechvlm.cli import main
from mechvlm.errors import InputError
from mechvlm.outside.files import file_inside, printable, require_regular
from mechvlm.progress import StatusLine

ESCAPE = "\x1b]0;mine\x07\x1b[2J\x9b31m\u202egnp\r"


def test_what_acts_on_a_terminal_is_written_out():
    assert printable(ESCAPE) == r"\x1b]0;mine\x07\x1b[2J\x9b31m\u202egnp\r"
    assert printable("two lines\n\tand é 猫 🐈") == "two lines\n\tand é 猫 🐈"


@given(st.text())
def test_nothing_else_is_left(text):
    shown = printable(text)
    assert all(character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs") for character in shown)
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not turning & {unicodedata.bidirectional(character) for character in shown}
    assert printable(shown) == shown


def acts(text: str) -> bool:
    return any(character in text for character in "\x1b\x07\x9b\u202e\r")


def test_commands_print_no_escapes(tmp_path, capfd):
    """Of settings and models of somebody else."""
    study, model = tmp_path / "study", tmp_path / "model"
    study.mkdir()
    settings = {"format": 2, "models": [ESCAPE], "prompt": ESCAPE, "seed": ESCAPE, "dataset": {"name": ESCAPE}}
    (study / "settings.json").write_text(json.dumps(settings))
    assert main(["study", "--model", "tiny-llava", "--n", "1", "--out", str(study)]) == 1
    shutil.copytree(bundled.path("tiny-llava"), model)
    config = json.loads((model / "config.json").read_text())
    for change in ({"architectures": [ESCAPE]}, {"model_type": ESCAPE}, {"attn_implementation": f"a/{ESCAPE}"}):
        (model / "config.json").write_text(json.dumps(config | change))
        assert main(["check", str(model)]) == 1
    assert main(["view", str(tmp_path / ESCAPE), "a.jpg", "--prompt", "x"]) == 1
    written = capfd.readouterr()
    assert r"\x1b" in written.err
    assert not acts((written.out + written.err).replace("\r\n", "\n"))


def test_lines_of_progress_hold_no_escapes(capfd):
    with StatusLine(ESCAPE) as line:
        line.update(f"job {ESCAPE}", also_print=True)
        assert not acts(str(line._line.tasks[0].description))
    assert not acts(capfd.readouterr().err)


@pytest.mark.parametrize(
    "name",
    [
        "../a", "sub/../../a", "/etc/passwd", "C:\\a", "C:a", "\\\\host\\share\\a", "\\a", "sub\\..\\..\\a", "", "sub", "link",
        "far/passwd", "pipe", "gone", "a\0b", "a" * 5000, 7, None, ["a"],
    ],
)  # fmt: skip
def test_no_name_leads_out_of_its_folder(tmp_path, name):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "a").write_text("outside")
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "far").symlink_to("/etc")
    os.mkfifo(folder / "pipe")
    with pytest.raises(InputError):
        file_inside(folder, name)


def test_files_of_the_folder_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.html").write_text("x")
    (tmp_path / "near").symlink_to(tmp_path / "sub" / "a.html")
    assert file_inside(tmp_path, "sub/a.html") == tmp_path / "sub" / "a.html"
    assert file_inside(tmp_path, "near").read_text() == "x"


def test_special_and_large_files(tmp_path):
    (tmp_path / "a").write_bytes(bytes(11))
    require_regular(tmp_path / "a", 11, "files")
    for path, reason in (
        (tmp_path / "a", "at most 0.0 MB are read"),
        ("/dev/zero", "not a regular file"),
        (tmp_path, "not a"),
    ):
        with pytest.raises(InputError, match=reason):
            require_regular(type(tmp_path)(path), 10, "files")
