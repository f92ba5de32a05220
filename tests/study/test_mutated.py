"""Files of a study that somebody has changed open rightly, or raise InputError; quickly, in 1 GB.

Changed files are sealed again, so that a checksum is not what refuses them.
"""

import copy
import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import mechvlm as mv
from helpers.bounds import GIGABYTE, within
from helpers.seals import seal_json, seal_shard, seal_study
from helpers.studies import made_study
from mechvlm.errors import InputError
from mechvlm.study import load
from mechvlm.study.load import COLUMNS
from mechvlm.study.parquet import MOST_TABLE_ROWS
from mechvlm.study.running.atomic import read_about, read_table, write_folder
from mechvlm.study.running.settings import differences, read_settings, was_begun_with
from mechvlm.study.save import encode_png, run_record

pytestmark = pytest.mark.long

EXAMPLES = [pytest.param(6, id="sample"), pytest.param(60, marks=pytest.mark.long, id="all")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a small study with one picture in its gallery."""
    study, folder = made_study({"m": 3}, n=3), tmp_path_factory.mktemp("whole")
    for name in ("data", "views"):
        (folder / name).mkdir()
    png = encode_png(Image.new("RGB", (8, 8), "red"))
    gallery = pd.DataFrame(
        [["m", "e000", ["a cat"], png, png, "cat", 1, "views/01-m.html"]], columns=COLUMNS["gallery"]
    )
    tables = {name: study.tables.get(name, pd.DataFrame(columns=columns)) for name, columns in COLUMNS.items()}
    for name, table in (tables | {"gallery": gallery}).items():
        table.to_parquet(folder / ("views" if name == "gallery" else "data") / f"{name}.parquet", index=False)
    (folder / "views" / "01-m.html").write_text("<p>a page</p>")
    study.skipped.to_csv(folder / "skipped.csv", index=False)
    (folder / "run.json").write_text(json.dumps(run_record(study)))
    seal_study(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def opens(folder: Path) -> bool:
    """Whether a folder opens and can be used; no error but InputError comes of it."""
    with within():
        try:
            study = mv.Study.open(folder)
        except InputError:
            return False
        study.summary()
        study.curves()
        mv.compare([study])
    return True


def fuzz(n: int, *strategies):
    """Run a function on `n` drawn values, always the same ones."""
    every = list(HealthCheck)
    return lambda function: settings(
        max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=every
    )(given(*strategies)(function))()


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.sampled_from([float("inf"), -1, 0, 10**9, "9", "../../etc/passwd", "\x1b[2J", [], {}, [[]], {"a": {}}, "x" * 10_000]),
    st.recursive(st.none() | st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=20),
)  # fmt: skip


def places(content) -> list[tuple]:
    """The path of every value in nested JSON."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [(key, *rest) for key, value in items for rest in [(), *places(value)]]


@st.composite
def mutated(draw, content) -> dict:
    """The JSON with one to three of its values replaced, deleted, or of an added key."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(content) or [("a",)]))
        holder = content
        for key in path:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if kind == "delete" and last in (holder if isinstance(holder, dict) else range(len(holder))):
            del holder[last]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = draw(ODD)
        else:
            holder[last] = draw(ODD)
    return content


@pytest.mark.parametrize("n", EXAMPLES)
def test_a_changed_run_json_opens_rightly_or_is_refused(folder, n, monkeypatch):
    path, opened = folder / "run.json", []
    record = json.loads(path.read_text())
    monkeypatch.setattr(load, "phases_of", load.phases_of if n > 10 else lambda *_: None)

    @fuzz(n, mutated({key: value for key, value in record.items() if key not in ("sha256", "files")}))
    def _(changed):
        path.write_text(json.dumps(changed))
        seal_json(path, files=record["files"])
        opened.append(opens(folder))

    assert 0 < sum(opened) < len(opened)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The bytes with a few of them changed, a part cut out, or one repeated."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        kind = draw(st.sampled_from(["set", "set", "cut", "repeat", "end"]))
        length = draw(st.integers(1, 40))
        if kind == "set" and changed:
            changed[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del changed[at : at + length]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + length] * draw(st.integers(1, 50))
        else:
            changed = changed[:at]
    return bytes(changed)


@pytest.mark.parametrize("n", EXAMPLES)
@pytest.mark.parametrize("name", ["data/contextualization.parquet", "views/gallery.parquet", "skipped.csv", "run.json"])
def test_a_file_with_other_bytes_opens_rightly_or_is_refused(folder, n, name, monkeypatch):
    monkeypatch.setattr(load, "phases_of", load.phases_of if n > 10 else lambda *_: None)
    path = folder / name

    @fuzz(n, damaged(path.read_bytes()))
    def _(content):
        path.write_bytes(content)
        if name != "run.json":
            seal_study(folder)
        opens(folder)


@pytest.mark.parametrize("n", EXAMPLES)
def test_a_changed_settings_json_is_compared_or_refused(tmp_path, n):
    was = {"format": 3, "models": ["m"], "weights": {"m": {"class": "L"}}, "dataset": {"name": "s", "n": 3}, "seed": 0}

    @fuzz(n, mutated(was))
    def _(changed):
        (tmp_path / "settings.json").write_text(json.dumps(changed))
        with within():
            assert isinstance(was_begun_with(tmp_path, "s", 3, {"seed": 0}), bool)
            differ = differences(read_settings(tmp_path), was)
        assert differ or all(changed[key] == was[key] for key in ("format", "models", "weights", "seed"))
        assert differ or changed["dataset"]["n"] == 3


ABOUT = {
    "part": "0-00000", "settings": "", "examples": ["a"], "read": 1, "first": ["a"], "halved": [], "seconds": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("n", EXAMPLES)
def test_a_changed_about_json_is_read_or_refused(tmp_path, n):
    shard = tmp_path / "0-00000"
    write_folder(shard, {"lens": pa.table({"state": [1, 2]})}, ABOUT)
    content = json.loads((shard / "about.json").read_text())
    files, read = content.pop("files"), 0

    @fuzz(n, mutated(content | {"files": files}))
    def _(changed):
        nonlocal read
        changed.pop("sha256", None)
        (shard / "about.json").write_text(json.dumps(changed))
        seal_json(shard / "about.json")
        try:
            with within():
                about = read_about(shard)
                table = read_table(shard, "lens")
        except InputError:
            return
        read += 1
        assert isinstance(about["read"], int)
        assert table.to_pydict() == {"state": [1, 2]}

    assert read or n < 10


# -- what would fill the memory --------------------------------------------------------------------


def test_a_table_of_more_rows_than_its_study_has_is_not_read(folder):
    path = folder / "data" / "words.parquet"
    million = pa.table({"state": pa.array([1] * 1_000_000, pa.int8())})
    with pq.ParquetWriter(path, million.schema) as writer:
        for _ in range(MOST_TABLE_ROWS // 1_000_000 + 1):
            writer.write_table(million)
    seal_study(folder)
    with within(size=GIGABYTE // 8), pytest.raises(InputError, match="it has 6,000,000 rows, and at most 5,001,200"):
        mv.Study.open(folder)
    shard = folder / "0-00000"
    write_folder(shard, {}, ABOUT)
    shutil.copy(path, shard / "words.parquet")
    seal_shard(shard)
    with pytest.raises(InputError, match="6,000,000 rows"):
        read_table(shard, "words")


@pytest.mark.long
def test_a_table_that_grows_when_it_is_read_is_refused(folder):
    path = folder / "data" / "words.parquet"
    words = pa.table({"word": ["a" * 10_000] * 10_000})
    pq.write_table(words, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    seal_study(folder)
    with within(size=GIGABYTE // 8), pytest.raises(InputError, match="compressed by ZSTD, and only SNAPPY and"):
        mv.Study.open(folder)
    # One text, named in every row.
    pq.write_table(pa.table({"word": ["a" * 1_000_000] * 2000}), path)
    assert path.stat().st_size < 100_000
    seal_study(folder)
    with within(size=GIGABYTE // 4), pytest.raises(InputError, match=r"bytes become 2,00.,...,... once they are read"):
        mv.Study.open(folder)
    empty = pa.ListArray.from_arrays([0, 6_000_000], pa.nulls(6_000_000, pa.int8()))
    pq.write_table(pa.table({"word": empty}), path)  # one row, of many values
    seal_study(folder)
    with within(size=GIGABYTE // 8), pytest.raises(InputError, match=r"a column has 6,000,000 values, and at most"):
        mv.Study.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "no JSON object of at most 32 levels"),
        ('{"a":' * 40 + "1" + "}" * 40, "no JSON object of at most 32 levels"),
        ("[" + "[]," * 3_000_000 + "1]", "entries, and at most 4,000,000 are read"),
        ('{"a": ' + "9" * 5000 + "}", "damaged"),
        ("{" + " " * 2**26 + "}", "67,108,866 bytes, and at most 67,108,864 are read"),
    ],
    ids=["brackets", "levels", "entries", "digits", "bytes"],
)
def test_json_that_is_too_deep_or_too_large_is_refused(folder, text, message):
    (folder / "run.json").write_text(text)
    with within(size=GIGABYTE // 2), pytest.raises(InputError, match=message):
        mv.Study.open(folder)


def test_a_picture_that_is_too_large_is_not_decoded(folder):
    path = folder / "views" / "gallery.parquet"
    row = pd.read_parquet(path).iloc[0].to_dict()
    for side, message in ((5000, "5000 x 5000 pixels"), (20_000, "400000000 pixels")):
        large = encode_png(Image.new("1", (side, side)))
        pd.DataFrame([row | {"image": large}]).to_parquet(path, index=False)
        seal_study(folder)
        with within(size=GIGABYTE // 2), pytest.raises(InputError, match=message):
            mv.Study.open(folder)


def test_a_page_of_another_place_is_not_read(folder):
    path = folder / "views" / "gallery.parquet"
    row = pd.read_parquet(path).iloc[0].to_dict()
    for name in ("../../etc/passwd", "/etc/passwd", "views/../run.json", "views\\x.html", "views/02-m.html"):
        pd.DataFrame([row | {"file": name}]).to_parquet(path, index=False)
        seal_study(folder)
        with pytest.raises(InputError, match=r"no page of this folder|lies outside|cannot be read \(No such file"):
            mv.Study.open(folder)
