"""A study's folder while the study runs.

One process at a time works in it, always with the same settings. The results appear only when they
are whole, run.json last.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mechvlm.errors import InputError, ModelError
from mechvlm.study.running.atomic import LOCK, UNFINISHED, locked, read_about, sync_folder, sync_tree, write_text
from mechvlm.study.running.settings import SETTINGS_FILE, differences, read_settings

RESULTS = ("data", "figures", "views", "report.html", "skipped.csv", "run.json")
"""What a finished study's folder holds, in order of appearance. With a run.json it is whole."""
STAGING = f".results{UNFINISHED}"
"""Folder in which the results are put together."""
SHARDS = "shards"


@contextmanager
def claim_folder(folder: Path, settings: dict[str, Any]) -> Iterator[bool]:
    """Hold a study's folder for this process alone; gives whether the study in it is finished.

    The folder is new, empty, or holds a study that was begun with the same settings. Unfinished
    files of an earlier run are deleted. If an InputError or a ModelError comes before anything
    could be read, and this call began the study, everything that it wrote is deleted again.

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
            if begun_here and not any(read_about(shard).get("read", 1) for shard in (folder / SHARDS).iterdir()):
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
            f"{folder} holds a study that another version of mechvlm began (format {earlier.get('format')} of its parts, here "
            f"{settings['format']}), which numbers layers otherwise. Finish it with that version, or give another --out."
        )
    if earlier is not None and (differ := differences(earlier, settings)):
        raise InputError(
            f"{folder} holds a study that was made with other settings: {'; '.join(differ)}. Give the settings that it was made "
            "with, or another --out."
        )
    return finished


def _remove_unfinished_files(folder: Path) -> None:
    for path in [*folder.glob(f".*{UNFINISHED}"), *(folder / SHARDS).glob(f".*{UNFINISHED}")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_working_files(folder: Path) -> None:
    """Delete what only an unfinished study needs: shards, half-made results and the lock."""
    for name in (SHARDS, STAGING):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / LOCK).unlink(missing_ok=True)


@contextmanager
def publish_results(folder: Path) -> Iterator[Path]:
    """An empty folder to put the results in; when the block ends they are moved into `folder`.

    Where the block fails, they are deleted.
    """
    staging = folder / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "data").mkdir(parents=True)
        yield staging
        sync_tree(staging)
        for name in RESULTS:
            if name == "run.json":
                sync_folder(folder)  # everything else is on the disk before it
            # An earlier run that was killed here, before its run.json, left results behind.
            target = folder / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            if (staging / name).exists():
                (staging / name).rename(target)
        staging.rmdir()
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
