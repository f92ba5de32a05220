"""A study's folder while the study runs.

One process at a time works in it, always with the same settings. The results appear only when they
are whole, run.json last.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mechvlm.errors import InputError, ModelError
from mechvlm.outside.durable import UNFINISHED, sync_folder, sync_tree
from mechvlm.outside.integrity import read_json
from mechvlm.study.running.atomic import LOCK, locked, read_about, remove, write_text
from mechvlm.study.running.settings import SETTINGS_FILE, differences, read_settings, settings_digest

RESULTS = ("data", "figures", "views", "report.html", "skipped.csv", "run.json")
"""What a finished study's folder holds, in order of appearance. With a run.json it is whole."""
STAGING = f".results{UNFINISHED}"
"""Folder in which the results are put together."""
SHARDS = "shards"
SHARD_NAME = re.compile(r"\d+-(pairs-)?\d{5,}|\d+-gallery")
"""Names of the folders in `SHARDS` that a study makes; others are somebody else's and stay."""


@contextmanager
def claim_folder(folder: Path, settings: dict[str, Any]) -> Iterator[bool]:
    """Hold a study's folder for this process alone; gives whether the study in it is finished.

    The folder is new, empty, or holds a study that was begun with the same settings. Unfinished
    files of an earlier run are deleted, where they can be: a finished study may lie where nothing
    can be written. If an InputError or a ModelError comes before anything could be read, and this
    call began the study, everything that it wrote is deleted again.

    Raises:
        InputError: when the folder holds something else or a study with other settings, when
            another process works in it, or when nothing can be written to it.
    """
    settings = json.loads(json.dumps(settings))
    begun_here = False
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    with ExitStack() as stack:
        try:
            finished = _is_finished(folder, settings)
            if not finished:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder))
                # Once more: another process may have finished it before the lock was ours.
                finished = _is_finished(folder, settings)
            if finished:
                remove_working_files(folder)
            else:
                if (folder / SHARDS).is_symlink():
                    raise InputError(
                        f"{folder / SHARDS} is a link to {(folder / SHARDS).readlink()}, where a study would delete files. "
                        "Remove the link, and give the same command again."
                    )
                _remove_unfinished_files(folder)
                if begun_here := not (folder / SETTINGS_FILE).exists():
                    write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
                (folder / SHARDS).mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"Nothing can be written to {folder} ({error.strerror}). Give another --out.") from error
        try:
            yield finished
        except (InputError, ModelError):
            # A gallery's about.json has no "read": it exists only after examples were read.
            if begun_here and not any(read_about(shard).get("read", 1) for shard in _parts(folder)):
                remove_working_files(folder)
                (folder / SETTINGS_FILE).unlink()
                for path in created:
                    path.rmdir()
            raise


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the finished study with these settings.

    Raises:
        InputError: when it holds something else, or a study with other settings.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    earlier = read_settings(folder) if names else None
    if earlier is None and any(name != LOCK and not name.endswith(UNFINISHED) for name in names):
        raise InputError(
            f"The folder {folder} is not empty and holds no study to go on with; a study needs a new or an empty folder. "
            "Give another --out."
        )
    finished = "run.json" in names
    if earlier is not None and finished:
        # A finished study of an earlier format is read as it is.
        earlier = earlier | {"format": settings["format"]}
    if earlier is not None and earlier.get("format") != settings["format"]:
        raise InputError(
            f"{folder} holds a study that another version of mechvlm began (format {str(earlier.get('format'))[:20]} of its "
            f"parts, here {settings['format']}). Finish it with that version, or give another --out."
        )
    if earlier is not None and (differ := differences(earlier, settings)):
        raise InputError(
            f"{folder} holds a study that was made with other settings: {'; '.join(differ)}. Give the settings that it was made "
            "with, or another --out."
        )
    if finished and _digest_in_run(folder) not in (None, settings_digest(settings)):
        raise InputError(
            f"{folder / SETTINGS_FILE} is not of the study that {folder / 'run.json'} describes. Copy the study again, or give "
            "another --out."
        )
    return finished


def _digest_in_run(folder: Path) -> object:
    """The digest of the settings of a finished study; None where its run.json holds none."""
    try:
        return read_json(folder / "run.json").get("settings_digest")
    except (OSError, ValueError):  # `Study.open` says what is wrong with it
        return None


def _parts(folder: Path) -> list[Path]:
    """The folders of a study's shards and galleries."""
    return [path for path in (folder / SHARDS).iterdir() if SHARD_NAME.fullmatch(path.name)]


def _remove_unfinished_files(folder: Path) -> None:
    """Delete unfinished files and folders: those in this folder, and none that a link leads to."""
    for path in [*folder.glob(f".*{UNFINISHED}"), *(folder / SHARDS).glob(f".*{UNFINISHED}")]:
        remove(path)


def remove_working_files(folder: Path) -> None:
    """Delete what only an unfinished study needs: shards, half-made results and the lock.

    What cannot be deleted stays: a finished study may lie where nothing can be written.
    """
    with suppress(OSError):
        if (folder / SHARDS).is_symlink():
            remove(folder / SHARDS)
        elif (folder / SHARDS).is_dir():
            for path in [*_parts(folder), *(folder / SHARDS).glob(f".*{UNFINISHED}")]:
                remove(path)
            if not any((folder / SHARDS).iterdir()):
                (folder / SHARDS).rmdir()
        for name in (STAGING, LOCK):
            remove(folder / name)


@contextmanager
def publish_results(folder: Path) -> Iterator[Path]:
    """An empty folder to put the results in; when the block ends they are moved into `folder`.

    Where the block fails, they are deleted.
    """
    staging = folder / STAGING
    try:
        remove(staging)
        (staging / "data").mkdir(parents=True)
        yield staging
        sync_tree(staging)
        for name in RESULTS:
            if name == "run.json":
                sync_folder(folder)  # everything else is on the disk before it
            # An earlier run that was killed here, before its run.json, left results behind.
            target = folder / name
            remove(target)
            if (staging / name).exists():
                (staging / name).rename(target)
        staging.rmdir()
        sync_folder(folder)
    except BaseException:
        with suppress(OSError):
            remove(staging)
        raise
