"""Reading speed of a study with 1, 2 and 4 workers on this machine.

    python scripts/study_scaling.py

Reads scenes with tiny-llava: first in one process without Ray, then on workers of a local Ray
cluster, with one thread per worker. The clock runs from the start of the first shard to the end of
the last, after all workers have loaded the model, because that is where a long study spends its
time. Prints a Markdown table and the size of the shards.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from mechvlm.datasets import load_dataset
from mechvlm.study.running.plan import Plan
from mechvlm.study.running.ray_workers import Cluster
from mechvlm.study.running.workers import LocalWorker

WORKERS = (1, 2, 4)


def measure(n: int, workers: int) -> tuple[float, int]:
    """Seconds to read `n` scenes, and the size of their shards in bytes.

    With 0 workers the scenes are read in this process, without Ray.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            Path(folder), ("tiny-llava",), load_dataset("scenes", n), "Describe the scene.", 16, 32, views=False
        )
        local = LocalWorker(plan, plan.names, {}, {})
        with local if not workers else Cluster("auto", workers, 0.0).workers(local) as readers:
            readers.load(0, lambda: None)
            # `load` returns once one worker has loaded: wait for the others.
            while workers and len(readers.idle) < workers:
                list(readers._outcomes(lambda: None))
            started = time.perf_counter()
            readers.make_shards(0, list(range(len(plan))), lambda done: None)
            seconds = time.perf_counter() - started
        return seconds, sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def row(label: str, n: int, seconds: float, one_worker: float | None) -> str:
    """A row of the table. `one_worker` is the seconds of one worker, which the speed is a multiple of."""
    times = "" if one_worker is None else f"{one_worker / seconds:.2f} "
    return f"| {label} | {n / seconds:.1f} | {times}|"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", nargs="?", type=int, default=480, metavar="N", help="number of scenes (default: 480)")
    n = parser.parse_args(argv).n
    if n < 1:
        parser.error("at least 1 scene is needed")
    torch.set_num_threads(1)
    os.environ.pop("RAY_ADDRESS", None)  # a local cluster, not one that happens to be running
    print(f"{n} scenes, tiny-llava, {os.cpu_count()} cores ({platform.machine()}), one thread a worker\n")
    print("| | examples a second | times one worker |")
    print("|---|---|---|")
    alone, size = measure(n, 0)
    print(row("one process, without Ray", n, alone, None), flush=True)
    one_worker = None
    for workers in WORKERS:
        seconds, _ = measure(n, workers)
        one_worker = one_worker or seconds
        print(row(f"{workers} worker{'s' * (workers > 1)}", n, seconds, one_worker), flush=True)
    print(f"\nShards: {size / n / 1000:.2f} kB an example")


if __name__ == "__main__":
    main()
