"""A study's speed on one GPU, on eight, and on a cluster: measured where it can be, else simulated.

    python scripts/simulate_scaling.py              # from the recorded times (scaling.json)
    python scripts/simulate_scaling.py --measure    # on this machine first; 2 minutes, needs Ray

1. The times of the parts of a study with tiny-llava are measured, and the speed of 1, 2 and 4
   workers on this machine's cores (`study_scaling.py`). The simulation (`scaling_simulator.py`)
   gets the first, and is held against the second.
2. The same simulation, with a GPU's time for LLaVA-1.5-13B out of its FLOPs and the host's times
   of `benchmark.py host`, gives the table for GPUs that were not at hand.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import study_scaling
import torch
from benchmark_host import clocked
from scaling_simulator import Costs, Speed, simulate

from mechvlm.datasets import load_dataset
from mechvlm.study.running import shards
from mechvlm.study.running.atomic import write_files
from mechvlm.study.running.plan import Plan
from mechvlm.study.running.rows import ShardRows
from mechvlm.study.running.settings import shard_size
from mechvlm.study.running.workers import LocalWorker

RECORD = Path(__file__).with_name("scaling.json")
BENCHMARK = Path(__file__).with_name("benchmark.json")
SCENES, BATCH = 480, 16
WORKERS = (0, *study_scaling.WORKERS)
"""Of the check; 0 is one process without Ray."""
COCO = 118_287
HOST_TITLE = "a study's host at LLaVA-1.5's geometry, batches of 16, one thread of torch"
HOST_PARTS = ("decoding", "inputs", "results", "rows and words", "shards and the loop")
UTILISATION = 0.4
"""Assumed share of a GPU's peak."""
GPUS = {"A100": (312e12, 19.5e12), "H100": (989e12, 67e12)}
"""Peaks in FLOP/s: bfloat16 without sparsity, and float32."""
LAYERS, WIDTH, HEADS, MLP, VOCABULARY, VISUAL, LENGTH = 40, 5120, 40, 13_824, 32_064, 576, 620
"""LLaVA-1.5-13B, with about 44 tokens of text."""
CORES_A_GPU = 8
"""Assumed."""
NETWORK_SYNC = 0.1
"""Assumed seconds until a shard is safe in a folder that is shared over a network."""
WEIGHTS, FOLDER_RATE, IMAGE_BYTES = 26.7e9, 1.2e9, 0.16e6
"""Bytes of the model in bfloat16; bytes a second of the folder with models and images, assumed;
bytes of an image of COCO."""
SHARDS_A_WORKER = 20
"""Simulated, in the table on paper."""


def flops() -> dict[str, float]:
    """FLOPs of an example by part; a multiplication and its addition are two."""
    head = WIDTH // HEADS
    return {
        "decoder": 2 * LENGTH * LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP),
        "attention": LAYERS * 4 * LENGTH**2 * WIDTH,
        "CLIP and projector": 2 * 577 * 303e6 + 24 * 4 * 577**2 * 1024 + 2 * VISUAL * 31e6,
        "logit lens": (LAYERS + 1) * 2 * LENGTH * WIDTH * VOCABULARY,
        "norm-based attention: vectors": LAYERS * 2 * LENGTH * HEADS * head * WIDTH,
        "norm-based attention: Gram matrices": LAYERS * 2 * LENGTH * HEADS**2 * WIDTH,
    }


def device_seconds(gpu: str) -> float:
    """An example on a GPU: norm-based attention in float32, all else in bfloat16."""
    half, single = GPUS[gpu]
    by_part = flops()
    in_float32 = sum(n for part, n in by_part.items() if part.startswith("norm"))
    return ((sum(by_part.values()) - in_float32) / half + in_float32 / single) / UTILISATION


def on_paper(gpu: str, record: dict) -> Costs:
    """LLaVA-1.5-13B: the device's time from its FLOPs, the host's from the benchmark.

    Ray's call and the writer's times are those measured with tiny-llava's shards.
    """
    ms = host_ms()
    deeper = LAYERS / 32
    return Costs(
        prepare=(ms["decoding"] + ms["inputs"]) / 1000,
        device=device_seconds(gpu),
        join=deeper * ms["results"] / 1000,
        rows=deeper * ms["rows and words"] / 1000,
        shard=deeper * ms["shards and the loop"] / 1000 * shard_size(BATCH),
        call=record["costs"]["call"],
        write=record["costs"]["write"],
        sync=record["costs"]["sync"],
        # Most of a shard are rows by state: tiny-llava has 9 states.
        shard_bytes=record["costs"]["shard_bytes"] * (LAYERS + 1) / 9,
    )


def host_ms() -> dict[str, float]:
    """The host's recorded milliseconds of one core an example, for 32 layers.

    Recorded by `python scripts/benchmark.py host --record`.
    """
    (recorded,) = (
        machine[HOST_TITLE] for machine in json.loads(BENCHMARK.read_text()).values() if HOST_TITLE in machine
    )
    return {part: recorded[part] for part in HOST_PARTS}


def measure() -> dict:
    """The parts' times with tiny-llava, and the examples a second by number of workers."""
    torch.set_num_threads(1)
    os.environ.pop("RAY_ADDRESS", None)
    costs = parts()
    rates = {str(n): SCENES / study_scaling.measure(SCENES, n)[0] for n in WORKERS}
    return {"cores": os.cpu_count(), "costs": asdict(costs), "examples a second": rates}


def parts() -> Costs:
    """The parts of a study of scenes with tiny-llava, in one process, one thread of torch."""
    with tempfile.TemporaryDirectory() as folder:
        data = load_dataset("scenes", SCENES // 4)
        plan = Plan(Path(folder), ("tiny-llava",), data, "Describe the scene.", BATCH, shard_size(BATCH), views=False)
        local = LocalWorker(plan, plan.names, {}, {})
        local.load(0, lambda: None)
        local.make_shards(0, [0], lambda done: None)  # the first one looks every word up
        numbers = list(range(1, len(plan) - 1))  # the last one may be smaller
        spent = busy(local, numbers)
        files = {file.name: file.read_bytes() for file in plan.shard_folder(0, 0).iterdir()}
    examples, n_shards = len(numbers) * shard_size(BATCH), len(numbers)
    write, sync = writing(files)
    return Costs(
        prepare=spent["prepare"] / examples, device=spent["device"] / examples, join=spent["rest"] / examples,
        rows=spent["rows"] / examples, shard=spent["shard"] / n_shards, call=call_seconds(files), write=write,
        sync=sync, shard_bytes=float(sum(map(len, files.values()))), on_cores=True,
    )  # fmt: skip


def busy(local: LocalWorker, numbers: list[int]) -> Counter[str]:
    """Busy seconds of all threads by part, while these shards are made."""
    spent: Counter[str] = Counter()

    start = time.process_time()
    with ExitStack() as stack:
        for target, part, work in (
            ("mechvlm.study.running.workers.inputs_of", "prepare", shards.inputs_of),
            ("mechvlm.study.running.shards.read_batch", "device", shards.read_batch),
            ("mechvlm.study.running.rows.ShardRows.add", "rows", ShardRows.add),
            ("mechvlm.study.running.shards.write_shard", "shard", shards.write_shard),
        ):
            stack.enter_context(mock.patch(target, clocked(spent, part, work)))
        local.make_shards(0, numbers, lambda done: None)
    spent["rest"] = max(0.0, time.process_time() - start - spent.total())
    return spent


def writing(files: dict[str, bytes], times: int = 20) -> tuple[float, float]:
    """Least seconds of a core, and of waiting for the disk, for one shard's files.

    The least of several runs: what else the machine does is not counted.
    """
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(times):
            before, start = time.process_time(), time.perf_counter()
            write_files(Path(folder) / f"shard-{number}", files)
            core = time.process_time() - before
            runs.append((core, max(0.0, time.perf_counter() - start - core)))
    return min(core for core, _ in runs), min(wait for _, wait in runs)


def call_seconds(files: dict[str, bytes], times: int = 50) -> float:
    """Least seconds of a call to a Ray worker that does nothing and gives back a shard's files."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        worker = ray.remote(Idle).remote(files)
        ray.get(worker.work.remote())
        runs = []
        for _ in range(times):
            start = time.perf_counter()
            ray.get(worker.work.remote())
            runs.append(time.perf_counter() - start)
        return min(runs)
    finally:
        ray.shutdown()


class Idle:
    """A Ray worker without work."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files

    def work(self) -> dict[str, bytes]:
        return self.files


def check_table(record: dict) -> list[str]:
    """Measured and simulated examples a second, side by side."""
    costs, cores = Costs(**record["costs"]), record["cores"]
    lines = ["| | examples a second | times one worker | simulated | times one worker |", "|---|---|---|---|---|"]
    simulated = {n: simulate(costs, SCENES, n, 1, cores, BATCH).rate for n in WORKERS}
    measured = {n: record["examples a second"][str(n)] for n in WORKERS}
    for n in WORKERS:
        label = f"{n} worker{'s' * (n > 1)}" if n else "one process, without Ray"
        pairs = [f"{rates[n]:.1f} | {rates[n] / rates[1]:.2f}" for rates in (measured, simulated)]
        lines.append(f"| {label} | {' | '.join(pairs)} |")
    return lines


def paper_table(record: dict) -> list[str]:
    """LLaVA-1.5-13B over COCO's images, simulated."""
    lines = [
        "| | examples a second | a GPU's time at work | writer's time at work | to the writer | reading | loading |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        costs = on_paper(gpu, record)
        lines += [paper_row(f"{gpus} {gpu}", gpus, costs) for gpus in (1, 8, 64)]
        lines.append(paper_row(f"64 {gpu}, `--out` on a network", 64, replace(costs, sync=NETWORK_SYNC)))
    return lines


def paper_row(label: str, gpus: int, costs: Costs) -> str:
    """A row of the table, for so many shards a worker that beginning and end count little."""
    nodes, n = max(1, gpus // 8), gpus * SHARDS_A_WORKER * shard_size(BATCH)
    speed: Speed = simulate(costs, n, 0 if gpus == 1 else gpus, nodes, CORES_A_GPU * min(gpus, 8), BATCH)
    hours = COCO / speed.rate / 3600
    reading = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"
    loading = gpus * WEIGHTS / FOLDER_RATE / 60
    cells = (
        label, f"{speed.rate:.1f}", f"{speed.device:.0%}", f"{speed.writer:.1%}", f"{speed.traffic / 1e6:.2f} MB/s",
        reading, f"{loading:.1f} min",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def limits_table(record: dict) -> list[str]:
    """What each part could do alone, in examples a second."""
    costs = on_paper("H100", record)
    shard = shard_size(BATCH)
    alone = {
        "H100, each": 1 / costs.device,
        "inputs, each worker's thread": 1 / costs.prepare,
        "rows, each worker's thread": 1 / (costs.rows + costs.shard / shard),
        "the writer, on this disk": shard / (costs.write + costs.sync),
        "the writer, on a network": shard / (costs.write + NETWORK_SYNC),
        "images out of the shared folder": FOLDER_RATE / IMAGE_BYTES,
    }
    return ["| | examples a second |", "|---|---|", *(f"| {part} | {rate:,.0f} |" for part, rate in alone.items())]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help=f"measure on this machine, and write {RECORD.name}")
    if parser.parse_args(argv).measure:
        RECORD.write_text(json.dumps(measure(), indent=1) + "\n")
    record = json.loads(RECORD.read_text())
    print(f"{SCENES} scenes, tiny-llava, {record['cores']} cores, one thread a worker\n")
    print("\n".join(check_table(record)))
    print(f"\nLLaVA-1.5-13B, {COCO:,} images, simulated\n")
    print("\n".join(paper_table(record)))
    print("\nWhat each part could do alone\n")
    print("\n".join(limits_table(record)))


if __name__ == "__main__":
    main()
