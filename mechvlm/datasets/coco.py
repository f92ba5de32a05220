"""Captions in COCO's format: a `captions_*.json` and a folder of images.

Source: Lin et al. 2014 (COCO); Chen et al. 2015 (its captions).

    {"images": [{"id": 397133, "file_name": "000000397133.jpg", ...}, ...],
     "annotations": [{"id": 370509, "image_id": 397133, "caption": "A man makes pizzas."}, ...]}

The images are looked for where COCO unpacks them (`val2017/` beside
`annotations/captions_val2017.json`), in `images/`, and beside the captions file.
`coco:FILE?images=DIR` names another folder.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from mechvlm.datasets.example import Example
from mechvlm.datasets.files import ImageFolder, SetAside, listing_text, none_usable, storable
from mechvlm.errors import InputError


def read_coco(where: str | PathLike, images: str | PathLike | None = None) -> tuple[list[Example], list[SetAside]]:
    """Read COCO captions: the usable examples in the order of the file, and those set aside.

    An example's id is COCO's image id. Its captions are all captions of the image, in the order of
    the annotations' ids. `meta["file_name"]` is the name of the image file. Images are only looked
    for, not opened.

    Args:
        where: a captions file, or a folder that holds one, either directly or in `annotations/`.
        images: the folder of the images; by default it is looked for beside the file.

    Raises:
        InputError: when there is no captions file, or there are several; when the file is not JSON
            (the error gives the position), or does not have this structure; or when not one of its
            images is found.
    """
    file = _captions_file(Path(os.path.expanduser(where)))
    listed, annotations = _content(file)
    names, aside = _names(listed)
    captions, strays = _captions(annotations, names)
    folder = ImageFolder(_image_folder(file, names.values(), images))
    examples = []
    for key, name in names.items():
        try:
            if not captions.get(key):
                raise InputError(f"the file has no caption of the image {name!r}")
            examples.append(Example(key, folder.image(name), tuple(captions[key]), {"file_name": name}))
        except InputError as error:
            aside.append(SetAside(key, str(error)))
    if not examples:
        raise InputError(f"{file} names no usable example ({none_usable(aside, 'images')}).")
    return examples, aside + strays


def _captions_file(where: Path) -> Path:
    if where.is_file():
        return where
    if not where.is_dir():
        raise InputError(f"{where} is not there; coco:DIR needs a folder with a captions_*.json, or that file itself.")
    files = sorted(file for folder in (where, where / "annotations") for file in folder.glob("captions*.json"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(str(file.relative_to(where)) for file in files)
        raise InputError(f"{where} holds {len(files)} files of captions ({names}). Name one: coco:{files[0]}")
    others = sorted(str(f.relative_to(where)) for f in (*where.glob("*.json"), *where.glob("annotations/*.json")))
    hint = f"It holds {', '.join(others[:5])}; if one of them is" if others else "If another file is"
    raise InputError(
        f"{where} holds no captions_*.json, nor does its folder annotations. {hint} in COCO's captions format, name it: "
        f"coco:{where / 'FILE.json'}"
    )


def _content(file: Path) -> tuple[list, list]:
    text = listing_text(file)
    try:
        content: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file} is not JSON: {error.msg} at line {error.lineno}, column {error.colno} (character {error.pos:,} of "
            f"{len(error.doc):,}). If the file ends there, download it again."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error}). It should be JSON in UTF-8.") from None
    shape = '{"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}'
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not COCO's {shape}.")
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise InputError(f"{file} holds {', '.join(map(repr, content)) or 'nothing'}, not COCO's {shape}.")
    if annotations and not any(isinstance(a, dict) and "caption" in a for a in annotations):
        first = next((a for a in annotations if isinstance(a, dict)), {})
        raise InputError(
            f"{file} has annotations without captions (the first holds {', '.join(map(repr, first)) or 'nothing'}): it is "
            "another of COCO's files, and captions_*.json is needed."
        )
    return images, annotations


def _names(listed: list) -> tuple[dict[str, str], list[SetAside]]:
    """{image id: file name}, and the entries that lack either or repeat an id."""
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
    """{image id: captions in the order of their ids}, and the entries that cannot be used."""
    numbered: dict[str, list[tuple[int, str]]] = defaultdict(list)  # {image id: [(id, caption)]}
    seen_ids, aside = set(), []
    n_strays: dict[str, int] = defaultdict(int)  # captions of images that the file does not list
    for number, entry in enumerate(annotations):
        image = _id(entry.get("image_id")) if isinstance(entry, dict) else None
        text = entry.get("caption") if isinstance(entry, dict) else None
        if image is None or not isinstance(text, str):
            aside.append(SetAside(f"annotations[{number}]", 'an annotation without "image_id" or "caption"'))
            continue
        id = entry.get("id")
        if isinstance(id, int) and id in seen_ids:
            aside.append(SetAside(f"annotation {id}", f"annotations[{number}] uses this id again: the first is kept"))
            continue
        seen_ids.add(id if isinstance(id, int) else None)
        if image not in names:
            n_strays[image] += 1
        elif text.strip():
            numbered[image].append((id if isinstance(id, int) else number, storable(text).strip()))
    aside += [SetAside(image, f"{n} captions, but the file lists no such image") for image, n in n_strays.items()]
    return {image: [text for _, text in sorted(captions)] for image, captions in numbered.items()}, aside


def _id(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return storable(str(value))


def _image_folder(file: Path, names: Iterable[str], images: str | PathLike | None) -> Path:
    """The folder `images`, or the first usual one, provided that it holds any of the images."""
    split = file.stem.removeprefix("captions").strip("_-") or "images"
    root = file.parent
    roots = [root.parent, root] if root.name == "annotations" else [root]
    usual = [f for base in roots for f in (base / split, base / "images" / split, base / "images", base)]
    candidates = [Path(os.path.expanduser(images))] if images is not None else usual
    for folder in candidates:
        if not folder.is_dir():
            continue
        image_folder = ImageFolder(folder)
        for name in names:
            try:
                image_folder.image(name)
            except InputError:
                continue
            return folder
    raise InputError(
        f"None of the images that {file} lists was found in {', '.join(map(str, candidates))}. Put the folder {split} of "
        f"images there, or name it: coco:{file}?images=DIR"
    )
