"""What every data set of files shares: whether a name lies in its folder, whether it is there, and what a table can store."""

import os
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mechvlm.errors import InputError


class SetAside(NamedTuple):
    """An example that cannot be used, and why."""

    id: str
    reason: str


class Folder:
    """A folder of images. Each directory is listed once: no image is opened, and none that is there is looked at alone."""

    def __init__(self, path: Path):
        self.path = path
        self._names = cache(self._listed)

    def image(self, name: str) -> Path:
        """The file of an image that a listing names relative to the folder.

        Raises:
            InputError: where it leads out of the folder, or there is no such file.
        """
        parts = PurePosixPath(name).parts
        # A listing from elsewhere must not make a report show pictures from the rest of the disk.
        if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
            raise InputError(f"the image {name!r} lies outside the folder")
        path = self.path / name
        if parts and parts[-1] in self._names(path.parent):
            return path
        try:
            # Some file systems know a name by several spellings (é as one character or two).
            there = path.is_file()
        except (OSError, ValueError) as error:
            raise InputError(f"no file can have the name {name[:40]!r}... ({error})") from None
        if not there:
            path_shown = storable(str(path))
            raise InputError(
                f"no image at {path_shown}: {'it is a folder' if path.is_dir() else 'there is no such file'}"
            )
        return path

    @staticmethod
    def _listed(folder: Path) -> frozenset[str]:
        try:
            with os.scandir(folder) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file())
        except (OSError, ValueError):
            return frozenset()


def texts(value: Any) -> tuple[str, ...] | None:
    """One caption or a list of them without the empty ones, as a table can store them; None where it is neither."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        return None
    return tuple(storable(text).strip() for text in value if text.strip())


def storable(text: str) -> str:
    """JSON can spell half a surrogate pair, which no table can store."""
    return text.encode("utf-8", "replace").decode()
