"""COCO captions: the official folder layout and others; entries set aside, and files refused."""

import builtins
import io
import json
import os
from pathlib import Path

import pytest

from helpers.datasets import coco, write_coco
from helpers.images import noise_image
from mechvlm.datasets import load_dataset, read_coco
from mechvlm.errors import InputError
from mechvlm.inputs.images import open_image


@pytest.mark.parametrize("layout", ["official", "images", "flat"])
def test_every_image_with_all_its_captions(tmp_path, layout):
    file = write_coco(tmp_path, coco(), layout)
    for spec in (f"coco:{tmp_path}", f"coco:{file}"):
        data = load_dataset(spec)
        assert data.set_aside == ()
        assert {e.id for e in data.examples} == {str(i) for i in range(100, 106)}
        for e in data.examples:
            assert e.meta["file_name"] == f"{int(e.id):012d}.jpg"
            # Captions come in the order of the annotations' ids, not of the file.
            word = e.captions[0].split()[1]
            assert e.captions == tuple(f"A {word} seen {k} times." for k in range(5))
            assert open_image(e.image).size == (80, 60)


def test_several_captions_files_ask_for_one(tmp_path):
    for split in ("val2017", "train2017"):
        write_coco(tmp_path, coco(3), split=split)
    with pytest.raises(
        InputError, match=r"2 files of captions \(annotations.captions_train2017.json, .*Name one: coco:"
    ):
        load_dataset(f"coco:{tmp_path}")
    chosen = load_dataset(f"coco:{tmp_path}/annotations/captions_train2017.json")
    assert {e.image.parent.name for e in chosen.examples} == {"train2017"}


def test_a_folder_of_images_elsewhere_is_named(tmp_path):
    file = write_coco(tmp_path / "a", coco(3), "flat")
    (tmp_path / "my+pictures%20&co").mkdir()
    for image in (tmp_path / "a").glob("*.jpg"):
        image.rename(tmp_path / "my+pictures%20&co" / image.name)
    with pytest.raises(InputError, match=r"None of the images .* was found in .*images=DIR"):
        load_dataset(f"coco:{file}")
    data = load_dataset(f"coco:{file}?images={tmp_path / 'my+pictures%20&co'}")
    assert {e.image.parent.name for e in data.examples} == {"my+pictures%20&co"}


def odd(folder: Path) -> dict:
    content = coco(6)
    images, annotations = content["images"], content["annotations"]
    images[1]["file_name"] = "../secret.jpg"
    images[2]["file_name"] = "/etc/passwd"
    images.append({**images[0], "file_name": "again.jpg"})
    images.append({"id": 7, "file_name": "silent.jpg"})
    images += [{"id": 8}, "nothing", {"id": True, "file_name": "x.jpg"}]
    annotations += [
        {"image_id": 999, "id": 1, "caption": "of no image"}, {"image_id": 999, "id": 2, "caption": "nor this"},
        {"image_id": 103, "id": 1030, "caption": "an id again"}, {"image_id": 103, "id": 3}, None,
    ]  # fmt: skip
    for entry in annotations:
        if entry and entry["image_id"] == 105:
            entry["caption"] = "  "
    (folder / "val2017").mkdir(parents=True)
    for name in ("again.jpg", "silent.jpg", *(i["file_name"] for i in images[:6] if isinstance(i, dict))):
        if "/" not in name and name != "000000000104.jpg":
            noise_image(0).save(folder / "val2017" / name)
    noise_image(0).save(folder / "secret.jpg")
    (folder / "annotations").mkdir()
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    return content


def test_oddities_are_set_aside_with_their_reasons(tmp_path):
    odd(tmp_path)
    data = load_dataset(f"coco:{tmp_path}")
    assert {e.id for e in data.examples} == {"100", "103"}
    assert all(len(e.captions) == 5 for e in data.examples)
    reasons = sorted(f"{aside.id}: {aside.reason}" for aside in data.set_aside)
    expected = [
        "101: the image '../secret.jpg' lies outside the folder",
        "102: the image '/etc/passwd' lies outside the folder",
        "104: no image at", "105: the file has no caption of the image '000000000105.jpg'",
        "7: the file has no caption of the image 'silent.jpg'", "100: images[6] uses this id again, for 'again.jpg'",
        '8: an image without "id" or "file_name"', "images[9]: an image without", "images[10]: an image without",
        "999: 2 captions, but the file lists no such image", "annotation 1030: annotations[32] uses this id again",
        "annotations[33]: an annotation without", "annotations[34]: an annotation without",
    ]  # fmt: skip
    for part in expected:
        assert sum(part in reason for reason in reasons) == 1, (part, reasons)
    assert len(reasons) == len(expected)


def test_names_that_are_not_ascii_and_subfolders(tmp_path):
    content = coco(2)
    content["images"][0]["file_name"] = "café/été à la plage 海.jpg"
    (tmp_path / "images" / "café").mkdir(parents=True)
    write_coco(tmp_path, content, "images")
    example = next(e for e in load_dataset(f"coco:{tmp_path}").examples if e.id == "100")
    assert open_image(example.image).size == (80, 60)


def test_names_of_other_systems_and_a_byte_order_mark(tmp_path):
    content = coco(2)
    for image, name in zip(content["images"], ("sub\\caf\u00e9.jpg", "plain.JPG"), strict=True):
        image["file_name"] = name
    file = write_coco(tmp_path, content)
    (tmp_path / "val2017" / "sub").mkdir()
    (tmp_path / "val2017" / content["images"][0]["file_name"]).rename(tmp_path / "val2017" / "sub" / "cafe\u0301.jpg")
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(content, indent=1).replace("\n", "\r\n").encode())
    data = load_dataset(f"coco:{tmp_path}")
    assert data.set_aside == ()
    assert {e.id: e.image.name for e in data.examples} == {"100": "cafe\u0301.jpg", "101": "plain.JPG"}


CONTENT = coco(2)
BROKEN = [
    (json.dumps(CONTENT)[:500], r"is not JSON: .* at line 1, column \d+ \(character \d+ of 500\)"),
    ('{"images": [],\n "annotations": [}', "line 2, column 18"),
    (b'{"images": "\xff"}', "should be a text file in UTF-8"),
    ("[" * 100_000, "cannot be read"),
    ("[1]", r"holds a list, not COCO's"),
    ('{"sentences": []}', "holds 'sentences', not COCO's"),
    ({**CONTENT, "annotations": [{"image_id": 100, "bbox": [0, 0, 1, 1]}]}, "annotations without captions .*'bbox'"),
    ({"images": CONTENT["images"]}, "holds 'images', not COCO's"),
    ({"images": [], "annotations": []}, "None of the images|lists no image"),
    ({**CONTENT, "annotations": []}, "names no usable example .*no caption of the image"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_file_that_is_not_coco_captions(tmp_path, text, message):
    file = write_coco(tmp_path, CONTENT)
    file.write_bytes(
        text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
    )
    with pytest.raises(InputError, match=message):
        load_dataset(f"coco:{tmp_path}")


def test_no_captions_file(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        load_dataset(f"coco:{tmp_path / 'gone'}")
    with pytest.raises(InputError, match=r"holds no captions_\*.json.* If another file is in COCO's captions format"):
        load_dataset(f"coco:{tmp_path}")
    (tmp_path / "instances_val2017.json").write_text("{}")
    with pytest.raises(InputError, match=r"It holds instances_val2017.json"):
        load_dataset(f"coco:{tmp_path}")
    for query in ("images=", "photos=x", "images=a&images=b"):
        with pytest.raises(InputError, match=r"options after the \? are images: each is given"):
            load_dataset(f"coco:{tmp_path}?{query}")


def test_images_are_neither_opened_nor_looked_at_one_by_one(tmp_path, monkeypatch):
    write_coco(tmp_path, coco(50))
    looked_at = []
    for module, name in [(os, "stat"), (io, "open"), (builtins, "open")]:
        real = getattr(module, name)
        watched = lambda path, *a, real=real, **k: (looked_at.append(str(path)), real(path, *a, **k))[1]  # noqa: E731
        monkeypatch.setattr(module, name, watched)
    examples, _ = read_coco(tmp_path)
    assert len(examples) == 50
    assert any(path.endswith(".json") for path in looked_at)
    assert not [path for path in looked_at if path.endswith(".jpg")]
