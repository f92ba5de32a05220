"""Captions in COCO's format: a `captions_*.json` and the folder of its images (Lin et al. 2014; Chen et al. 2015).

    {"images": [{"id": 397133, "file_name": "000000397133.jpg", ...}, ...],
     "annotations": [{"id": 370509, "image_id": 397133, "caption": "A man is in a kitchen making pizzas."}, ...]}

Taken as COCO unpacks it, `annotations/captions_val2017.json` beside `val2017/`, or with the images in `images/` or beside
the file. `coco:FILE?images=DIR` names another folder.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from mechvlm.datasets.example import Example
from mechvlm.datasets.files import Folder, SetAside, storable
from mechvlm.errors import InputError


def read_coco(where: str | PathLike, images: str | PathLike | None = None) -> tuple[list[Example], list[SetAside]]:
    """The usable examples in the order of the file, and those set aside with their reasons.

    An example's id is COCO's image id, its captions are all that the file has of the image, in the order of their ids, and
    `meta["file_name"]` is the image's name. Images are only looked for, not opened.

    Args:
        where: a captions file, or a folder that holds one, itself or in `annotations/`.
        images: the folder of the images; by default found beside the file.

    Raises:
        InputError: where there is no captions file, or several; where the file is no JSON (it says where), or not of this
            structure; and where not one of its images is found.
    """
    file = _captions_file(Path(where))
    listed, annotations = _content(file)
    names, aside = _names(listed)
    captions, strays = _captions(annotations, names)
    folder = Folder(_image_folder(file, names.values(), images))
    examples = []
    for key, name in names.items():
        try:
            if not captions.get(key):
                raise InputError(f"the file has no caption of the image {name!r}")
            examples.append(Example(key, folder.image(name), tuple(captions[key]), {"file_name": name}))
        except InputError as error:
            aside.append(SetAside(key, str(error)))
    if not examples:
        why = f"{len(names)} images; {aside[0].id}: {aside[0].reason}" if aside else "it lists no image"
        raise InputError(f"{file} names no usable example ({why}).")
    return examples, aside + strays


def _captions_file(where: Path) -> Path:
    if where.is_file():
        return where
    if not where.is_dir():
        raise InputError(f"{where} is not there; coco:DIR needs a folder with a captions_*.json, or that file itself.")
    found = sorted(file for folder in (where, where / "annotations") for file in folder.glob("captions*.json"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(file.relative_to(where)) for file in found)
        raise InputError(f"{where} holds {len(found)} files of captions ({names}). Name one: coco:{found[0]}")
    others = sorted(str(f.relative_to(where)) for f in (*where.glob("*.json"), *where.glob("annotations/*.json")))
    there = f"It holds {', '.join(others[:5])}; if one of them is" if others else "If there is one elsewhere"
    raise InputError(
        f"{where} holds no captions_*.json, nor does its folder annotations. {there} in COCO's captions format, name it: "
        f"coco:{where / 'FILE.json'}"
    )


def _content(file: Path) -> tuple[list, list]:
    try:
        content: Any = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file} is not JSON: {error.msg} at line {error.lineno}, column {error.colno} (character {error.pos:,} of "
            f"{len(error.doc):,}). If it ends there, fetch it again."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error}). It should be JSON in UTF-8.") from None
    shape = '{"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}'
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not COCO's {shape}.")
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise InputError(f"{file} holds {', '.join(map(repr, content)) or 'nothing'}, not COCO's {shape}.")
    first = next((a for a in annotations if isinstance(a, dict)), {})
    if annotations and not any(isinstance(a, dict) and "caption" in a for a in annotations):
        raise InputError(
            f"{file} has annotations without captions (the first holds {', '.join(map(repr, first)) or 'nothing'}): it is "
            "another of COCO's files, and captions_*.json is needed."
        )
    return images, annotations


def _names(listed: list) -> tuple[dict[str, str], list[SetAside]]:
    """{id: file name}, and the entries that say neither or an id again."""
    names: dict[str, str] = {}
    aside = []
    for number, entry in enumerate(listed):
        key = _id(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if key is None or not isinstance(name, str) or not name:
            aside.append(SetAside(key or f"images[{number}]", 'an image without "id" or "file_name"'))
        elif key in names:
            aside.append(SetAside(key, f"images[{number}] uses this id again, for {name!r}: the first is kept"))
        else:
            names[key] = name
    return names, aside


def _captions(annotations: list, names: dict[str, str]) -> tuple[dict[str, list[str]], list[SetAside]]:
    """{image id: captions in the order of their ids}, and what belongs to no image that is listed."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    seen, aside = set(), []
    lost: dict[str, int] = defaultdict(int)
    for number, entry in enumerate(annotations):
        image = _id(entry.get("image_id")) if isinstance(entry, dict) else None
        text = entry.get("caption") if isinstance(entry, dict) else None
        if image is None or not isinstance(text, str):
            aside.append(SetAside(f"annotations[{number}]", 'an annotation without "image_id" or "caption"'))
            continue
        own = entry.get("id")
        if isinstance(own, int) and own in seen:
            aside.append(SetAside(f"annotation {own}", f"annotations[{number}] uses this id again: the first is kept"))
            continue
        seen.add(own if isinstance(own, int) else None)
        if image not in names:
            lost[image] += 1
        elif text.strip():
            found[image].append((own if isinstance(own, int) else number, storable(text).strip()))
    aside += [SetAside(image, f"{n} captions, but the file lists no such image") for image, n in lost.items()]
    return {image: [text for _, text in sorted(some)] for image, some in found.items()}, aside


def _id(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return storable(str(value))


def _image_folder(file: Path, names: Iterable[str], given: str | PathLike | None) -> Path:
    """The first folder that holds any of the images."""
    split = file.stem.removeprefix("captions").strip("_-") or "images"
    root = file.parent
    roots = [root.parent, root] if root.name == "annotations" else [root]
    tried = [f for base in roots for f in (base / split, base / "images" / split, base / "images", base)]
    tried = [Path(given)] if given is not None else tried
    there = [folder for folder in tried if folder.is_dir()]
    for folder in there:
        look = Folder(folder)
        for name in names:
            try:
                look.image(name)
            except InputError:
                continue
            return folder
    raise InputError(
        f"None of the images that {file} lists was found in {', '.join(map(str, tried))}. Put the folder {split} of images "
        f"there, or name it: coco:{file}?images=DIR"
    )
