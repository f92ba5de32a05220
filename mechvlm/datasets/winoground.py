"""Winoground: pairs of images whose two captions consist of the same words.

`winoground:DIR` reads an `examples.jsonl` and the folder `images` beside it, in the format of
facebook/winoground:

    {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "...",
     "caption_1": "...", "tag": "Object", "secondary_tag": "", "num_main_preds": 1,
     "collapsed_tag": "Object"}

`winoground` reads facebook/winoground from the Hub, which needs access.

Source: Thrush et al. 2022, arXiv:2204.03162.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mechvlm.datasets.example import Example
from mechvlm.datasets.files import ImageFolder, SetAside, json_rows, none_usable, storable, storable_id
from mechvlm.errors import InputError
from mechvlm.inputs.images import StoredImage

HUB = "facebook/winoground"
LISTING = "examples.jsonl"
TAGS = ("tag", "secondary_tag", "num_main_preds", "collapsed_tag")
SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")


class Pair(NamedTuple):
    """Two images and two captions. Caption i is true of image i and false of the other image."""

    id: str
    images: tuple[Image.Image | Path | StoredImage, Image.Image | Path | StoredImage]
    captions: tuple[str, str]


def pairs_of(examples: Iterable[Example]) -> list[Pair]:
    """The pairs with both sides among the examples, in the order of their first sides.

    Raises:
        InputError: when there is no such pair.

    Example:
        >>> pairs_of(load_dataset("winoground:DIR").examples)
    """
    sides: dict[str, dict[int, Example]] = {}
    for example in examples:
        if "pair" in example.meta:
            sides.setdefault(example.meta["pair"], {})[example.meta["side"]] = example
    pairs = [
        Pair(pair, (both[0].image, both[1].image), (both[0].captions[0], both[1].captions[0]))
        for pair, both in sides.items()
        if len(both) == 2
    ]
    if not pairs:
        raise InputError("None of these examples is a pair with another. Winoground's examples are: winoground:DIR.")
    return pairs


def read_winoground(where: str | PathLike) -> tuple[list[Example], list[SetAside]]:
    """Read Winoground's files: both sides of every usable pair, and the pairs set aside.

    Pair 12 gives the examples "12-0" and "12-1", each an image with its own caption. Their `meta`
    holds `pair`, `side` (0 or 1), `other_caption` (the caption of the other image) and the tags. A
    pair with anything wrong is set aside whole. Images are only looked for, not opened.

    Raises:
        InputError: when there is no `examples.jsonl`, there are no images, or not one pair is
            usable.
    """
    where = Path(os.path.expanduser(where))
    listings = [where] if where.is_file() else [where / LISTING, where / "data" / LISTING]
    listing = next((file for file in listings if file.is_file()), None)
    if listing is None:
        raise InputError(
            f"{where} {'holds no ' + LISTING if where.is_dir() else 'is not there'}; winoground:DIR needs a folder with "
            f"{LISTING} and images/, as {HUB} has them."
        )
    folder = listing.parent / "images"
    if not folder.is_dir():
        zipped = (listing.parent / "images.zip").is_file()
        raise InputError(f"{folder} is not there. " + ("Unpack images.zip." if zipped else f"{HUB} has the images."))
    images = ImageFolder(folder)
    return _read(json_rows(listing), lambda entry, key: _file(images, entry.get(key)), str(listing))


def read_hub() -> tuple[list[Example], list[SetAside]]:
    """Read facebook/winoground with the library `datasets`, which keeps a copy of what it fetched.

    Raises:
        InputError: without access (the error says how to get it), or when the columns of the data
            set have changed.
    """
    from mechvlm.datasets import hub

    try:
        table = hub.open_table(HUB, split="test")
    except InputError as error:
        raise InputError(
            f"{HUB} cannot be read: {error} It is gated. Accept its conditions on https://huggingface.co/datasets/{HUB}, then "
            f"log in once with `hf auth login`. Or give its files: winoground:DIR, with {LISTING} and images/."
        ) from None
    image_columns = ["image_0", "image_1"]
    missing = [name for name in (*image_columns, "caption_0", "caption_1") if name not in table.column_names]
    if missing:
        raise InputError(f"{HUB} has no columns {', '.join(missing)}; it has {', '.join(table.column_names)}.")
    images = {column: hub.stored_images(table, column, hub.folders_of(HUB)) for column in image_columns}
    without_images = table.remove_columns(image_columns)
    entries = [(f"row {row}", {**entry, "row": row}) for row, entry in enumerate(without_images)]
    return _read(entries, lambda entry, column: images[column][entry["row"]], HUB)


def _read(
    entries: Sequence[tuple[str, Any]], image_of: Callable[[dict, str], Path | StoredImage], where: str
) -> tuple[list[Example], list[SetAside]]:
    """The examples of all usable pairs, and the pairs set aside.

    Args:
        entries: for each pair its name in messages and its entry, or the InputError of reading it.
        image_of: the image of an entry in the column "image_0" or "image_1".
        where: the listing's name in messages.
    """
    pairs: dict[str, list[Example]] = {}
    aside = []
    for number, (name, entry) in enumerate(entries):
        try:
            sides = _sides(entry, number, image_of)
            pair = name = sides[0].meta["pair"]
            if pair in pairs:
                raise InputError(f"entry {number + 1} uses this id again: the first with it is kept")
            pairs[pair] = sides
        except InputError as error:
            aside.append(SetAside(name, str(error)))
    if not pairs:
        raise InputError(f"{where} names no usable pair ({none_usable(aside, 'entries')}).")
    return [example for sides in pairs.values() for example in sides], aside


def _sides(entry: Any, number: int, image_of: Callable[[dict, str], Path | StoredImage]) -> list[Example]:
    """The two examples of a pair. `number` is its id where the entry has none."""
    if isinstance(entry, InputError):
        raise entry
    if not isinstance(entry, dict):
        raise InputError(f"a {type(entry).__name__}, not an object with image_0, image_1, caption_0 and caption_1")
    texts = [entry.get(f"caption_{side}") for side in (0, 1)]
    captions = [storable(text).strip() for text in texts if isinstance(text, str) and text.strip()]
    if len(captions) < 2:
        raise InputError('no "caption_0" or no "caption_1"')
    pair = storable_id(entry.get("id")) or str(number)
    tags = {key: entry[key] for key in TAGS if key in entry}
    return [
        Example(
            f"{pair}-{side}", image_of(entry, f"image_{side}"), (captions[side],),
            {"pair": pair, "side": side, "other_caption": captions[1 - side], **tags},
        )
        for side in (0, 1)
    ]  # fmt: skip


def _file(images: ImageFolder, name: Any) -> Path:
    """The file of an image; the listing may leave out the suffix, as facebook/winoground does."""
    if not isinstance(name, str) or not name:
        raise InputError('no "image_0" or no "image_1", the name of a file in images/')
    reasons = []
    for suffix in SUFFIXES:
        try:
            return images.image(name + suffix)
        except InputError as error:
            reasons.append(error)
    raise reasons[0]
