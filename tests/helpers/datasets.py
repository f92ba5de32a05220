"""Small data sets in exactly the formats of COCO, Winoground and the library datasets."""

import io
import json
from pathlib import Path

from helpers.images import noise_image

WORDS = ("cat", "dog", "kitchen", "street", "boat", "horse")


def coco(n: int = 6, captions: int = 5) -> dict:
    """A captions_val2017.json for `n` images; its annotations are unordered, as in COCO's own."""
    images = [
        {"license": 4, "file_name": f"{i:012d}.jpg", "coco_url": f"http://images.example/{i:012d}.jpg", "height": 60,
         "width": 80, "date_captured": "2013-11-14 17:02:52", "id": i}
        for i in range(100, 100 + n)
    ]  # fmt: skip
    annotations = [
        {"image_id": image["id"], "id": 10 * image["id"] + k, "caption": f"A {WORDS[image['id'] % 6]} seen {k} times."}
        for k in reversed(range(captions))
        for image in reversed(images)
    ]
    info = {"description": "COCO 2017 Dataset", "version": "1.0", "year": 2017}
    return {"info": info, "licenses": [], "images": images, "annotations": annotations}


def write_coco(folder: Path, content: dict, layout: str = "official", split: str = "val2017") -> Path:
    """Write `content` and its images; gives the captions file.

    `layout` is "official" (annotations/ and val2017/), "images" (images/) or "flat".
    """
    file = folder / "annotations" / f"captions_{split}.json" if layout == "official" else folder / "captions_mine.json"
    images = {"official": folder / split, "images": folder / "images", "flat": folder}[layout]
    for parent in (file.parent, images):
        parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    for i, image in enumerate(content["images"]):
        noise_image(i).save(images / image["file_name"])
    return file


def winoground(n: int = 4) -> list[dict]:
    """The entries of examples.jsonl for `n` pairs."""
    return [
        {"id": i, "image_0": f"ex_{i}_img_0", "image_1": f"ex_{i}_img_1", "tag": "Object", "secondary_tag": "",
         "num_main_preds": 1, "collapsed_tag": "Object", "caption_0": f"a {WORDS[i % 6]} on some grass",
         "caption_1": f"some grass on a {WORDS[i % 6]}"}
        for i in range(n)
    ]  # fmt: skip


def write_winoground(folder: Path, entries: list) -> Path:
    """Write examples.jsonl, and images/ with the suffix .png that the entries leave out."""
    (folder / "images").mkdir(parents=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for i, entry in enumerate(e for e in entries if isinstance(e, dict)):
        for side in (0, 1):
            noise_image(2 * i + side).save(folder / "images" / f"{entry[f'image_{side}']}.png")
    return folder


def encoded(seed: int, kind: str = "PNG") -> bytes:
    """The bytes of a noise image's file."""
    file = io.BytesIO()
    noise_image(seed).save(file, kind)
    return file.getvalue()


def write_folder(folder, lines, images=()):
    """Write captions.jsonl and noise images of these names; gives the data set's name."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(images):
        noise_image(i).save(folder / name)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")
    return f"folder:{folder}"
