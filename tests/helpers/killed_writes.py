"""Kills other long work than studies again and again (SIGKILL), and goes on to the same bytes.

    python tests/helpers/killed_writes.py WORK KILLS SEED

WORK is "result" (a result is saved over an earlier one), "conversion" (of a MiniGPT-4 checkpoint),
or "training" (as of the bundled models). Half of the kills come after a random time, half at a
random step on the disk, as in helpers/killed.py. After each kill, what has its final name is whole.

Prints JSON: kills, and how many left the work undone.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

import mechvlm as mv
from helpers.killed import EVENTS, forked
from helpers.older_files import BLOCKS, QUERY_WIDTH, eva_file, llama_folder, projection, qformer_file, trained_file
from mechvlm.outside.integrity import SEAL

SCRIPTS = Path(mv.__file__).parents[1] / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "convert")]
STEPS = 1000


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file.

    Of a result it is the checksum, since safetensors writes the entries of a header in a random
    order; of a training's checkpoint all that is in it, since pickle numbers texts by identity.
    """

    def content(path: Path) -> bytes:
        if path.name == "a.safetensors":
            with safe_open(path, framework="pt") as file:
                return file.metadata()[SEAL].encode()
        if path.suffix == ".pt":
            return repr(plain(torch.load(path))).encode()
        return path.read_bytes()

    return {p.relative_to(folder).as_posix(): content(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def plain(value):
    """Nested dictionaries with their tensors as bytes."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


# -- the works: each writes into a folder, and is given that folder and the one with its sources ---


def result(out: Path, sources: Path) -> None:
    mv.LikelihoodResult(torch.full((1, 4_000_000), 2.0), "new").save(out / "a.safetensors")


def result_sources(sources: Path) -> None:
    pass


def result_begins(out: Path) -> None:
    mv.LikelihoodResult(torch.full((1, 4_000_000), 1.0), "old").save(out / "a.safetensors")


def result_is_whole(out: Path, expected: dict[str, bytes]) -> bool:
    loaded = mv.LikelihoodResult.load(out / "a.safetensors")
    assert loaded.logprob.unique().tolist() == [{"old": 1.0, "new": 2.0}[loaded.model]]
    return loaded.model == "new"


def conversion_sources(sources: Path) -> None:
    eva_file(sources / "eva.pth", grid=4)
    qformer_file(sources / "qformer.pth")
    trained_file(sources / "own.pth", projection(QUERY_WIDTH), arch="mini_gpt4", image_size=56)
    llama_folder(sources / "llm")


def conversion(out: Path, sources: Path) -> None:
    import minigpt4

    files = (sources / name for name in ("own.pth", "llm", "eva.pth", "qformer.pth"))
    if not (out / "model").is_dir():  # a conversion that is done is not begun again
        minigpt4.convert(*map(str, files), out=str(out / "model"), blocks=BLOCKS)


def conversion_is_whole(out: Path, expected: dict[str, bytes]) -> bool:
    if (out / "model").is_dir():
        assert contents(out) == expected
    return (out / "model").is_dir()


def training(out: Path, sources: Path) -> None:
    import train_bundled

    class Fit(torch.nn.Linear):
        def forward(self, x, y):
            return (super().forward(x) - y).square().mean()

    def batch(rng: np.random.Generator, step: int) -> dict[str, torch.Tensor]:
        x = torch.from_numpy(rng.normal(size=(8, 16))).bfloat16()
        return {"x": x, "y": x[:, :4].flip(1)}

    torch.manual_seed(0)
    options = argparse.Namespace(work=out, device="cpu", compile=False, seed=3)
    with contextlib.redirect_stdout(None):
        train_bundled.fit("fit", Fit(16, 4), batch, options, STEPS, 0.01)


def training_is_whole(out: Path, expected: dict[str, bytes]) -> bool:
    if not (out / "fit.pt").is_file():
        return False
    return torch.load(out / "fit.pt")["step"] == STEPS


WORKS: dict[str, tuple[Callable, Callable, Callable, Callable]] = {
    "result": (result, result_sources, result_begins, result_is_whole),
    "conversion": (conversion, conversion_sources, lambda out: None, conversion_is_whole),
    "training": (training, result_sources, lambda out: None, training_is_whole),
}


def watched(work: Callable, out: Path, sources: Path, kill_at: int, count: Path | None = None) -> None:
    """Do the work, and kill this process at its `kill_at`-th step on the disk; 0 is never."""
    n_steps = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal n_steps
        reads = event == "open" and arguments[1] in ("r", "rb")
        if event in EVENTS and not reads and str(arguments[0]).startswith(str(out)):
            n_steps += 1
            if n_steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    work(out, sources)
    if count is not None:
        count.write_text(str(n_steps))


def main(name: str, kills: int, seed: int, home: Path) -> dict:
    torch.set_num_threads(1)
    work, make_sources, begin, is_whole = WORKS[name]
    sources, rng = home / "sources", random.Random(seed)
    sources.mkdir()
    make_sources(sources)
    for folder in ("warm", "whole"):  # once in this process, so that no child has to warm up
        (home / folder).mkdir()
        begin(home / folder)
    work(home / "warm", sources)
    clock = time.perf_counter()
    assert os.waitpid(forked(watched, work, home / "whole", sources, 0, home / "steps"), 0)[1] == 0
    seconds, n_steps = min(time.perf_counter() - clock, 3), int((home / "steps").read_text())
    expected = contents(home / "whole")
    assert n_steps
    n_killed = undone = folders = 0
    while n_killed < kills:
        out = home / f"killed-{folders}"
        out.mkdir()
        begin(out)
        folders += 1
        for _ in range(rng.randint(1, 4)):
            at_step = rng.random() < 0.5
            child = forked(watched, work, out, sources, rng.randint(1, n_steps) if at_step else 0)
            if not at_step:
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert os.WIFSIGNALED(status) or status == 0
            n_killed += os.WIFSIGNALED(status)
            undone += not is_whole(out, expected)
        assert os.waitpid(forked(watched, work, out, sources, 0), 0)[1] == 0
        assert contents(out).keys() == expected.keys(), f"left over: {contents(out).keys()}"
        assert contents(out) == expected
    return {"kills": n_killed, "undone": undone, "steps": n_steps, "seconds": seconds}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(folder))))
