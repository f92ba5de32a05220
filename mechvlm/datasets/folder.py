"""A folder of images with a `captions.jsonl`: one line of JSON for each image.

    {"image": "kitchen.jpg", "captions": ["a kitchen", "pots on a stove"]}
    {"image": "more/dog.png", "caption": "a dog asleep", "id": "dog-1"}

`image` lies in the folder: its name is relative to it, or absolute and leads into it. Captions are
strings, or dicts that hold one under "raw", "caption" or "text". `id` is optional; its default is
the image's place in the folder. A file that is one JSON array of such rows is read too.

Where there is no `captions.jsonl`, Hugging Face's `metadata.jsonl` of an imagefolder is read, which
calls the image `file_name`.
"""

import os
from os import PathLike
from pathlib import Path
from typing import Any

from mechvlm.datasets.example import Example
from mechvlm.datasets.files import (
    CAPTION_COLUMNS,
    ImageFolder,
    SetAside,
    json_rows,
    none_usable,
    storable_captions,
    storable_id,
)
from mechvlm.errors import InputError

CAPTION_FILE = "captions.jsonl"
IMAGEFOLDER_FILE = "metadata.jsonl"
CAPTION_KEYS = ("captions", "caption")
"""The keys of captions.jsonl. A row that has them may say other things under "text"."""


def read_folder(folder: str | PathLike) -> tuple[list[Example], list[SetAside]]:
    """Read a folder: its usable examples in the order of the listing, and those set aside.

    Images are only looked for, not opened. A broken image is found later, when
    `mechvlm.inputs.images.open_image` opens it; its error says what is wrong.

    Raises:
        InputError: when nothing can be used: there is no such folder, no listing in it, or not one
            usable row in that.

    Example:
        >>> examples, set_aside = read_folder("photos")
        >>> examples[0].id, examples[0].captions
    """
    folder = Path(os.path.expanduser(folder))
    if not folder.is_dir():
        raise InputError(
            f"{folder} is {'a file' if folder.exists() else 'not there'}; folder:DIR needs a folder of images with a "
            f"{CAPTION_FILE} in it."
        )
    listing = _listing(folder)
    images = ImageFolder(folder)
    examples: dict[str, Example] = {}
    aside = []
    rows = json_rows(listing)
    for name, row in rows:
        try:
            example = _example(images, row)
            if example.id in examples:
                place, name = name.removeprefix(f"{listing.name} "), example.id
                raise InputError(
                    f"{place} of {listing.name} uses this id again: the first with it is kept. Write all captions of an image "
                    "in one row"
                )
            examples[example.id] = example
        except InputError as error:
            aside.append(SetAside(name, str(error)))
    if not examples:
        unit = "entries" if rows and " entry " in rows[0][0] else "lines"
        raise InputError(f"{listing} names no usable example ({none_usable(aside, unit)}).")
    return list(examples.values()), aside


def _listing(folder: Path) -> Path:
    """The file that lists the images; otherwise an error that says which files there are."""
    for name in (CAPTION_FILE, IMAGEFOLDER_FILE):
        if (folder / name).exists():
            return folder / name
    shape = '{"image": "a.jpg", "captions": ["..."]}'
    message = f"{folder} holds no {CAPTION_FILE}. Write one line for each image: {shape}"
    endings = ("csv", "json", "jsonl", "parquet", "tsv")
    metadata = [path for place in ("", "*/") for ending in endings for path in folder.glob(f"{place}metadata.{ending}")]
    if metadata:
        first = min(path.relative_to(folder) for path in metadata)
        raise InputError(f"{message}. It holds {first}: if that is an imagefolder's, hf:{folder} reads it.")
    others = sorted(path.name for ending in endings for path in folder.glob(f"*.{ending}"))
    raise InputError(message + (f". It holds {', '.join(others[:3])}" if others else ""))


def _example(images: ImageFolder, row: Any) -> Example:
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f'a {type(row).__name__}, not an object with "image" and "captions"')
    image = row.get("image") or row.get("file_name")
    if not isinstance(image, str):
        raise InputError(
            f'no "image", the name of a file in the folder: it holds {", ".join(map(repr, row)) or "nothing"}'
        )
    path = images.image(image)
    filled = [key for key in CAPTION_COLUMNS if row.get(key) is not None]
    keys = [key for key in filled if key in CAPTION_KEYS] or filled
    if not keys:
        raise InputError(f'the image {image!r} has no "captions", a list of strings')
    if len(keys) > 1:
        raise InputError(f"the image {image!r} has both {' and '.join(map(repr, keys))}: put all its captions into one")
    try:
        captions = storable_captions(row[keys[0]])
    except InputError as error:
        raise InputError(f"the {keys[0]!r} of the image {image!r} {error}") from None
    if not captions:
        raise InputError(f"every caption of the image {image!r} is empty")
    id = storable_id(row.get("id"))
    return Example(images.key(path) if id is None else id, path, captions)
