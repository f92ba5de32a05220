"""Files of data sets with anything changed in them are read, or refused with an InputError.

Each in 10 seconds and 1 GB.
"""

import copy
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.bounds import within
from helpers.images import noise_image
from mechvlm.datasets import files, load_dataset
from mechvlm.datasets.files import ImageFolder
from mechvlm.errors import InputError

LINES = [
    {"image": "0.png", "captions": ["a dog", {"raw": "a cat"}], "id": "a"},
    {"image": "sub/1.png", "caption": "a ring", "id": 7},
]
COCO = {
    "images": [{"id": 1, "file_name": "0.png"}, {"id": 2, "file_name": "1.png"}],
    "annotations": [{"id": 3, "image_id": 1, "caption": "a dog"}, {"id": 4, "image_id": 2, "caption": "a cat"}],
}
PAIRS = [{"id": n, "image_0": "0", "image_1": "1", "caption_0": "a", "caption_1": "b", "tag": "x"} for n in (0, 1)]

ODD = [
    None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", " ", "x" * 10_000, "\0", "\ud800", "../../etc/passwd",
    "/etc/passwd", "/dev/zero", "C:\\a.png", "\\\\host\\a.png", "0.png/", ".", "pipe.png", "link.png", [], {}, [[[]]],
    {"a": 1}, {"raw": "a", "text": "b"}, {"raw": {"raw": {"raw": "deep"}}}, [None, 1], "a\nb\u2028c\x1b[2J",
]  # fmt: skip
odd = st.sampled_from(ODD)


def places(value, path=()) -> list[tuple]:
    """The paths of all values in a value of JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


@st.composite
def mutated(draw, value, lines: bool) -> bytes:
    """A file with this value, values replaced, keys lost or doubled, perhaps bytes changed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(places(value)))
        place = value
        for key in path[:-1]:
            place = place[key]
        if not path:
            value = copy.deepcopy(draw(odd))
        elif draw(st.booleans()):
            place[path[-1]] = copy.deepcopy(draw(odd))
        elif isinstance(place, dict):
            place[draw(st.sampled_from(["id", "image", "captions", "zz"]))] = place.pop(path[-1])
        else:
            place.append(place[path[-1]])
    rows = value if lines and isinstance(value, list) else [value]
    content = "\n".join(map(json.dumps, rows)).encode()
    if draw(st.integers(0, 3)) == 0 and content:
        at = draw(st.integers(0, len(content) - 1))
        content = draw(
            st.sampled_from([content[:at], content[:at] + b"\xff" + content[at + 1 :], content + b"[" * 99_999])
        )
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for place in (folder, folder / "sub", folder / "images"):
        place.mkdir(exist_ok=True)
        for number in (0, 1):
            noise_image(number).save(place / f"{number}.png")
        os.mkfifo(place / "pipe.png")
        (place / "link.png").symlink_to("/etc/passwd")
    return folder


def read_or_refused(spec: str, folder) -> None:
    with within():
        try:
            data = load_dataset(spec)
        except InputError:
            return
    for example in data.examples:
        assert example.image.resolve().is_relative_to(folder.resolve())
        assert example.image.is_file()
        assert all(isinstance(text, str) and text.strip() for text in example.captions)
        json.dumps([example.id, *example.captions]).encode()


slowly = settings(max_examples=120, suppress_health_check=list(HealthCheck))


@slowly
@given(mutated(LINES, lines=True))
def test_captions(folder, content):
    (folder / "captions.jsonl").write_bytes(content)
    read_or_refused(f"folder:{folder}", folder)


@slowly
@given(mutated(COCO, lines=False))
def test_coco(folder, content):
    (folder / "captions_val.json").write_bytes(content)
    read_or_refused(f"coco:{folder / 'captions_val.json'}", folder)


@slowly
@given(mutated(PAIRS, lines=True))
def test_winoground(folder, content):
    (folder / "examples.jsonl").write_bytes(content)
    read_or_refused(f"winoground:{folder}", folder)


def test_the_files_are_read_as_they_were(folder):
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    (folder / "captions_val.json").write_text(json.dumps(COCO))
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    specs = f"folder:{folder}", f"coco:{folder / 'captions_val.json'}", f"winoground:{folder}"
    assert [len(load_dataset(spec).examples) for spec in specs] == [2, 2, 4]


@pytest.mark.parametrize("name", ["captions.jsonl", "captions_val.json", "examples.jsonl"])
def test_files_are_measured_before_they_are_read(folder, monkeypatch, name):
    spec = {"captions.jsonl": f"folder:{folder}", "captions_val.json": f"coco:{folder / name}"}.get(
        name, f"winoground:{folder}"
    )
    (folder / name).write_text("[" + "[]," * 1000 + "[]]")
    monkeypatch.setattr(files, "MOST_VALUES", 1500)
    with pytest.raises(InputError, match=r"holds about 2,00. values"):
        load_dataset(spec)
    monkeypatch.setattr(files, "LARGEST_LISTING", 1500)
    with pytest.raises(InputError, match=r"has 0.0 MB, and files that list images of at most 0.0 MB"):
        load_dataset(spec)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=r"regular file|is not there|holds no|is no"):
        load_dataset(spec)
    (folder / name).unlink()


@pytest.mark.parametrize(
    "name",
    [
        "../0.png",
        "/etc/passwd",
        "sub/../../0.png",
        "C:\\0.png",
        "C:0.png",
        "\\\\host\\0.png",
        "pipe.png",
        "link.png",
        "",
    ],
)
def test_no_name_leads_out_of_a_folder(folder, name):
    with pytest.raises(InputError):
        ImageFolder(folder).image(name)
