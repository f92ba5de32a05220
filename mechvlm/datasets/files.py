"""Shared by all data sets of files: safe look-up of images, and text that a table can store."""

import os
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mechvlm.errors import InputError


class SetAside(NamedTuple):
    """An example that cannot be used, and the reason."""

    id: str
    reason: str


class ImageFolder:
    """A folder of images. Finding an image opens no file, and each directory is listed once."""

    def __init__(self, path: Path):
        self.path = path
        self._names = cache(self._list)

    def image(self, name: str) -> Path:
        """The path of an image, from its name relative to the folder.

        Raises:
            InputError: when the name leads out of the folder, or there is no such file.
        """
        parts = PurePosixPath(name).parts
        # A listing by somebody else must not bring other pictures of the disk into a report.
        if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
            raise InputError(f"the image {name!r} lies outside the folder")
        path = self.path / name
        if parts and parts[-1] in self._names(path.parent):
            return path
        try:
            # Some file systems accept several spellings of a name (é as one character or as two).
            is_file = path.is_file()
        except (OSError, ValueError) as error:
            raise InputError(f"no file can have the name {name[:40]!r}... ({error})") from None
        if not is_file:
            reason = "it is a folder" if path.is_dir() else "there is no such file"
            raise InputError(f"no image at {storable(str(path))}: {reason}")
        return path

    @staticmethod
    def _list(folder: Path) -> frozenset[str]:
        try:
            with os.scandir(folder) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file())
        except (OSError, ValueError):
            return frozenset()


def storable_captions(value: Any) -> tuple[str, ...] | None:
    """One caption or a list of captions, without empty ones, as a table can store them.

    None for a value that is neither a string nor a list of strings.
    """
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        return None
    return tuple(storable(text).strip() for text in value if text.strip())


def storable(text: str) -> str:
    """The text with "?" for lone surrogates, which JSON can contain and tables cannot store."""
    return text.encode("utf-8", "replace").decode()
