"""A study's folder while the study runs: one process at a time, the same settings, results that appear when they are whole."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mechvlm.errors import InputError, ModelError
from mechvlm.study.running import settings as asked
from mechvlm.study.running.atomic import LOCK, PASSING, locked, read_about, sync, sync_folder, write_text

RESULTS = ("data", "figures", "views", "report.html", "skipped.csv", "run.json")
"""What a finished study's folder holds, in the order in which it appears: one with a run.json is whole."""
STAGE = f".results{PASSING}"
SHARDS = "shards"


@contextmanager
def opened(folder: Path, settings: dict[str, Any]) -> Iterator[bool]:
    """A study's folder, held alone: a new one, or one that was begun with the same settings. Gives whether it is finished.

    What an earlier run left half-written is taken away. So is a folder that was begun here, where an InputError or a ModelError
    comes before anything could be read.

    Raises:
        InputError: when it holds something else, a study with other settings, or another process's work.
    """
    settings = json.loads(json.dumps(settings))
    new, made = False, [one for one in (folder, *folder.parents) if not one.exists()]
    with ExitStack() as stack:
        try:
            finished = _finished(folder, settings)
            if not finished:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder))
                # Once more, now that nobody else can be at work here.
                finished = _finished(folder, settings)
            if finished:
                clear(folder)
            else:
                for path in [*folder.glob(f".*{PASSING}"), *(folder / SHARDS).glob(f".*{PASSING}")]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                if new := not (folder / asked.FILE).exists():
                    write_text(folder / asked.FILE, json.dumps(settings, indent=2) + "\n")
                (folder / SHARDS).mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"Nothing can be written to {folder} ({error.strerror}). Give another --out.") from error
        try:
            yield finished
        except (InputError, ModelError):
            if new and not any(read_about(piece).get("read", 1) for piece in (folder / SHARDS).iterdir()):
                clear(folder)
                (folder / asked.FILE).unlink()
                for one in made:
                    one.rmdir()
            raise


def _finished(folder: Path, settings: dict[str, Any]) -> bool:
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    was = asked.read_settings(folder) if there else None
    if was is None and any(name != LOCK and not name.endswith(PASSING) for name in there):
        raise InputError(
            f"The folder {folder} is not empty, and holds no study that could go on; a study goes to a new or an empty one. "
            "Give another --out."
        )
    if was is not None and (differ := asked.differences(was, settings)):
        raise InputError(
            f"{folder} holds a study that was made with other settings: {'; '.join(differ)}. Give the settings that it was made "
            "with, or another --out."
        )
    return "run.json" in there


def clear(folder: Path) -> None:
    """Take away what only an unfinished study needs."""
    for name in (SHARDS, STAGE):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / LOCK).unlink(missing_ok=True)


@contextmanager
def stage(folder: Path) -> Iterator[Path]:
    """An empty folder for the results; they are published when the block ends, and taken away where it fails."""
    staged = folder / STAGE
    try:
        shutil.rmtree(staged, ignore_errors=True)
        (staged / "data").mkdir(parents=True)
        yield staged
        sync(staged)
        for name in RESULTS:
            if name == "run.json":
                sync_folder(folder)
            # Left by a run that was killed right here, before its run.json.
            target = folder / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            if (staged / name).exists():
                (staged / name).rename(target)
        staged.rmdir()
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
