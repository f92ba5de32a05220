"""What comes from outside: text and names of files that somebody else wrote.

Studies, data sets, models and servers come from other people. Their text is shown by `printable`,
and the files that they name are opened by `file_inside`.
"""

import os
import re
import stat
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath

from mechvlm.errors import InputError

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move a cursor, colour or reorder text, or ring: escapes of terminals, and marks
of the direction of writing. A tab and a new line are left alone."""


def printable(text: object) -> str:
    r"""The text with each character that would act on a terminal written out.

    >>> printable("\x1b[2Jgone")
    '\\x1b[2Jgone'
    """
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def file_inside(folder: str | PathLike, name: object) -> Path:
    r"""The path of a regular file in a folder, from its name in a file that somebody else wrote.

    The name is relative to the folder, with `/`. Nothing is opened. A link may lead to another
    place of the same folder.

    Raises:
        InputError: for a name that is no text, is absolute, holds `..`, a drive (`C:`) or a server
            (`\\host`), for one that leaves the folder through a link, and for what is no regular
            file: a folder, a pipe, a device, or nothing at all.

    Example:
        >>> file_inside("study/views", "gallery-1.html")
        PosixPath('study/views/gallery-1.html')
    """
    there = require_inside(folder, name)
    path = Path(folder, str(name))
    try:
        real = path.resolve()
        kind = real.lstat().st_mode
    except (OSError, ValueError, RuntimeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise InputError(f"{there} cannot be read ({reason}).") from None
    if not real.is_relative_to(Path(folder).resolve()):
        raise InputError(
            f"{there} is, or lies behind, a link that leads out of this folder. Put the file itself there."
        )
    if not stat.S_ISREG(kind):
        raise InputError(f"{there} is no regular file (a folder, a pipe or a device): it is not read.")
    return path


def require_inside(folder: str | PathLike, name: object) -> str:
    """Raises InputError unless `name` leads into the folder, as text alone; see `file_inside`.

    Returns the beginning of a message about this name.
    """
    if not isinstance(name, str):
        raise InputError(f"The name of a file in {folder} is {name!r:.60}, not text.")
    there = f"The file {name!r:.200}, named in {folder},"
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts or not name:
        raise InputError(f"{there} lies outside of this folder: names must be relative to it, and lead nowhere else.")
    return there


def require_regular(path: Path, most: int, what: str) -> None:
    """Raises InputError unless `path` is a regular file of at most `most` bytes.

    Reading a pipe would wait for ever, and a device such as /dev/zero never ends.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}).") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} cannot be read: it is not a regular file.")
    if status.st_size > most:
        raise InputError(
            f"{path} has {status.st_size / 1e6:,.1f} MB, and {what} of at most {most / 1e6:,.1f} MB are read. Is it the "
            "right file?"
        )
