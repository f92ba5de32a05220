"""A folder of images with a `captions.jsonl`: one line of JSON for each image.

    {"image": "kitchen.jpg", "captions": ["a kitchen", "pots on a stove"]}
    {"image": "more/dog.png", "caption": "a dog asleep", "id": "dog-1"}

`image` is relative to the folder. `id` is optional; its default is the image's path.
"""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from mechvlm.datasets.example import Example
from mechvlm.datasets.files import ImageFolder, SetAside, storable, storable_captions
from mechvlm.errors import InputError

CAPTION_FILE = "captions.jsonl"


def read_folder(folder: str | PathLike) -> tuple[list[Example], list[SetAside]]:
    """Read a folder: its usable examples in the order of `captions.jsonl`, and those set aside.

    Images are only looked for, not opened. A broken image is found later, when
    `mechvlm.inputs.images.open_image` opens it; its error says what is wrong.

    Raises:
        InputError: when nothing can be used: there is no such folder, no `captions.jsonl`, or not
            one usable line in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is {'a file' if folder.exists() else 'not there'}; folder:DIR needs a folder of images with a "
            f"{CAPTION_FILE} in it."
        )
    listing = folder / CAPTION_FILE
    try:
        # Not splitlines(): a caption may hold the other characters that end a line.
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(
            f'{folder} holds no {CAPTION_FILE}. Write one line for each image: {{"image": "a.jpg", "captions": ["..."]}}'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{listing} cannot be read ({error}). It should be a text file in UTF-8.") from error
    images = ImageFolder(folder)
    examples: dict[str, Example] = {}
    aside = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{CAPTION_FILE} line {number}"
        try:
            example = _example(images, line)
            if example.id in examples:
                name = example.id
                raise InputError(
                    f"line {number} of {CAPTION_FILE} uses this id again: the first line with it is kept. Write all captions of "
                    "an image in one line"
                )
            examples[example.id] = example
        except InputError as error:
            aside.append(SetAside(name, str(error)))
    if not examples:
        why = f"{len(aside)} lines, none usable; {aside[0].id}: {aside[0].reason}" if aside else "it is empty"
        raise InputError(f"{listing} names no usable example ({why}).")
    return list(examples.values()), aside


def _example(folder: ImageFolder, line: str) -> Example:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or not entry["image"]:
        raise InputError('no "image", the name of a file in the folder')
    image = entry["image"]
    path = folder.image(image)
    captions = storable_captions(entry.get("captions", entry.get("caption")))
    if captions is None:
        raise InputError(f'the image {image!r} has no "captions", a list of strings')
    if not captions:
        raise InputError(f"every caption of the image {image!r} is empty")
    id = entry.get("id")
    if isinstance(id, bool | dict | list | float):
        raise InputError(f'the image {image!r} has the "id" {id!r}; an id is a string or a whole number')
    return Example(storable(image if id is None or id == "" else str(id)), path, captions)
