"""Kills a study again and again (SIGKILL), and compares its tables with an uninterrupted one's.

    python tests/helpers/killed.py KILLS SEED
    python tests/helpers/killed.py every

Half of the kills come after a random time, half at a random step on the disk. A step is anything
that the study opens for writing, renames or deletes in its folder: so kills also come in the middle
of a shard, between its last byte and its name, and while results are put together. With `every`,
one kill comes at each of those steps.

Prints JSON: kills, folders, and where the kills fell. This is a process of its own because children
are forked from it, and forking is safe only before any thread has run.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from mechvlm.datasets import Dataset, Example, fingerprint
from mechvlm.study import run
from mechvlm.study.report import figures
from mechvlm.study.running import merge, rows, settings, shards
from mechvlm.study.running.workspace import SHARDS, STAGING

EXAMPLES, BATCH, FIGURES = 7, 2, b"a figure"
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def study(vlm, data: Dataset, out: Path, kill_at: int = 0, steps: list | None = None) -> None:
    """Run the study in this process, which kills itself at its `kill_at`-th step on the disk.

    With 0 it is not killed. Each step is appended to `steps`.
    """
    inside, n_steps = str(out), 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal n_steps
        reads = event == "open" and arguments[1] in ("r", "rb")
        if event not in EVENTS or reads or not str(arguments[0]).startswith(inside):
            return
        n_steps += 1
        if steps is not None:
            steps.append(event)
        if n_steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run([vlm], data, prompt="what is this", batch_size=BATCH, out=out)


def forked(work, *arguments) -> int:
    """Call `work` in a child process; gives the child's id."""
    child = os.fork()
    if child:
        return child
    try:
        work(*arguments)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def place(out: Path) -> str:
    """How far a study came, judged by what its folder holds."""
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if "run.json" in names:
        return "after run.json"
    if "data" in names:
        return "between results"
    if STAGING in names:
        return "while results are written"
    shards = {p.name for p in (out / SHARDS).iterdir()} if SHARDS in names else set()
    if any(name.endswith(".tmp") for name in shards):
        return "while a shard is written"
    return f"{sum('gallery' not in s for s in shards)} shards done" if shards else "before the first shard"


def tables(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "data").glob("*.parquet"))}


def small_figures(study, folder: Path) -> dict[str, str]:
    """Placeholders: figures take seconds, and a study always draws them anew from its tables."""
    folder.mkdir()
    for name in figures.FIGURES:
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").write_bytes(FIGURES)
    return dict.fromkeys(figures.FIGURES, "")


def main(kills: int | None, seed: int, home: Path) -> dict:
    torch.set_num_threads(1)
    vlm = mv.load(*llava(layers=2))
    # Shards of one batch, so that there are several.
    settings.EXAMPLES_PER_SHARD = BATCH
    shards.GALLERY_EXAMPLES = rows.GALLERY_EXAMPLES = merge.GALLERY_EXAMPLES = 2
    figures.save_all = small_figures
    examples = tuple(Example(f"e{i}", noise_image(i), (f"a picture number {i} of a dog",)) for i in range(EXAMPLES))
    data = Dataset("made", examples, (), fingerprint(examples))

    # Once in this process, so that no child has to compile templates and the like.
    study(vlm, data, home / "warm")
    # Once more, forked, to clock it.
    clock = time.perf_counter()
    whole = home / "whole"
    assert os.waitpid(forked(study, vlm, data, whole), 0)[1] == 0
    # Where the machine is busy and the study slow, kills still come within 1.5 s, earlier in it.
    seconds = min(time.perf_counter() - clock, 1.5)
    expected = tables(whole)

    def count(file: Path) -> None:
        steps: list[str] = []
        study(vlm, data, home / "counted", steps=steps)
        file.write_text(str(len(steps)))

    assert os.waitpid(forked(count, home / "steps"), 0)[1] == 0
    n_steps = int((home / "steps").read_text())

    def check(out: Path) -> None:
        actual = tables(out)
        assert actual.keys() == expected.keys()
        for name in expected:
            assert actual[name] == expected[name], f"{name} differs in {out}, seed {seed}"
        left = {p.name for p in out.iterdir()}
        assert left == {p.name for p in whole.iterdir()}, left
        assert not list(out.rglob("*.tmp"))

    def killed(out: Path, step: int, delay: float | None = None) -> bool:
        """Whether the study was killed before it was done."""
        nonlocal n_killed
        child = forked(study, vlm, data, out, step)
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0
        if os.WIFSIGNALED(status):
            n_killed += 1
            where[place(out)] += 1
        return os.WIFSIGNALED(status)

    rng, where = random.Random(seed), Counter()
    n_killed = folders = 0
    while n_killed < (n_steps if kills is None else kills):
        out = home / f"killed-{folders}"
        folders += 1
        if kills is None:
            assert killed(out, folders)
        else:
            attempts = (
                (rng.randint(1, n_steps), None) if rng.random() < 0.5 else (0, rng.uniform(0, seconds))
                for _ in range(10)
            )
            while (attempt := next(attempts, None)) and killed(out, *attempt):
                pass
        # One more run finishes the study; a finished one stays as it is.
        assert not killed(out, 0)
        check(out)
    return {
        "kills": n_killed,
        "folders": folders,
        "steps": n_steps,
        "seconds": seconds,
        "where": dict(sorted(where.items())),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kills_and_seed = (None, 0) if sys.argv[1] == "every" else (int(sys.argv[1]), int(sys.argv[2]))
        print(json.dumps(main(*kills_and_seed, Path(folder))))
