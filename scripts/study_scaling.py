"""Reading speed of a study with 1, 2 and 4 workers on this machine.

    python scripts/study_scaling.py [N]     # number of scenes (default: 480)

Reads scenes with tiny-llava: first in one process without Ray, then on workers of a local Ray
cluster, with one thread per worker. The clock runs from the start of the first shard to the end of
the last, after all workers have loaded the model, because that is where a long study spends its
time. Prints a Markdown table and the size of the shards.
"""

import os
import platform
import sys
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


def main(n: int) -> None:
    torch.set_num_threads(1)
    os.environ.pop("RAY_ADDRESS", None)  # a local cluster, not one that happens to be running
    print(f"{n} scenes, tiny-llava, {os.cpu_count()} cores ({platform.machine()}), one thread a worker\n")
    print("| | examples a second | times one worker |")
    print("|---|---|---|")
    alone, size = measure(n, 0)
    one_worker = None
    print(f"| one process, without Ray | {n / alone:.1f} | |", flush=True)
    for workers in WORKERS:
        seconds, _ = measure(n, workers)
        one_worker = one_worker or seconds
        print(f"| {workers} worker{'s' * (workers > 1)} | {n / seconds:.1f} | {one_worker / seconds:.2f} |", flush=True)
    print(f"\nShards: {size / n / 1000:.2f} kB an example")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 480)
