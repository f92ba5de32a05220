"""A folder's listing as people write it: paths of other systems, arrays, dicts, links."""

import json
import os
import unicodedata

import pytest

import datasets
from helpers.datasets import encoded, write_folder
from helpers.images import noise_image
from mechvlm.datasets import load_dataset, read_coco, read_folder, read_winoground
from mechvlm.errors import InputError
from mechvlm.inputs.images import open_image

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def captions_of(spec: str) -> dict[str, tuple[str, ...]]:
    data = load_dataset(spec)
    assert data.set_aside == ()
    return {e.id: e.captions for e in data.examples}


def only_image(folder, name: str, **row) -> bytes:
    """The pixels of the folder's one example, whose row calls its image `name`."""
    spec = write_folder(folder, [{"image": name, "captions": ["x"], **row}])
    data = load_dataset(spec)
    assert data.set_aside == ()
    (example,) = data.examples
    return open_image(example.image).tobytes()


# --- names of images ---


def test_paths_of_windows(tmp_path):
    (tmp_path / "sub" / "more").mkdir(parents=True)
    noise_image(7).save(tmp_path / "sub" / "more" / "d.png")
    assert only_image(tmp_path, "sub\\more\\d.png") == noise_image(7).tobytes()
    assert [e.id for e in read_folder(tmp_path)[0]] == ["sub/more/d.png"], "the same id as on another system"
    # A name that really holds a backslash is that file.
    noise_image(8).save(tmp_path / "sub\\more\\d.png")
    assert only_image(tmp_path, "sub\\more\\d.png") == noise_image(8).tobytes()


@pytest.mark.parametrize(
    "name",
    ["..\\a.png", "sub\\..\\..\\a.png", "C:\\a.png", "C:/a.png", "\\a.png", "\\\\host\\share\\a.png", "../a.png"],
)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    noise_image(0).save(tmp_path / "a.png")
    lines = [{"image": name, "captions": ["x"]}, {"image": "b.png", "captions": ["fine"]}]
    data = load_dataset(write_folder(tmp_path / "d", lines, ["b.png"]))
    assert [e.id for e in data.examples] == ["b.png"]
    ((line, reason),) = data.set_aside
    assert (line, "lies outside the folder" in reason) == ("captions.jsonl line 1", True)


@pytest.mark.parametrize(("written", "on_disk"), [(NFC, NFD), (NFD, NFC), (NFC, NFC), (NFD, NFD)])
def test_either_spelling_of_an_accent(tmp_path, written, on_disk):
    assert NFC != NFD
    (tmp_path / on_disk).mkdir()
    noise_image(3).save(tmp_path / on_disk / f"{on_disk}.png")
    assert only_image(tmp_path, f"{written}/{written}.png") == noise_image(3).tobytes()
    assert [e.id for e in read_folder(tmp_path)[0]] == [f"{NFC}/{NFC}.png"], "the same id on every disk"


def test_a_file_of_the_very_spelling_comes_first(tmp_path):
    for seed, name in enumerate((NFC, NFD)):
        noise_image(seed).save(tmp_path / f"{name}.png")
    assert only_image(tmp_path, f"{NFC}.png") == noise_image(0).tobytes()
    assert only_image(tmp_path, f"{NFD}.png") == noise_image(1).tobytes()


def test_absolute_names_lead_into_the_folder_or_are_set_aside(tmp_path, monkeypatch):
    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    noise_image(5).save(folder / "sub" / "a.png")
    (tmp_path / "also").symlink_to(folder)
    for spec in (folder, tmp_path / "also"):
        for name in (folder / "sub" / "a.png", spec / "sub" / "a.png"):
            assert only_image(spec, str(name)) == noise_image(5).tobytes()
            assert [e.id for e in read_folder(spec)[0]] == ["sub/a.png"]
    monkeypatch.chdir(tmp_path)
    only_image(folder, str(folder / "sub" / "a.png"))
    assert [e.id for e in load_dataset("folder:d").examples] == ["sub/a.png"]
    noise_image(6).save(tmp_path / "d-too.png")
    with pytest.raises(InputError, match="lies outside the folder"):
        only_image(folder, str(tmp_path / "d-too.png"))


def test_links_are_followed_inside_the_folder_alone(tmp_path):
    """A folder of somebody else brings no other pictures of the disk into a report."""
    folder = tmp_path / "d"
    (folder / "real").mkdir(parents=True)
    for place in (folder / "real", tmp_path):
        noise_image(1).save(place / "a.png")
    (folder / "link.png").symlink_to("real/a.png")
    (folder / "also").symlink_to(folder / "real")
    (folder / "out.png").symlink_to(tmp_path / "a.png")
    (folder / "up").symlink_to("..")
    (folder / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    names = ["link.png", "also/a.png", "out.png", "up/a.png", "gone.png", "pipe.png"]
    data = load_dataset(write_folder(folder, [{"image": name, "captions": ["x"]} for name in names]))
    assert {e.id: open_image(e.image).tobytes() == noise_image(1).tobytes() for e in data.examples} == {
        "link.png": True, "also/a.png": True
    }  # fmt: skip
    reasons = dict(data.set_aside)
    assert len(reasons) == 4
    for line in (3, 4):
        assert "lies outside the folder: it is, or lies behind, a link to" in reasons[f"captions.jsonl line {line}"]
        assert "Put the file itself there" in reasons[f"captions.jsonl line {line}"]
    assert "it is a link to nowhere.png, where there is no such file" in reasons["captions.jsonl line 5"]
    assert "there is no such file" in reasons["captions.jsonl line 6"]


def test_a_listing_that_is_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "captions.jsonl")
    with pytest.raises(InputError, match=r"captions.jsonl cannot be read: it is not a regular file"):
        read_folder(tmp_path)


def test_upper_case_extensions(tmp_path):
    (tmp_path / "A.PNG").write_bytes(encoded(4))
    (tmp_path / "b.JPG").write_bytes(encoded(5))
    assert only_image(tmp_path, "A.PNG") == noise_image(4).tobytes()
    data = load_dataset(
        write_folder(tmp_path, [{"image": "A.PNG", "captions": ["x"]}, {"image": "b.jpg", "captions": ["y"]}])
    )
    assert [e.id for e in data.examples] == ["A.PNG"]
    assert data.set_aside[0].reason.endswith("there is no such file, but 'b.JPG'")


def test_the_same_image_in_other_words_is_the_same_id(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    names = ["sub/a.png", "./sub/a.png", "sub\\a.png", "sub//a.png"]
    data = load_dataset(write_folder(tmp_path / "d", [{"image": n, "captions": [n]} for n in names], ["sub/a.png"]))
    assert [(e.id, e.captions) for e in data.examples] == [("sub/a.png", ("sub/a.png",))]
    assert [(a.id, a.reason.split(":")[0]) for a in data.set_aside] == [
        ("sub/a.png", f"line {number} of captions.jsonl uses this id again") for number in (2, 3, 4)
    ]


# --- the listing ---

ROWS = [{"image": f"{i}.png", "captions": [f"picture {i}"]} for i in range(3)]
EXPECTED = {f"{i}.png": (f"picture {i}",) for i in range(3)}
NAMES = list(EXPECTED)
PER_LINE = [json.dumps(row) for row in ROWS]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        "[\n" + ",\n".join(PER_LINE) + "\n]\n",
        "\ufeff" + json.dumps(ROWS, indent=2).replace("\n", "\r\n"),
        "\n".join(PER_LINE),
        "\ufeff" + "\r\n".join(PER_LINE) + "\r\n",
        "\n\n" + "\n \n\n".join(PER_LINE) + "\n\n\n",
        "  " + "\n\t".join(PER_LINE),
    ],
    ids=[
        "array",
        "array, indented",
        "array of lines",
        "array, BOM and CRLF",
        "lines",
        "BOM and CRLF",
        "blank",
        "spaces",
    ],
)
def test_lines_and_arrays(tmp_path, text):
    write_folder(tmp_path, [], NAMES)
    (tmp_path / "captions.jsonl").write_bytes(text.encode())
    assert captions_of(f"folder:{tmp_path}") == EXPECTED


def test_one_object_over_several_lines(tmp_path):
    assert captions_of(write_folder(tmp_path, [json.dumps(ROWS[0], indent=2)], NAMES)) == {"0.png": ("picture 0",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(ROWS)[:-20], r"begins as one JSON array, which is broken \(.* line 1 column 115 "),
        ("[\n" + "\n".join(PER_LINE) + "\n]", r"broken \(Expecting ',' delimiter: line 3 column 1 "),
        ('{"0.png": ["picture 0"]}', r"line 1: no \"image\", the name of a file in the folder: it holds '0.png'"),
        ('{"images": [],\n "annotations": []}', r"entry 1: no \"image\", .* it holds 'images', 'annotations'"),
        ("[" * 100_000, "begins as one JSON array, which is broken"),
        ("[]", "it is empty"),
        ("image,caption\n0.png,picture 0", "2 lines, none usable; captions.jsonl line 1: not JSON"),
        (b"\xff\xfe[\x00]\x00", "should be a text file in UTF-8"),
    ],
)
def test_what_is_no_listing_is_named(tmp_path, text, message):
    write_folder(tmp_path, [], NAMES)
    (tmp_path / "captions.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        load_dataset(f"folder:{tmp_path}")


@pytest.mark.parametrize("as_array", [True, False])
def test_a_bad_row_in_the_middle_is_named_and_loses_nothing_else(tmp_path, as_array):
    rows = [*ROWS[:2], {"image": "9.png", "captions": ["gone"]}, ROWS[2]]
    write_folder(tmp_path, [json.dumps(rows)] if as_array else ["", *rows], NAMES)
    data = load_dataset(f"folder:{tmp_path}")
    assert {e.id: e.captions for e in data.examples} == EXPECTED
    ((name, reason),) = data.set_aside
    assert name == ("captions.jsonl entry 3" if as_array else "captions.jsonl line 4")
    assert reason == f"no image at {tmp_path / '9.png'}: there is no such file"


def test_missing_images_are_counted_and_three_are_named(tmp_path):
    """Each is set aside with its line. When nothing is left, the error names three of them."""
    gone = [{"image": f"gone-{i}.png", "captions": ["x"]} for i in range(1003)]
    data = load_dataset(write_folder(tmp_path, [*gone, *ROWS], NAMES))
    assert {e.id for e in data.examples} == set(EXPECTED)
    assert [aside.id for aside in data.set_aside] == [f"captions.jsonl line {n}" for n in range(1, 1004)]
    with pytest.raises(InputError) as caught:
        load_dataset(write_folder(tmp_path, gone))
    assert "(1,003 lines, none usable; captions.jsonl line 1: no image at" in str(caught.value)
    assert [f"gone-{i}.png" in str(caught.value) for i in range(4)] == [True, True, True, False]
    assert "; and 1,000 more)" in str(caught.value)


# --- captions and ids ---


@pytest.mark.parametrize(
    ("row", "captions"),
    [
        ({"captions": {"raw": "a cat", "sentid": 3, "tokens": ["a", "cat"]}}, ("a cat",)),
        ({"captions": [{"raw": "a cat", "imgid": 1}, {"raw": "two", "imgid": 1}]}, ("a cat", "two")),
        ({"captions": {"raw": ["a cat", "two"], "sentid": [3, 4]}}, ("a cat", "two")),
        ({"captions": [{"id": 4, "image_id": 1, "caption": "a cat"}, "two"]}, ("a cat", "two")),
        ({"caption": {"text": " a cat "}}, ("a cat",)),
        ({"captions": ["", "a cat", None, "  ", {"raw": ""}, "two"]}, ("a cat", "two")),
        ({"captions": None, "caption": "a cat"}, ("a cat",)),
        ({"captions": ["eine Straße", "STRASSE"]}, ("eine Straße", "STRASSE")),
        ({"captions": ["a cat", "a"]}, ("a cat", "a")),
        ({"sentences": [{"raw": "a cat"}]}, ("a cat",)),
        ({"sentences": None, "text": "a cat"}, ("a cat",)),
        ({"captions": ["a cat"], "text": "STOP, on a sign"}, ("a cat",)),
    ],
)
def test_captions(tmp_path, row, captions):
    """As people write them, also in copies of COCO and Flickr on the Hub."""
    assert captions_of(write_folder(tmp_path, [{"image": "a.png", **row}], ["a.png"])) == {"a.png": captions}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"captions": [{"tokens": ["a"]}]},
            "hold a dict with 'tokens'; its text should be under one of 'raw', 'caption', 'text'",
        ),
        ({"captions": {"raw": "a", "text": "b"}}, "hold a dict with 'raw', 'text'"),
        ({"captions": [None, ""]}, "every caption of the image 'a.png' is empty"),
        ({"captions": None}, 'has no "captions"'),
        ({"captions": ["a", 3]}, "hold '3', which is neither a string nor a list of strings"),
        ({"captions": ["a"], "caption": "b"}, "has both 'captions' and 'caption': put all its captions into one"),
        ({"captions": ["a"], "id": True}, 'the "id" is True; an id is a string or a whole number'),
    ],
)
def test_captions_that_cannot_be_read(tmp_path, row, reason):
    data = load_dataset(write_folder(tmp_path, [{"image": "a.png", **row}, ROWS[0]], ["a.png", "0.png"]))
    assert [e.id for e in data.examples] == ["0.png"]
    ((name, why),) = data.set_aside
    assert (name, reason in why) == ("captions.jsonl line 1", True), why


def test_ids_that_are_numbers(tmp_path):
    rows = [{**row, "id": id} for row, id in zip(ROWS, (17, 18.0, None), strict=True)]
    assert set(captions_of(write_folder(tmp_path, rows, NAMES))) == {"17", "18", "2.png"}


# --- folders of others ---


def test_an_imagefolders_metadata(tmp_path):
    rows = [{"file_name": row["image"], "text": row["captions"][0]} for row in ROWS]
    write_folder(tmp_path, rows, NAMES)
    (tmp_path / "captions.jsonl").rename(tmp_path / "metadata.jsonl")
    assert captions_of(f"folder:{tmp_path}") == EXPECTED
    ours = {"image": "1.png", "captions": ["ours"]}
    assert captions_of(write_folder(tmp_path, [ours])) == {"1.png": ("ours",)}, "captions.jsonl comes first"


@pytest.mark.parametrize("place", ["metadata.csv", "train/metadata.csv", "train/metadata.jsonl"])
def test_other_metadata_point_to_the_library_that_reads_them(tmp_path, monkeypatch, place):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "d" / place
    file.parent.mkdir(parents=True)
    for i in range(3):
        noise_image(i).save(file.parent / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(3)]
    table = "file_name,text\n" + "\n".join(",".join(row.values()) for row in rows)
    file.write_text(table if file.suffix == ".csv" else "\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=rf"holds no captions.jsonl.*It holds {place}: .*hf:{tmp_path / 'd'} reads it"):
        load_dataset(f"folder:{tmp_path / 'd'}")
    data = load_dataset(f"hf:{tmp_path / 'd'}")
    assert {e.captions: open_image(e.image).tobytes() for e in data.examples} == {
        (f"picture {i}",): noise_image(i).tobytes() for i in range(3)
    }


def test_other_listings_are_named(tmp_path):
    for name in ("labels.csv", "captions.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=r"holds no captions.jsonl. .* It holds captions.json, labels.csv$"):
        load_dataset(f"folder:{tmp_path}")


def test_the_home_folder(tmp_path, monkeypatch):
    from helpers.datasets import coco, winoground, write_coco, write_winoground

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_folder(tmp_path / "f", ROWS, NAMES)
    assert captions_of("folder:~/f") == EXPECTED
    write_coco(tmp_path / "c", coco(2))
    assert len(load_dataset("coco:~/c").examples) == len(read_coco("~/c", "~/c/val2017")[0]) == 2
    assert len(load_dataset("coco:~/c/annotations/captions_val2017.json?images=~/c/val2017").examples) == 2
    write_winoground(tmp_path / "w", winoground(2))
    assert len(load_dataset("winoground:~/w").examples) == len(read_winoground("~/w")[0]) == 4
    table = datasets.Dataset.from_dict({"image": [encoded(0)], "text": ["a"]})
    table.save_to_disk(tmp_path / "h")
    table.to_parquet(tmp_path / "t.PARQUET")
    assert [e.captions for e in load_dataset("hf:~/h").examples] == [("a",)]
    assert [e.captions for e in load_dataset("hf:~/t.PARQUET").examples] == [("a",)]
