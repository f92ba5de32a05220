"""A study's shards made on a Ray cluster.

1. Each worker is a process that holds the model and makes one shard at a time.
2. It sends the shard's files back to the process that runs the study, which alone writes them. So
   other machines need not see the study's folder, and the folder holds the same files, written in
   the same order of steps, as without a cluster.
3. A worker that ends, with its machine or without, is replaced, and its shard is given out again.
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
from typing import Any, NamedTuple

import torch

from mechvlm.datasets import Example
from mechvlm.errors import InputError, StoppedError
from mechvlm.study.running import settings
from mechvlm.study.running.atomic import write_files
from mechvlm.study.running.workers import LocalWorker
from mechvlm.vlm.vlm import VLM

LOSSES = 3
"""Workers that may end over the same work before the study stops: likely that work ends them."""
POLL = 0.2
"""Seconds between two looks at the workers; Ctrl-C waits as long at most."""
FILE_METHODS = ("make_shard", "make_gallery")
"""Methods of `Worker` that give files back."""
WAIT = 300.0
"""Seconds to wait for a worker where the cluster has none left."""


@dataclass(frozen=True)
class Cluster:
    """Which cluster to use, and what to ask of it.

    Attributes:
        address: of the cluster, or "auto".
        n: number of workers.
        gpus: of each worker; fractions are allowed.
    """

    address: str
    n: int
    gpus: float

    def workers(self, local: LocalWorker) -> "RayWorkers":
        return RayWorkers(local, self)


def cluster_of(
    models: Sequence[str | VLM],
    address: str | None,
    workers: int | None,
    gpus_per_worker: float | None,
    device: str | None,
    device_map: str | dict | None,
) -> Cluster | None:
    """The cluster that these arguments of `run` ask for; None where they ask for none.

    Raises:
        InputError: where Ray is not installed, or an argument does not fit a cluster.
    """
    if address is None:
        if workers is not None or gpus_per_worker is not None:
            raise InputError(
                "workers and gpus_per_worker are for a Ray cluster, and no cluster was asked for: give ray='auto' or its "
                "address."
            )
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
    if kind == "auto":
        raise InputError("The workers' machines may have other devices than this one: give the device 'cuda' or 'cpu'.")
    default = 1.0 if kind == "cuda" or device_map is not None else 0.0
    return Cluster(address, workers, default if gpus_per_worker is None else float(gpus_per_worker))


class Worker:
    """A `LocalWorker` in a process of its own on the cluster; gives back files instead of writing.

    Ray pickles both classes, which is why they stand at the top of their modules.
    """

    def __init__(self, local: LocalWorker):
        self.local = local

    def check(self, home: str, paths: list[Path], versions: dict[str, str], threads: int, on_node: int) -> None:
        """Check that this node sees the study's files and has the same packages; set its threads.

        Args:
            home: the folder in which the study was started.
            paths: of models and images.
            versions: of `RESULT_PACKAGES`, where the study was started.
            threads: of torch, where the study was started.
            on_node: the number of workers that share this node's cores.

        Raises:
            InputError: where a path is missing, or a version differs.
        """
        node = os.uname().nodename if hasattr(os, "uname") else "a node"
        if Path(home).is_dir():
            os.chdir(home)  # relative names mean the same as where the study was started
        if unseen := [str(path) for path in paths if not path.exists()]:
            raise InputError(
                f"The worker on {node} does not find {', '.join(unseen)}. Models and images must be in folders that every "
                "node sees under the same name."
            )
        if differ := [
            f"{name} {has}, not {versions[name]}" for name, has in _versions().items() if has != versions[name]
        ]:
            raise InputError(
                f"The worker on {node} has {', '.join(differ)}. Install the same versions on every node: others change results."
            )
        torch.set_num_threads(max(1, min(threads, (os.cpu_count() or 1) // on_node)))

    def load(self, model: int) -> None:
        self.local.load(model, lambda: None)

    def make_shard(self, model: int, number: int) -> dict[str, bytes]:
        return self._files(lambda: self.local.make_shards(model, [number], lambda done: None))

    def make_gallery(self, model: int, examples: list[Example]) -> dict[str, bytes]:
        return self._files(lambda: self.local.make_gallery(model, examples, lambda done: None))

    def _files(self, make: Callable[[], None]) -> dict[str, bytes]:
        """The files of the one folder that `make` writes, by name."""
        plan = self.local.plan
        with TemporaryDirectory(prefix="mechvlm-") as temporary:
            self.local.plan = replace(plan, folder=Path(temporary))
            try:
                make()
            finally:
                self.local.plan = plan
            (folder,) = Path(temporary).iterdir()
            return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


class Job(NamedTuple):
    """A call under way on a worker."""

    worker: Any
    method: str
    arguments: tuple


class RayWorkers:
    """`mechvlm.study.running.workers.Workers` on a cluster. Connects when the first model loads."""

    def __init__(self, local: LocalWorker, cluster: Cluster):
        self.local, self.plan, self.cluster = local, local.plan, cluster
        self.model = -1
        self.jobs: dict[Any, Job] = {}
        """Under way, by Ray's reference to the outcome."""
        self.idle: list[Any] = []
        self.lost: Counter[str] = Counter()
        """How many workers ended over each work, by its description."""
        self.last_alive = 0.0
        """When there last was a worker (`time.monotonic`)."""
        self.disconnect: Callable[[], None] = lambda: None

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, *_) -> None:
        self.disconnect()

    def load(self, model: int, report: Callable[[], None]) -> None:
        report()
        self.model = model
        if not self.jobs and not self.idle:
            self._connect()
            for _ in range(self.cluster.n):
                self._start_worker()
        while self.idle:
            self._submit(self.idle.pop(), "load", model)
        while not self.idle:
            for _ in self._outcomes(report):
                pass

    def make_shards(self, model: int, numbers: list[int], progress: Callable[[int], None]) -> None:
        done = 0

        def write(arguments: tuple, files: dict[str, bytes]) -> None:
            nonlocal done
            write_files(self.plan.shard_folder(*arguments), files)
            done += len(self.plan.example_indices(arguments[1]))

        self._make("make_shard", [(model, number) for number in numbers], write, lambda: progress(done))

    def make_gallery(self, model: int, examples: list[Example], progress: Callable[[int], None]) -> None:
        folder = self.plan.gallery_folder(model)
        self._make(
            "make_gallery", [(model, examples)], lambda _, files: write_files(folder, files), lambda: progress(0)
        )

    def _make(
        self,
        method: str,
        calls: list[tuple],
        write: Callable[[tuple, dict[str, bytes]], None],
        report: Callable[[], None],
    ) -> None:
        """Call a method of the workers once with each of these arguments, until all is written.

        Each idle worker gets one call at a time.
        """
        left = calls[::-1]
        to_write: list[tuple[tuple, dict[str, bytes]]] = []
        while left or to_write or any(job.method == method for job in self.jobs.values()):
            while left and self.idle:
                self._submit(self.idle.pop(), method, *left.pop())
            # Written only after new calls are given out, so that no worker waits for the disk.
            for arguments, files in to_write:
                write(arguments, files)
            to_write = []
            for arguments, outcome in self._outcomes(report):
                if outcome is None:
                    left.append(arguments)
                else:
                    to_write.append((arguments, outcome))

    def _outcomes(self, report: Callable[[], None]) -> Iterator[tuple[tuple, dict[str, bytes] | None]]:
        """The (arguments, files) that came back within `POLL` seconds.

        Files are None where the worker ended. Workers that come back from a check or from another
        model load the current one.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        report()
        done, _ = ray.wait(list(self.jobs), timeout=POLL) if self.jobs else ([], [])
        for reference in done:
            worker, method, arguments = self.jobs.pop(reference)
            work = self._description(method, arguments)
            try:
                outcome = ray.get(reference)
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                self._replace(worker, work, LOSSES if method in FILE_METHODS else LOSSES * self.cluster.n, error)
                if method in FILE_METHODS:
                    yield arguments, None
                continue
            del self.lost[work]
            if method in FILE_METHODS:
                self.idle.append(worker)
                yield arguments, outcome
            elif arguments == (self.model,):
                self.idle.append(worker)
            else:
                self._submit(worker, "load", self.model)
        # A worker whose check is still to come may not have been given a place yet.
        if self.idle or any(job.method != "check" for job in self.jobs.values()):
            self.last_alive = time.monotonic()
        elif time.monotonic() - self.last_alive > WAIT:
            raise StoppedError(
                f"The Ray cluster has had no room for a worker for {WAIT:.0f} seconds. What is done is kept; the same command "
                "goes on from there when its nodes are back."
            )

    def _replace(self, worker: Any, work: str, limit: int, error: Exception) -> None:
        """Start another worker for one that ended, unless the same work has ended `limit` of them.

        Raises:
            InputError: where the worker could not even start.
            StoppedError: where `limit` workers ended over this work.
        """
        import ray

        lines = [line for line in str(error).splitlines() if line.strip()]
        if getattr(error, "actor_init_failed", False):
            raise InputError(
                f"A worker cannot start on the Ray cluster: {lines[-1].strip()}. Every node needs the packages installed "
                "here, in the same versions (pip install 'mechvlm[ray]'), and the same files under the same names; for hf: and "
                "winoground data that includes the cache of Hugging Face (HF_HOME)."
            )
        with suppress(Exception):
            ray.kill(worker)
        self.lost[work] += 1
        if self.lost[work] >= limit:
            raise StoppedError(
                f"The study stopped: {self.lost[work]} workers ended while {work}. Is the memory of their nodes too small? What "
                f"is done is kept; the same command goes on from there. Ray says of the last one: {lines[-1].strip()}"
            )
        self._start_worker()

    def _description(self, method: str, arguments: tuple) -> str:
        """What a worker does in this call, for messages."""
        if method == "check":
            return "starting"
        name = self.plan.names[arguments[0]]
        if method == "make_shard":
            ids = [self.plan.data.examples[i].id for i in self.plan.example_indices(arguments[1])]
            return f"reading shard {arguments[1]} of {name} (examples {ids[0]} to {ids[-1]})"
        return f"loading {name}" if method == "load" else f"making the gallery of {name}"

    def _start_worker(self) -> None:
        self._submit(self.new_worker(), "check", *self.check_arguments)

    def _submit(self, worker: Any, method: str, *arguments: Any) -> None:
        self.jobs[getattr(worker, method).remote(*arguments)] = Job(worker, method, arguments)

    def _connect(self) -> None:
        # Ray reads these when it is imported. Whatever its log settings, it would print each
        # worker's end; the study reports those that matter.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        n, gpus = self.cluster.n, self.cluster.gpus
        if not ray.is_initialized():
            self.disconnect = ray.shutdown
            _init_ray(self.cluster.address, n)
        has = ray.cluster_resources()
        if has.get("CPU", 0) < n or has.get("GPU", 0) < n * gpus:
            raise InputError(
                f"{n} workers with one CPU and {gpus:g} GPUs each were asked for; the Ray cluster has {has.get('CPU', 0):g} CPUs "
                f"and {has.get('GPU', 0):g} GPUs. Ask for fewer, or add nodes first."
            )
        local = ray.put(self.local)
        # Spread over as many nodes as there are. A worker that ends is replaced by `_replace` and
        # not restarted by Ray, which would not load the model again.
        actor = ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD")
        self.new_worker = lambda: actor.remote(local)
        nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
        folders = [Path(str(model)) for model in self.local.models if Path(str(model)).is_dir()]
        images = (e.image for e in self.plan.data.examples if isinstance(e.image, Path))
        first_image = next((image for image in images if image.exists()), None)
        paths = folders + ([] if first_image is None else [first_image])
        self.check_arguments = os.getcwd(), paths, _versions(), torch.get_num_threads(), -(-n // nodes)
        self.last_alive = time.monotonic()


def _init_ray(address: str, n: int) -> None:
    """Connect to the cluster at `address`.

    "auto" is the cluster of RAY_ADDRESS. Without that variable it is a new one on this machine,
    which ends with this process. Ray's own "auto" means something else: it joins any cluster that
    runs on this machine, even another user's.
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
    """Keep the study's handler of SIGTERM, which says how to go on; Ray replaces it by its own."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        # SIGTERM came during the block, and Ray's handler took it. Pass it on to the study's.
        if main:
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _versions() -> dict[str, str]:
    return {package: settings._version(package) for package in settings.RESULT_PACKAGES}
