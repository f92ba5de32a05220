"""Studies of somebody else: their files lead nowhere else, and their pages are made again."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from helpers.small_study import small  # noqa: F401
from mechvlm.datasets import Dataset, Example, fingerprint
from mechvlm.errors import InputError, StoppedError
from mechvlm.study import Study, run
from mechvlm.study.running import runner

pytestmark = pytest.mark.long

DATA = Path(__file__).parent.parent / "data" / "first_house"


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return mv.load(*llava(layers=2))


@pytest.fixture(scope="module")
def data() -> Dataset:
    examples = tuple(Example(f"e{i}", noise_image(i), (f"a picture number {i} of a dog",)) for i in range(2))
    return Dataset("made", examples, (), fingerprint(examples))


OUTSIDE = [
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "views/link.html",
    "views/pipe.html",
    "views",
    "C:\\a.html",
    3.5,
]


@pytest.fixture
def finished(tmp_path):
    return shutil.copytree(DATA / "study", tmp_path / "study")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_gallery_names_pages_of_its_folder(finished, name):
    views = finished / "views"
    (views / "link.html").symlink_to("/etc/passwd")
    os.mkfifo(views / "pipe.html")
    table = pd.read_parquet(views / "gallery.parquet")
    table["file"] = [name] * len(table)
    table.to_parquet(views / "gallery.parquet")
    with pytest.raises(InputError, match=r"lies outside|leads out|regular file|column file holds double"):
        Study.open(finished)


def test_a_thumbnail_that_is_a_bomb(finished):
    path = finished / "views" / "gallery.parquet"
    table = pd.read_parquet(path)
    table["image"] = [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xea\x60\0\0\xea\x60\x08\x06\0\0\0\0\0\0\0"] * len(table)
    table.to_parquet(path)
    with pytest.raises(InputError, match=r"gallery|views"):
        Study.open(finished)


@pytest.fixture
def stopped(tmp_path, vlm, data, monkeypatch):
    """The folder of a study that was stopped before its report, with a gallery."""

    def stop(*_):
        raise StoppedError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "assemble_study", stop)
        with pytest.raises(StoppedError):
            run([vlm], data, out=tmp_path / "study")
    return tmp_path / "study"


def test_pages_of_a_stopped_study_are_made_again(stopped, vlm, data):
    """A page in its gallery could hold a script, which a browser would run."""
    (folder,) = (stopped / "shards").glob("*-gallery")
    views = pd.read_parquet(folder / "views.parquet")
    views["html"] = "<script>steal()</script>"
    views.to_parquet(folder / "views.parquet")
    study = run([vlm], data, out=stopped)
    assert len(study.views) == 2
    assert all("steal" not in page.read_text() for page in stopped.rglob("*.html"))


def test_a_link_to_other_shards_is_refused(stopped, vlm, data, tmp_path):
    other = tmp_path / "other"
    (stopped / "shards").rename(other)
    (other / ".mine.tmp").write_text("kept")
    (stopped / "shards").symlink_to(other)
    with pytest.raises(InputError, match="is a link to"):
        run([vlm], data, out=stopped)
    assert (other / ".mine.tmp").read_text() == "kept"


def test_every_page_allows_nothing(stopped, vlm, data):
    run([vlm], data, out=stopped)
    pages = list(stopped.rglob("*.html"))
    assert len(pages) == 3
    for page in pages:
        policy = page.read_text().split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
        assert {"default-src 'none'", "base-uri 'none'", "form-action 'none'"} <= set(policy.split("; "))
