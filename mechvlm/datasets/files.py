"""Shared by all data sets of files: look-up of images, rows of JSON, and what a table can store."""

import json
import os
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from mechvlm.errors import InputError
from mechvlm.outside.files import require_regular

LARGEST_LISTING = 100_000_000
"""Bytes of a file that lists images: COCO's largest has 92 MB."""
MOST_VALUES = 8_000_000
"""Values in such a file: COCO's largest has about 4 million, and each takes up to 100 bytes."""
CAPTION_COLUMNS = ("captions", "caption", "sentences", "text")
"""What data sets call the captions of an image."""
CAPTION_TEXT = ("raw", "caption", "text")
"""Where a caption that is a dict holds its text: {"raw": "a cat", "sentid": 3}."""


class SetAside(NamedTuple):
    """An example that cannot be used, and the reason."""

    id: str
    reason: str


def none_usable(aside: Sequence[SetAside], unit: str) -> str:
    """Why nothing is left: how many were set aside, and the reasons of the first three."""
    if not aside:
        return "it is empty"
    reasons = [f"{id}: {reason}" for id, reason in aside[:3]]
    more = [f"and {len(aside) - 3:,} more"] if len(aside) > 3 else []
    return "; ".join([f"{len(aside):,} {unit}, none usable", *reasons, *more])


class ImageFolder:
    """A folder of images. Finding an image opens no file, and each directory is listed once."""

    def __init__(self, path: Path):
        self.path = path
        self._entries = cache(_entries)
        self._composed = cache(lambda folder: {_composed(name): name for name in self._entries(folder)})
        self._folded = cache(lambda folder: {name.casefold(): name for name in self._entries(folder)})

    def image(self, name: str) -> Path:
        r"""The path of an image, from its name relative to the folder.

        Two spellings of a name are one: é as one character or as two. `sub\a.png` is `sub/a.png`,
        unless a file has that very name. An absolute name may lead into the folder, but no name
        leads out of it, nor does a link: a listing by somebody else must not bring other pictures
        of the disk into a report.

        Raises:
            InputError: when the name or a link leads out of the folder, or there is no such file.
        """
        path = self.path
        try:
            for part in self._parts(name):
                path = path / self._spelling(path, part)
                self._require_inside(path)
            if self._entries(path.parent).get(path.name) == "file":
                return path
            # Some file systems do not tell a from A.
            is_file = path.is_file()
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"no file can have the name {name[:40]!r}... ({error})") from None
        if not is_file:
            raise InputError(f"no image at {storable(str(path))}: {self._absence(path)}")
        return path

    def key(self, path: Path) -> str:
        """The id of an image of this folder: its place in it, the same on every machine."""
        return storable(_composed(path.relative_to(self.path).as_posix()))

    def _parts(self, name: str) -> tuple[str, ...]:
        """The folders and the file of a name, which leads nowhere else."""
        if "\\" in name and not (self.path / name).is_file():
            name = name.replace("\\", "/")
        if Path(name).is_absolute():
            for folder in (self.path.absolute(), self.path.resolve()):
                if Path(name).is_relative_to(folder):
                    name = Path(name).relative_to(folder).as_posix()
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or ".." in parts:
            raise InputError(f"the image {name!r} lies outside the folder")
        return parts

    def _spelling(self, folder: Path, name: str) -> str:
        return name if name in self._entries(folder) else self._composed(folder).get(_composed(name), name)

    def _require_inside(self, path: Path) -> None:
        if self._entries(path.parent).get(path.name) != "link":
            return
        target = path.resolve()
        if not target.is_relative_to(self.path.resolve()):
            raise InputError(
                f"the image {storable(str(path))} lies outside the folder: it is, or lies behind, a link to "
                f"{storable(str(target))}. Put the file itself there"
            )

    def _absence(self, path: Path) -> str:
        if path.is_dir():
            return "it is a folder"
        if path.is_symlink():
            return f"it is a link to {storable(str(path.readlink()))}, where there is no such file"
        other = self._folded(path.parent).get(path.name.casefold())
        return "there is no such file" + (f", but {storable(other)!r}" if other else "")


def _entries(folder: Path) -> dict[str, str]:
    """{name: "link", "file" or "other"} of a folder; of none, nothing."""
    try:
        with os.scandir(folder) as entries:
            return {e.name: "link" if e.is_symlink() else "file" if e.is_file() else "other" for e in entries}
    except (OSError, ValueError):
        return {}


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def listing_text(listing: Path) -> str:
    """The text of a file that lists images, of a bounded size and number of values.

    Raises:
        InputError: for a file that is larger, no regular file, or not text in UTF-8.
    """
    require_regular(listing, LARGEST_LISTING, "files that list images")
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{listing} cannot be read ({error}). It should be a text file in UTF-8.") from error
    if (n_values := sum(map(text.count, "[{,\n"))) > MOST_VALUES:
        raise InputError(
            f"{listing} holds about {n_values:,} values; at most {MOST_VALUES:,} are read. Is it the right file?"
        )
    return text


def json_rows(listing: Path) -> list[tuple[str, Any]]:
    """The rows of a file of JSON lines, each with its name for messages: "captions.jsonl line 3".

    Blank lines are left out. A row that is not JSON is given as the InputError that says so. A file
    that is one JSON array is read as well; its rows are then called "captions.jsonl entry 3".

    Raises:
        InputError: for a file that cannot be read as text, or an array that is broken.
    """
    text = listing_text(listing)
    if (rows := _rows_of_one_value(listing, text)) is not None:
        return [(f"{listing.name} entry {number}", row) for number, row in enumerate(rows, start=1)]
    # Not splitlines(): a caption may hold the other characters that end a line.
    lines = enumerate(text.split("\n"), start=1)
    return [(f"{listing.name} line {number}", _row(line)) for number, line in lines if line.strip()]


def _row(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputError(f"not JSON ({error})")


def _rows_of_one_value(listing: Path, text: str) -> list | None:
    """The rows of a file that is one JSON array, or one object over several lines.

    None for a file with a value on each line.
    """
    first, _, rest = text.strip().partition("\n")
    is_array = first.startswith("[")
    if not (is_array or rest) or (rest and not isinstance(_row(first), InputError)):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if is_array:
            raise InputError(
                f"{listing} begins as one JSON array, which is broken ({error}). Write one line of JSON for each image, or a "
                "whole array."
            ) from None
        return None
    return value if isinstance(value, list) else [value]


def storable_captions(value: Any) -> tuple[str, ...]:
    """One caption or a list of them, as a table can store them; without the empty and null ones.

    A caption is a string, or a dict that holds it under one of `CAPTION_TEXT`.

    Raises:
        InputError: for any other value; the message goes on from "the captions".
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (storable(value).strip(),) if value.strip() else ()
    if isinstance(value, list | tuple):
        return tuple(text for part in value for text in storable_captions(part))
    if not isinstance(value, dict):
        raise InputError(f"hold {str(value)[:40]!r}, which is neither a string nor a list of strings")
    keys = [key for key in CAPTION_TEXT if key in value]
    if len(keys) != 1:
        raise InputError(
            f"hold a dict with {', '.join(map(repr, value)) or 'nothing'}; its text should be under one of "
            f"{', '.join(map(repr, CAPTION_TEXT))}"
        )
    return storable_captions(value[keys[0]])


def storable_id(value: Any) -> str | None:
    """An id as tables store it; None for null and for an empty one.

    Raises:
        InputError: for a value that is neither a string nor a whole number.
    """
    # A column of whole numbers in which one is missing comes as 1.0, 2.0, ...
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InputError(f'the "id" is {value!r}; an id is a string or a whole number')
    return storable(str(value))


def storable(text: str) -> str:
    """The text with "?" for lone surrogates, which JSON can contain and tables cannot store."""
    return text.encode("utf-8", "replace").decode()
