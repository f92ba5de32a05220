"""A study's shards on a Ray cluster: each worker holds the model and makes the shards that it is handed, one by one.

Workers send a shard's files to the process that runs the study, which alone writes them: so the study's folder need not be seen
by other machines, and holds the same files in the same order of steps as without a cluster. A worker that ends, with its
machine or without, is replaced, and its shard is handed out again.
"""

import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mechvlm.datasets import Example
from mechvlm.errors import InputError, StoppedError
from mechvlm.study.running import settings
from mechvlm.study.running.atomic import write_files
from mechvlm.study.running.workers import Here
from mechvlm.vlm.vlm import VLM

LOSSES = 3
"""So many workers may end over one piece of work before the study stops: it is likely that piece that ends them."""
POLL = 0.2
"""Seconds between two looks at the workers, and so until Ctrl-C is heard."""
PIECES = ("shard", "gallery")
WAIT = 300.0
"""Seconds to wait for a worker where the cluster has none left."""


@dataclass(frozen=True)
class Cluster:
    """Which cluster is asked for what.

    Attributes:
        address: "auto" or the cluster's.
        n: workers.
        gpus: of each worker; parts of one are allowed.
    """

    address: str
    n: int
    gpus: float

    def workers(self, here: Here) -> "RayWorkers":
        return RayWorkers(here, self)


def cluster_of(
    models: Sequence[str | VLM],
    address: str | None,
    workers: int | None,
    gpus_per_worker: float | None,
    device: str | None,
    device_map: str | dict | None,
) -> Cluster | None:
    """The cluster that was asked for; None for none.

    Raises:
        InputError: where Ray is not installed, or where it cannot do what was asked.
    """
    if address is None:
        if workers is not None or gpus_per_worker is not None:
            raise InputError("workers and gpus_per_worker are those of a Ray cluster: give ray='auto' or its address.")
        return None
    if find_spec("ray") is None:
        raise InputError("Ray is not installed here. Install it: pip install 'mechvlm[ray]'")
    if workers is None or workers < 1:
        raise InputError(f"{workers} workers were asked for; give 1 or more.")
    if gpus_per_worker is not None and gpus_per_worker < 0:
        raise InputError(f"{gpus_per_worker} GPUs a worker were asked for; give 0 or more.")
    if loaded := [m.name for m in models if isinstance(m, VLM)]:
        raise InputError(f"Workers load the model themselves: give its name or folder, not the loaded {loaded[0]}.")
    kind, _, index = (device or "").partition(":")
    if index:
        raise InputError(f"Ray gives each worker its own GPUs: give the device {kind!r}, not {device!r}.")
    default = 1.0 if kind == "cuda" or device_map is not None else 0.0
    return Cluster(address, workers, default if gpus_per_worker is None else float(gpus_per_worker))


class Worker:
    """In a process of its own: `Here`, whose pieces are given back as files."""

    def __init__(self, here: Here):
        self.here = here

    def check(self, home: str, paths: list[Path], versions: dict[str, str], threads: int, on_node: int) -> None:
        """This node sees what the study reads, and has the same packages."""
        node = os.uname().nodename if hasattr(os, "uname") else "a node"
        if Path(home).is_dir():
            os.chdir(home)  # relative names mean the same as where the study was started
        if unseen := [str(path) for path in paths if not path.exists()]:
            raise InputError(
                f"The worker on {node} does not find {', '.join(unseen)}. Models and images must be in folders that every "
                "node sees under the same name."
            )
        if other := [
            f"{name} {has}, not {versions[name]}" for name, has in _versions().items() if has != versions[name]
        ]:
            raise InputError(
                f"The worker on {node} has {', '.join(other)}. Install the same versions on every node: others change results."
            )
        torch.set_num_threads(max(1, min(threads, (os.cpu_count() or 1) // on_node)))

    def load(self, model: int) -> None:
        self.here.load(model, lambda: None)

    def shard(self, model: int, number: int) -> dict[str, bytes]:
        return self._files(lambda: self.here.shards(model, [number], lambda done: None))

    def gallery(self, model: int, shown: list[Example]) -> dict[str, bytes]:
        return self._files(lambda: self.here.gallery(model, shown, lambda done: None))

    def _files(self, make: Callable[[], None]) -> dict[str, bytes]:
        plan = self.here.plan
        with TemporaryDirectory(prefix="mechvlm-") as own:
            self.here.plan = replace(plan, folder=Path(own))
            try:
                make()
            finally:
                self.here.plan = plan
            (piece,) = Path(own).iterdir()
            return {file.name: file.read_bytes() for file in sorted(piece.iterdir())}


class RayWorkers:
    """`mechvlm.study.running.workers.Workers` on a cluster, to which it connects when the first model is loaded."""

    def __init__(self, here: Here, cluster: Cluster):
        self.here, self.plan, self.cluster = here, here.plan, cluster
        self.model = -1
        self.jobs: dict[Any, tuple[Any, str, tuple]] = {}
        """What is under way: reference to its outcome -> worker, method, arguments."""
        self.idle: list[Any] = []
        self.lost: Counter[str] = Counter()
        self.at_work = 0.0
        """When there last was a worker, by the clock."""
        self.leave: Callable[[], None] = lambda: None

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, *_) -> None:
        self.leave()

    def load(self, model: int, say: Callable[[], None]) -> None:
        say()
        self.model = model
        if not self.jobs and not self.idle:
            self._connect()
            for _ in range(self.cluster.n):
                self._hire()
        while self.idle:
            self._give(self.idle.pop(), "load", model)
        while not self.idle:
            for _ in self._outcomes(say):
                pass

    def shards(self, model: int, todo: list[int], progress: Callable[[int], None]) -> None:
        done = 0

        def write(arguments: tuple, files: dict[str, bytes]) -> None:
            nonlocal done
            write_files(self.plan.at(*arguments), files)
            done += len(self.plan.examples(arguments[1]))

        self._make("shard", [(model, number) for number in todo], write, lambda: progress(done))

    def gallery(self, model: int, shown: list[Example], progress: Callable[[int], None]) -> None:
        where = self.plan.gallery(model)
        self._make("gallery", [(model, shown)], lambda _, files: write_files(where, files), lambda: progress(0))

    def _make(
        self,
        method: str,
        pieces: list[tuple],
        write: Callable[[tuple, dict[str, bytes]], None],
        say: Callable[[], None],
    ) -> None:
        """Hand the pieces out, one to each worker that has nothing to do, until all are written."""
        left = pieces[::-1]
        back: list[tuple[tuple, dict[str, bytes]]] = []
        while left or back or any(under_way == method for _, under_way, _ in self.jobs.values()):
            while left and self.idle:
                self._give(self.idle.pop(), method, *left.pop())
            # Only now, so that no worker waits for the disk.
            for made in back:
                write(*made)
            back = []
            for arguments, files in self._outcomes(say):
                if files is None:
                    left.append(arguments)
                else:
                    back.append((arguments, files))

    def _outcomes(self, say: Callable[[], None]) -> Iterator[tuple[tuple, dict[str, bytes] | None]]:
        """The pieces that came back within `POLL` seconds, by their arguments; None for one whose worker ended."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        say()
        done, _ = ray.wait(list(self.jobs), timeout=POLL) if self.jobs else ([], [])
        for job in done:
            worker, method, arguments = self.jobs.pop(job)
            work = self._named(method, arguments)
            try:
                outcome = ray.get(job)
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                self._replace(worker, work, LOSSES if method in PIECES else LOSSES * self.cluster.n, error)
                if method in PIECES:
                    yield arguments, None
                continue
            del self.lost[work]
            if method in PIECES:
                self.idle.append(worker)
                yield arguments, outcome
            elif arguments == (self.model,):
                self.idle.append(worker)
            else:
                self._give(worker, "load", self.model)
        if self.idle or any(method != "check" for _, method, _ in self.jobs.values()):
            self.at_work = time.monotonic()
        elif time.monotonic() - self.at_work > WAIT:
            raise StoppedError(
                f"The Ray cluster has had no room for a worker for {WAIT:.0f} seconds. What is done is kept; the same command "
                "goes on from there when its nodes are back."
            )

    def _replace(self, worker: Any, work: str, limit: int, error: Exception) -> None:
        """Another worker for one that ended, unless the same piece of work ended `limit` of them."""
        import ray

        last = [line for line in str(error).splitlines() if line.strip()]
        if getattr(error, "actor_init_failed", False):
            raise InputError(
                f"A worker cannot begin on the Ray cluster: {last[-1].strip()}. Every node needs what is installed here, in the "
                "same versions (pip install 'mechvlm[ray]'), and the same files under the same names: of hf: and winoground data "
                "the cache of Hugging Face too (HF_HOME)."
            )
        with suppress(Exception):
            ray.kill(worker)
        self.lost[work] += 1
        if self.lost[work] >= limit:
            raise StoppedError(
                f"The study stopped: {self.lost[work]} workers ended while {work}. Is the memory of their nodes too small? What "
                f"is done is kept; the same command goes on from there. Ray says of the last one: {last[-1].strip()}"
            )
        self._hire()

    def _named(self, method: str, arguments: tuple) -> str:
        if method == "check":
            return "starting"
        name = self.plan.names[arguments[0]]
        if method == "shard":
            of = [self.plan.data.examples[i].id for i in self.plan.examples(arguments[1])]
            return f"reading shard {arguments[1]} of {name} (examples {of[0]} to {of[-1]})"
        return f"loading {name}" if method == "load" else f"making the gallery of {name}"

    def _hire(self) -> None:
        worker = self.hire()
        self._give(worker, "check", *self.to_check)

    def _give(self, worker: Any, method: str, *arguments: Any) -> None:
        self.jobs[getattr(worker, method).remote(*arguments)] = worker, method, arguments

    def _connect(self) -> None:
        # Read when Ray is imported. It would print, whatever it is told, each worker's end; the study says what matters of it.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        n, gpus = self.cluster.n, self.cluster.gpus
        if not ray.is_initialized():
            self.leave = ray.shutdown
            _init(self.cluster.address, n)
        has = ray.cluster_resources()
        if has.get("CPU", 0) < n or has.get("GPU", 0) < n * gpus:
            raise InputError(
                f"{n} workers with one CPU and {gpus:g} GPUs each were asked for; the Ray cluster has {has.get('CPU', 0):g} CPUs "
                f"and {has.get('GPU', 0):g} GPUs. Ask for fewer, or add nodes first."
            )
        here = ray.put(self.here)
        # Over as many nodes as there are. What ends is replaced here, not by Ray, which would not load the model again.
        kind = ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD")
        self.hire = lambda: kind.remote(here)
        nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
        folders = [Path(str(model)) for model in self.here.models if Path(str(model)).is_dir()]
        files = (e.image for e in self.plan.data.examples if isinstance(e.image, Path))
        first = next((file for file in files if file.exists()), None)
        paths = folders + ([] if first is None else [first])
        self.to_check = os.getcwd(), paths, _versions(), torch.get_num_threads(), -(-n // nodes)
        self.at_work = time.monotonic()


def _init(address: str, n: int) -> None:
    """Connect to the cluster; "auto" is that of RAY_ADDRESS, or without it one on this machine, which ends with this process.

    What Ray itself calls "auto" joins any cluster that runs on this machine, also one that is somebody else's.
    """
    import ray

    where = os.environ.get("RAY_ADDRESS", "local") if address == "auto" else address
    own = {"num_cpus": max(n, os.cpu_count() or 1), "include_dashboard": False} if where == "local" else {}
    with _sigterm_kept():
        try:
            ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"No Ray cluster can be used at {where} ({reason}). `ray start --head` starts one, and says its address."
            ) from error


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM over that of the study, which says how to go on."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if main:  # it came just now, and goes to whom it belongs
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _versions() -> dict[str, str]:
    return {package: settings._version(package) for package in settings.RESULT_PACKAGES}
