"""Folders that are written whole or not at all, and stay written through a power loss.

They are written under another name beside their own, brought to the disk (fsync), and only then
renamed.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".tmp"
"""Suffix of unfinished files and folders. Whoever holds the folder's lock may delete them."""


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """An unfinished folder to write into, renamed to `folder` when the block ends."""
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}{UNFINISHED}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        sync_tree(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process was faster, and wrote the same.
            shutil.rmtree(unfinished)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def sync_tree(folder: Path) -> None:
    """Bring a folder and all in it to the disk, so that a later rename survives a power loss."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
