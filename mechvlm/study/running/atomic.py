"""Pieces of a study on disk: folders of Parquet tables that are there whole or not at all, whatever happens meanwhile.

A piece is written under another name in the same folder, brought to the disk, and only then given its own name.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mechvlm.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one folder
    fcntl = None  # type: ignore[assignment]

PASSING = ".tmp"
"""What has a name that ends so is not whole, and belongs to nobody once the folder's lock is held."""
LOCK = ".lock"


def write_piece(folder: Path, tables: dict[str, pa.Table], about: dict) -> None:
    """Write a piece: each table as NAME.parquet, and `about` as about.json. One that is there already is left as it is."""
    with _whole(folder) as passing:
        for name, table in tables.items():
            with (passing / f"{name}.parquet").open("wb") as file:
                pq.write_table(table, file)
        (passing / "about.json").write_text(json.dumps(about), encoding="utf-8")


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write a piece that was made elsewhere, from its files by name. One that is there already is left as it is."""
    with _whole(folder) as passing:
        for name, content in files.items():
            (passing / name).write_bytes(content)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder under another name to write to, which becomes `folder` when the block ends."""
    passing = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}{PASSING}")
    try:
        passing.mkdir(parents=True)
        yield passing
        sync(passing)
        try:
            passing.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another worker was faster; the same examples give the same tables.
            shutil.rmtree(passing)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(passing, ignore_errors=True)
        raise


def read_table(piece: Path, name: str) -> pa.Table:
    """One table of a piece.

    Raises:
        InputError: where it is damaged.
    """
    try:
        return pq.read_table(piece / f"{name}.parquet", partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise damaged(piece, error) from error


def read_about(piece: Path) -> dict:
    """A piece's about.json.

    Raises:
        InputError: where it is damaged.
    """
    try:
        return json.loads((piece / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(piece, error) from error


def damaged(piece: Path, error: Exception) -> InputError:
    return InputError(
        f"{piece} is damaged ({error}). Delete that folder and give the same command again: it is made anew."
    )


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    passing = path.with_name(f".{path.name}{PASSING}")
    with passing.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    passing.replace(path)
    sync_folder(path.parent)


def sync(folder: Path) -> None:
    """Bring a folder and everything in it to the disk: what is renamed afterwards survives a loss of power."""
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
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder alone. The lock goes with its process, however that ends.

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
