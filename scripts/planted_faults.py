"""Plants faults in the package, one line each, and says which ones no test notices.

    python scripts/planted_faults.py --jobs 2                   # all of them
    python scripts/planted_faults.py --rooms measures study     # of some rooms
    python scripts/planted_faults.py --only resample-seed       # one
    python scripts/planted_faults.py --list

The lists are `planted_faults/<room>.toml`. Each fault is a table:

    [[fault]]
    name = "interval-level"                  # unique over all lists
    file = "mechvlm/intervals.py"            # a Python or JavaScript file
    text = "tail = 100 * (1 - level) / 2"    # stands in the file exactly once
    into = "tail = 100 * (1 - level)"        # what replaces it
    breaks = "90 % intervals for 95"
    tests = ["tests/test_intervals.py"]      # default: `tests` at the top of the list

Faults in JavaScript are for the tests marked `browser`, those in Python for all others.

1. The parent process loads the heavy libraries, but never the package.
2. For each fault it makes a copy of the repository out of links, with one faulty file.
3. It forks a child, which runs the fault's tests in the copy with `-x`.
4. Tests that fail catch the fault. Those that pass let it survive.
5. First the tests run without any fault: a test that fails anyway catches nothing.

The exit code is 1 if fewer than 95 % are caught, or if any fault could not be tried.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTS = Path("scripts", "planted_faults")
BAR = 0.95
"""The least share of faults that the tests must catch."""
SECONDS = 300.0
"""Time limit of the tests of one fault."""
SHOWN = 15
"""Last lines of the output that are shown of tests which fail without a fault."""
PRELOADED = (
    # nnsight puts `.save` on every object; what stands before it here cannot be imported after.
    "beartype", "anyio.abc", "anyio._backends._asyncio", "torch", "nnsight", "transformer_lens",
    "matplotlib.pyplot", "pandas", "pyarrow.parquet", "scipy.stats", "scipy.optimize", "datasets", "hypothesis",
    "simplemma", "einops", "jaxtyping", "safetensors.torch", "jinja2", "rich.console", "PIL.Image", "sympy",
    "accelerate", "torch._dynamo", "wordllama", "nnsight.modeling.transformers",
    # Packages of transformers load their modules only when these are asked for by name.
    "transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava",
    "transformers.models.instructblip.modeling_instructblip", "transformers.models.instructblip.processing_instructblip",
    "transformers.models.clip.modeling_clip", "transformers.models.clip.image_processing_pil_clip",
    "transformers.models.llama.modeling_llama", "transformers.models.blip.image_processing_pil_blip",
    "transformers.models.bert.tokenization_bert", "transformers.generation.utils", "transformers.models.auto.processing_auto",
)  # fmt: skip
CAUGHT, SURVIVED, OVERTIME, NOT_RUN = "caught", "SURVIVED", "OUT OF TIME", "NOT RUN"


@dataclass(frozen=True)
class Fault:
    """A fault to plant: one text in one file, and its replacement.

    room: the name of the list.
    tests: paths, or pytest's names of single tests, that should notice.
    """

    name: str
    room: str
    file: str
    text: str
    into: str
    breaks: str
    tests: tuple[str, ...]

    @property
    def lane(self) -> tuple[str, ...]:
        """Options with which pytest selects the tests that see this file."""
        if self.file.endswith(".js"):
            return "-m", "browser"
        return "-m", "not (browser or tutorial or ndif or ray or kills or kinds or smollm2 or families)"

    @property
    def module(self) -> str:
        """What tests import of it: the package of the file, or a script by its own name."""
        path = Path(self.file)
        return path.stem if path.parts[0] == "scripts" else path.parts[0]


@dataclass(frozen=True)
class Trial:
    """What became of a fault: the outcome, the seconds, and what pytest printed."""

    fault: Fault
    outcome: str
    seconds: float
    output: str


def read_lists(root: Path) -> list[Fault]:
    """The faults of all lists in a repository, by room.

    Raises:
        ValueError: for an entry that lacks a key, or a name used twice.
    """
    faults = []
    for path in sorted((root / LISTS).glob("*.toml")):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for entry in content["fault"]:
            entry = {"tests": content.get("tests", []), **entry}
            if entry.keys() != {"name", "file", "text", "into", "breaks", "tests"} or not entry["tests"]:
                raise ValueError(f"{path.name}: {entry.get('name', entry)} has the keys {', '.join(entry)}.")
            faults.append(Fault(room=path.stem, **{**entry, "tests": tuple(entry["tests"])}))
    twice = [name for name, n in Counter(fault.name for fault in faults).items() if n > 1]
    if twice:
        raise ValueError(f"These names are used twice: {', '.join(twice)}.")
    return faults


def stale(faults: Sequence[Fault], root: Path) -> list[str]:
    """What is no longer true of the lists: texts that do not stand in their file exactly once."""
    wrong = []
    for fault in faults:
        path = root / fault.file
        n = path.read_text(encoding="utf-8").count(fault.text) if path.is_file() else 0
        if n != 1 or fault.into == fault.text:
            wrong.append(f"{fault.room}/{fault.name}: {fault.text!r} stands {n} times in {fault.file}, not once.")
        for test in fault.tests:
            if not (root / test.split("::")[0]).is_file():
                wrong.append(f"{fault.room}/{fault.name}: there is no {test}.")
    return wrong


# -- one trial ---


def plant(fault: Fault, root: Path, copy: Path) -> None:
    """Copy the repository as links into the empty folder `copy`, with the fault in its file.

    Only the folder of the faulty file is copied deeply. Compiled files are linked too: Python
    replaces a link when it compiles anew, and leaves the original as it is.
    """
    top = Path(fault.file).parts[0]
    for path in root.iterdir():
        if path.name == top:
            _link(path, copy / top)
        elif not path.name.startswith("."):
            (copy / path.name).symlink_to(path)
    faulty = copy / fault.file
    for compiled in (faulty.parent / "__pycache__").glob(f"{faulty.stem}.*"):
        compiled.unlink()
    faulty.unlink()
    faulty.write_text((root / fault.file).read_text(encoding="utf-8").replace(fault.text, fault.into), encoding="utf-8")


def _link(folder: Path, copy: Path) -> None:
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_dir():
            _link(path, copy / path.name)
        else:
            (copy / path.name).symlink_to(path)


def _run_tests(copy: Path, module: str, tests: Sequence[str], output: Path) -> None:
    """In a child: run the tests in the copy, and leave with pytest's exit code."""
    os.setsid()  # what the tests start ends with the child
    stream = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(copy)
    sys.path[:] = [str(copy), *(entry for entry in sys.path if entry not in ("", str(ROOT), str(ROOT / "scripts")))]
    os.environ["PYTHONPATH"] = str(copy)
    sys.argv = ["pytest"]
    if module in sys.modules:
        raise RuntimeError(f"{module} was loaded before the fault was planted.")
    import pytest

    xdist = ["-n", "0"] if importlib.util.find_spec("xdist") else []
    code = int(pytest.main(["-x", "-q", *xdist, "-p", "no:cacheprovider", *tests]))
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded is not None and not Path(loaded).is_relative_to(copy):
        raise RuntimeError(f"The tests ran {loaded}, and not the faulty copy.")
    sys.stdout.flush()
    os._exit(code)


def _preload() -> None:
    """Load in this process what every child needs: pytest's plugins, and the heavy libraries."""
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    for module in PRELOADED:
        importlib.import_module(module)


class Child:
    """A running trial in a process of its own."""

    def __init__(self, fault: Fault, root: Path):
        self.fault, self.started = fault, time.monotonic()
        self.folder = tempfile.TemporaryDirectory(prefix="planted-")
        copy = Path(self.folder.name).resolve() / "copy"
        copy.mkdir()
        plant(fault, root, copy)
        self.output = copy.parent / "output.txt"
        arguments = (copy, fault.module, (*fault.lane, *fault.tests), self.output)
        self.process = multiprocessing.get_context("fork").Process(target=_run_tests, args=arguments)
        self.process.start()

    def end(self, seconds: float) -> Trial | None:
        """The trial, if it has ended or has run out of time."""
        taken = time.monotonic() - self.started
        if self.process.is_alive() and taken < seconds:
            return None
        outcome = OVERTIME if self.process.is_alive() else {0: SURVIVED, 1: CAUGHT}.get(self.process.exitcode, NOT_RUN)
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        output = self.output.read_text(encoding="utf-8", errors="replace") if self.output.is_file() else ""
        self.folder.cleanup()
        return Trial(self.fault, outcome, taken, output)


def trials(faults: Sequence[Fault], root: Path, jobs: int, seconds: float = SECONDS) -> Iterator[Trial]:
    """The trials as they end, `jobs` of them at a time."""
    waiting, running = list(faults)[::-1], []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Child(waiting.pop(), root))
        wait([child.process.sentinel for child in running], timeout=1)
        ended = [(child, trial) for child in running if (trial := child.end(seconds))]
        running = [child for child in running if child not in [child for child, _ in ended]]
        yield from (trial for _, trial in ended)


# -- all of them ---


def without_fault(faults: Sequence[Fault]) -> list[Fault]:
    """For each test that a fault names, a trial of it that plants nothing."""
    files = {(test, fault.lane): fault for fault in faults for test in fault.tests}
    return [replace(fault, name=test, into=fault.text, tests=(test,)) for (test, _), fault in files.items()]


def counts(done: Sequence[Trial]) -> list[str]:
    """The caught of all, by room and in total."""
    lines = []
    for room in (*sorted({trial.fault.room for trial in done}), None):
        outcomes = [trial.outcome for trial in done if room in (None, trial.fault.room)]
        n = outcomes.count(CAUGHT)
        lines.append(f"{room or 'total':16} {n:4} of {len(outcomes):4} caught, {n / len(outcomes):.1%}")
    return lines


say = partial(print, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Plant the faults, run the tests, and print which survive; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="+", default=[], help="only the faults of these lists")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these faults")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--list", action="store_true", help="list the faults, and plant none")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    faults = read_lists(root)
    for kind, names, known in (
        ("room", options.rooms, {fault.room for fault in faults}),
        ("fault", options.only, {fault.name for fault in faults}),
    ):
        if unknown := sorted(set(names) - known):
            parser.error(f"there is no {kind} {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    faults = [f for f in faults if f.room in (options.rooms or [f.room]) and f.name in (options.only or [f.name])]
    if options.list:
        for fault in faults:
            say(f"{fault.room:16} {fault.name:32} {fault.breaks}")
        say(f"{len(faults)} faults")
        return 0
    if wrong := stale(faults, root):
        say("\n".join(["The lists are no longer true:", *wrong]))
        return 1
    _preload()
    sound = list(trials(without_fault(faults), root, options.jobs))
    if failing := [trial for trial in sound if trial.outcome != SURVIVED]:
        for trial in failing:
            end = "\n".join(trial.output.rstrip().splitlines()[-SHOWN:])
            say(f"{trial.fault.name} does not pass without a fault:\n{end}")
        return 1
    done = []
    for trial in trials(faults, root, options.jobs):
        done.append(trial)
        fault = trial.fault
        say(f"{trial.outcome:12} {trial.seconds:5.1f} s  {fault.room}/{fault.name}: {fault.breaks} ({fault.file})")
        if trial.outcome == NOT_RUN:
            say("\n".join(trial.output.rstrip().splitlines()[-SHOWN:]))
    say("\n".join(["", *counts(done)]))
    outcomes = [trial.outcome for trial in done]
    return int(NOT_RUN in outcomes or outcomes.count(CAUGHT) < BAR * len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
