"""Folders and files that are written whole or not at all, whatever ends the process.

1. They are written under another name, in the same parent folder.
2. They are brought to the disk (fsync).
3. Only then are they renamed to their own name.

A study's shards and galleries are such folders: Parquet tables and an about.json, which is sealed
(`mechvlm.outside.integrity`) and holds the SHA-256 of each table.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mechvlm.errors import InputError
from mechvlm.outside.durable import UNFINISHED, atomic_folder, sync_folder
from mechvlm.outside.integrity import check_file, check_seal, check_type, digests_of_files, read_json, sealed
from mechvlm.study.parquet import READ_ERRORS, check_parquet
from mechvlm.study.schema import GalleryAbout, ShardAbout

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one folder
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


def write_folder(folder: Path, tables: dict[str, pa.Table], about: dict) -> None:
    """Write each table as NAME.parquet, and `about` with their checksums as about.json.

    A folder that exists already is left as it is.
    """
    with atomic_folder(folder) as unfinished:
        for name, table in tables.items():
            with (unfinished / f"{name}.parquet").open("wb") as file:
                pq.write_table(table, file)
        content = sealed(about | {"files": digests_of_files(unfinished)})
        (unfinished / "about.json").write_text(json.dumps(content), encoding="utf-8")


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write a folder that was made elsewhere, from its files' contents by name.

    A folder that exists already is left as it is.
    """
    with atomic_folder(folder) as unfinished:
        for name, content in files.items():
            (unfinished / name).write_bytes(content)


def read_table(folder: Path, name: str) -> pa.Table:
    """One table of a folder that `write_folder` wrote.

    Raises:
        InputError: where it is damaged, which its checksum tells.
    """
    path = folder / f"{name}.parquet"
    try:
        check_file(path, read_about(folder)["files"].get(path.name))
        check_parquet(path)
        return pq.read_table(path, partitioning=None)
    except InputError:
        raise
    except READ_ERRORS as error:
        raise _damaged(path, error) from error


def read_about(folder: Path) -> dict:
    """The about.json of a folder that `write_folder` wrote.

    Raises:
        InputError: where it is damaged, or not what `write_folder` wrote.
    """
    path = folder / "about.json"
    try:
        content = read_json(path)
        check_seal(content)
        check_type(content, GalleryAbout if folder.name.endswith("-gallery") else ShardAbout)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return content


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_folder` wrote; None where nothing is."""
    try:
        for name, expected in read_about(folder)["files"].items():
            check_file(folder / name, expected)
    except InputError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{folder / name} is damaged ({error})"
    return None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged ({error}). Give the same command again: its folder is made anew.")


def remove(path: Path) -> None:
    """Delete a file, a folder with all in it, or a link, whose target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync_folder(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone. The lock ends with the process, however that ends.

    Raises:
        InputError: when another process holds it.
        OSError: when nothing can be written there.
    """
    with (folder / LOCK).open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"Another process is at work on the study in {folder}. Wait until it is done, or give another --out."
                ) from None
        yield
