"""How fast a study reads with 1, 2 and 4 workers on this machine: python scripts/study_scaling.py [N] (default: 480 scenes)

Tiny-llava on one thread each, on a Ray cluster that is started once; before, the same in one process without Ray. Clocked are the
seconds from the first shard's begin to the last one's end, when all workers hold the model: what a long study spends its time
with. Prints a Markdown table, and beside it what a shard weighs.
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
    """Seconds to read n examples, in this process for 0 workers; and the bytes of their shards."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            Path(folder), ("tiny-llava",), load_dataset("scenes", n), "Describe the scene.", 16, 32, views=False
        )
        local = LocalWorker(plan, plan.names, {}, {})
        with local if not workers else Cluster("auto", workers, 0.0).workers(local) as makers:
            makers.load(0, lambda: None)
            while workers and len(makers.idle) < workers:  # the others load too
                list(makers._outcomes(lambda: None))
            started = time.perf_counter()
            makers.make_shards(0, list(range(len(plan))), lambda done: None)
            seconds = time.perf_counter() - started
        return seconds, sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def main(n: int) -> None:
    torch.set_num_threads(1)
    os.environ.pop("RAY_ADDRESS", None)
    print(f"{n} scenes, tiny-llava, {os.cpu_count()} cores ({platform.machine()}), one thread a worker\n")
    print("| | examples a second | times one worker |")
    print("|---|---|---|")
    alone, size = measure(n, 0)
    one = None
    print(f"| one process, without Ray | {n / alone:.1f} | |", flush=True)
    for workers in WORKERS:
        seconds, _ = measure(n, workers)
        one = one or seconds
        print(f"| {workers} worker{'s' * (workers > 1)} | {n / seconds:.1f} | {one / seconds:.2f} |", flush=True)
    print(f"\nShards: {size / n / 1000:.2f} kB an example")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 480)
