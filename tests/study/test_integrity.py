"""Damage in a study's folder is named, or changes nothing; parts of other studies are refused."""

import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from helpers.seals import seal_json, seal_shard, seal_study
from helpers.small_study import PROMPT, small, without_figures  # noqa: F401  (small is a fixture)
from mechvlm.datasets import Dataset, Example, fingerprint
from mechvlm.errors import InputError
from mechvlm.study import load, run
from mechvlm.study.running import runner, settings
from mechvlm.study.running.atomic import read_about, read_table
from mechvlm.study.running.resume import check_shards
from mechvlm.study.running.workspace import _is_finished

pytestmark = pytest.mark.long
TRIALS = 500


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return mv.load(*llava(layers=2))


@pytest.fixture(scope="module")
def data() -> Dataset:
    examples = tuple(Example(f"e{i}", noise_image(i), (f"a picture number {i} of a dog",)) for i in range(5))
    return Dataset("made", examples, (), fingerprint(examples))


def study(vlm, data, out, **options):
    return run([vlm], data, **{"prompt": PROMPT, "batch_size": 2, "out": out, **options})


def stop_before_the_results(stage, done, total):
    if stage == "tables":
        raise Stop


@pytest.fixture(scope="module")
def made(vlm, data, tmp_path_factory):
    """Two folders: of a study that stopped before its results, and of the same one finished.

    Beside them the plan, and the settings that settings.json holds.
    """
    home, kept = tmp_path_factory.mktemp("made"), {}
    with pytest.MonkeyPatch.context() as patch, without_figures():
        patch.setattr(settings, "EXAMPLES_PER_SHARD", 2)
        patch.setattr(runner, "check_shards", lambda plan: kept.update(plan=plan))
        with pytest.raises(Stop):
            study(vlm, data, home / "stopped", progress=stop_before_the_results)
        shutil.copytree(home / "stopped", home / "finished")
        shutil.rmtree(home / "finished" / "shards" / "0-gallery")
        study(vlm, data, home / "finished")
    return home / "stopped", home / "finished", kept["plan"], settings.read_settings(home / "stopped")


@pytest.fixture
def stopped(made, tmp_path) -> Path:
    return shutil.copytree(made[0], tmp_path / "stopped")


@pytest.fixture
def finished(made, tmp_path) -> Path:
    return shutil.copytree(made[1], tmp_path / "finished")


def tables(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "data").glob("*.parquet"))}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- one bit ---------------------------------------------------------------------------------------


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def opened_tables(folder: Path) -> dict[str, pd.DataFrame]:
    return mv.Study.open(folder).tables


def refusal(call, *arguments) -> tuple[str | None, Any]:
    """The message of the InputError that a call raised, or None and what it gave."""
    try:
        return None, call(*arguments)
    except InputError as error:
        return str(error), None


def is_read(path: Path) -> bool:
    """Whether `Study.open` reads the file."""
    inside = path.parent.name in ("data", "views") and path.suffix != ".txt"
    return inside or path.name in ("run.json", "skipped.csv")


def test_a_flipped_bit_in_a_finished_study_is_named_or_changes_nothing(finished, monkeypatch):
    """500 flips over all of its files; the error names the file, and what opens has its tables."""
    monkeypatch.setattr(load, "phases_of", lambda *_: None)  # fitted from the tables, in a second
    rng, refused = random.Random(TRIALS), 0
    expected = opened_tables(finished)
    paths = sorted(path for path in finished.rglob("*") if path.is_file() and path.stat().st_size)
    # Opening takes long where nothing is refused: so files that are not read get fewer flips.
    paths = [path for path in paths for _ in range(5 if is_read(path) else 1)]
    rng.shuffle(paths)
    for trial in range(TRIALS):
        path = paths[trial % len(paths)]
        before = path.read_bytes()
        flip(path, rng)
        said, actual = refusal(opened_tables, finished)
        if said is None:
            for name, table in actual.items():
                pd.testing.assert_frame_equal(table, expected[name])
            assert not is_read(path), f"{path} is read, and its flipped bit was not seen"
        else:
            assert str(path) in said or "newer mechvlm" in said
            refused += 1
        path.write_bytes(before)
    assert refused > TRIALS / 3


def test_a_flipped_bit_in_a_stopped_study_is_named_and_its_shard_goes(made, stopped):
    """500 flips over all of its files: the shard is named and deleted, so that it is made again."""
    _, _, plan, was = made
    plan = plan.__class__(**{**vars_of(plan), "folder": stopped / "shards"})
    rng = random.Random(TRIALS)
    # Galleries are made again in any case.
    paths = sorted(p for p in stopped.rglob("*") if p.is_file() and p.stat().st_size and p.parent.name != "0-gallery")
    assert len(paths) > 20
    for trial in range(TRIALS):
        path = paths[trial % len(paths)]
        before = path.read_bytes()
        flip(path, rng)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            refused, _ = refusal(lambda: (_is_finished(stopped, was), check_shards(plan)))
        if path.name == "settings.json":
            assert not said
            assert refused is None or "settings" in refused or "another version" in refused
        else:
            assert refused is None
            assert [str(path) in str(warning.message) for warning in said] == [True], path
            assert not path.parent.exists()
            shutil.copytree(made[0] / "shards" / path.parent.name, path.parent)
        path.write_bytes(before)


def vars_of(plan) -> dict:
    return {key: value for key, value in vars(plan).items() if key != "pairs"}


def test_a_shard_that_is_damaged_while_the_study_runs_is_named(made):
    path = made[0].parent / "later" / "0-00000"
    shutil.copytree(made[0] / "shards" / "0-00000", path)
    flip(path / "lens.parquet", random.Random(1))
    with pytest.raises(InputError, match=r"lens\.parquet is damaged \(its content does not match"):
        read_table(path, "lens")


# -- parts of others -------------------------------------------------------------------------------


def test_a_shard_of_another_study_is_refused_and_nothing_is_lost(vlm, data, made, stopped, tmp_path):
    """Of other settings, of other examples, and of another place in the same study."""
    with pytest.raises(Stop):
        study(vlm, data, tmp_path / "other", seed=1, progress=stop_before_the_results)
    own = stopped / "shards" / "0-00001"
    foreign = [
        (tmp_path / "other" / "shards" / "0-00001", {}, "settings"),
        (made[0] / "shards" / "0-00000", {}, "part and examples"),
        (made[0] / "shards" / "0-00001", {"examples": ["e2", "e4"]}, "examples"),
    ]
    for folder, changes, differ in foreign:
        shutil.rmtree(own)
        shutil.copytree(folder, own)
        seal_shard(own, **changes)
        before = contents(stopped)
        with pytest.raises(InputError, match=rf"0-00001 is of another study: its {differ} are not those of this one"):
            study(vlm, data, stopped)
        assert contents(stopped) == before
    shutil.rmtree(own)
    study(vlm, data, stopped)
    assert tables(stopped) == tables(made[1])


def test_pages_of_a_stopped_study_are_made_again(vlm, data, made, stopped):
    """A page runs scripts: one that somebody else's folder holds is never copied, even sealed."""
    gallery = stopped / "shards" / "0-gallery"
    views = pd.read_parquet(gallery / "views.parquet").assign(html="<script>alert(1)</script>")
    views.to_parquet(gallery / "views.parquet", index=False)
    seal_shard(gallery)
    study(vlm, data, stopped)
    pages = {path.name: path.read_text() for path in (stopped / "views").glob("*.html")}
    assert len(pages) == 5
    assert pages == {path.name: path.read_text() for path in (made[1] / "views").glob("*.html")}
    assert tables(stopped) == tables(made[1])


def test_stray_files_are_no_shards_and_stay(vlm, data, made, stopped):
    shards = stopped / "shards"
    flip(shards / "0-00001" / "about.json", random.Random(0))
    (shards / "notes.txt").write_text("mine")
    (shards / "0-00001-copy").mkdir()
    (shards / "0-00001-copy" / "about.json").write_text("{")
    with pytest.warns(UserWarning, match=r"0-00001.about\.json is damaged .* This part of the study is made again"):
        study(vlm, data, stopped)
    assert tables(stopped) == tables(made[1])
    assert contents(shards) == {"notes.txt": b"mine", "0-00001-copy/about.json": b"{"}
    study(vlm, data, stopped)  # finished, and opened again
    assert (shards / "notes.txt").is_file()


def test_a_link_loses_nothing_in_its_target(vlm, data, made, stopped, finished, tmp_path):
    """`shards`, a shard, and unfinished results that are links to somebody's folder."""
    target = tmp_path / "target"
    target.mkdir()
    for name in (".x.tmp", "0-00000", "kept.txt"):
        (target / name).write_text("kept")
    before = contents(target)
    shutil.move(stopped / "shards", tmp_path / "shards")
    (stopped / "shards").symlink_to(target)
    with pytest.raises(InputError, match=r"shards is a link to .*target, where a study would delete files"):
        study(vlm, data, stopped)
    (finished / "shards").symlink_to(target)
    study(vlm, data, finished)
    assert not (finished / "shards").is_symlink()
    (stopped / "shards").unlink()
    shutil.move(tmp_path / "shards", stopped / "shards")
    shutil.rmtree(stopped / "shards" / "0-00000")
    (stopped / "shards" / "0-00000").symlink_to(target)
    (stopped / ".results.tmp").symlink_to(target)
    (stopped / "data").symlink_to(target)
    with pytest.warns(UserWarning, match="0-00000 is no folder"):
        study(vlm, data, stopped)
    assert contents(target) == before
    assert tables(stopped) == tables(made[1])


def test_a_finished_study_is_given_where_nothing_can_be_written(vlm, data, finished, monkeypatch):
    def refuse(self, *_, **__):
        raise OSError(30, "Read-only file system", str(self))

    for method in ("unlink", "mkdir", "rmdir", "rename", "replace", "write_text", "touch"):
        monkeypatch.setattr(Path, method, refuse)
    assert len(study(vlm, data, finished).tables["lens"])


# -- finished studies ------------------------------------------------------------------------------


def test_settings_of_another_study_are_refused(vlm, data, finished):
    """With settings.json of seed 1 in a folder of seed 0, a study of seed 1 is not finished."""
    path = finished / "settings.json"
    text, seed_1 = re.subn(r'"seed": 0', '"seed": 1', path.read_text())
    assert seed_1 == 1
    path.write_text(text)
    with pytest.raises(InputError, match=r"settings\.json is not of the study that .*run\.json describes"):
        study(vlm, data, finished, seed=1)


def test_tables_of_another_study_are_refused(finished):
    """Sealed, but of other examples or states than run.json names."""
    path = finished / "data" / "lens.parquet"
    table = pd.read_parquet(path)
    renamed = table.replace({"example": {"e1": "e9"}})
    for wrong, message in (
        (renamed, "holds other examples of"),
        (table[table["state"] < 2], r"holds 2 states of .* counts 2 layers"),
        (table.assign(state="1"), "its column state holds .*string"),
        (table.assign(value="x"), "its column value holds .*string"),
        (table.assign(model=1), "its column model holds int64"),
    ):
        wrong.to_parquet(path, index=False)
        seal_study(finished)
        with pytest.raises(InputError, match=message):
            mv.Study.open(finished)


def test_a_table_that_run_json_does_not_name_is_not_read(finished):
    pd.DataFrame({"a": [1]}).to_parquet(finished / "data" / "more.parquet")
    assert "more" not in mv.Study.open(finished).tables
    seal_json(finished / "run.json", files={})
    with pytest.raises(InputError, match=r"skipped\.csv .*\(no checksum of it is recorded"):
        mv.Study.open(finished)


def test_compare_checks_the_folders_that_it_opens(finished):
    flip(finished / "data" / "baseline.parquet", random.Random(3))
    with pytest.raises(InputError, match=r"baseline\.parquet is missing or damaged \(its content does not match"):
        mv.compare([finished])


def test_a_folder_without_checksums_opens_with_a_line(finished):
    """A folder of an earlier version: no seal. One of today's that lost its seal is refused."""
    unsealed = re.sub(r',\s*"sha256": "\w{64}"\s*}\s*$', "}", (finished / "run.json").read_text())
    (finished / "run.json").write_text(unsealed)
    with pytest.raises(InputError, match="it carries no checksum"):
        mv.Study.open(finished)
    (finished / "run.json").write_text(unsealed.replace('"format": 3', '"format": 2'))
    with pytest.warns(UserWarning, match="of an earlier mechvlm, which wrote no checksums"):
        assert len(mv.Study.open(finished).tables["lens"])


def test_checksums_are_those_of_sha256sum(made):
    import hashlib
    import json

    _, finished, _, _ = made
    record = json.loads((finished / "run.json").read_text())
    paths = {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()}
    assert set(record["files"]) == paths - {"run.json", "settings.json"}
    for name, expected in record["files"].items():
        assert hashlib.sha256((finished / name).read_bytes()).hexdigest() == expected
    about = read_about(made[0] / "shards" / "0-00001")
    assert about["examples"] == ["e2", "e3"]
    assert about["settings"] == record["settings_digest"]
