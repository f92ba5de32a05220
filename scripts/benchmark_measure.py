"""Time and peak memory of small cases, and the name of the machine they ran on."""

import ctypes
import gc
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

Cases = dict[str, Callable[[], object]]


class Peak(NamedTuple):
    """Peak memory in bytes: of the process, or on a GPU of the GPU's memory.

    `total` includes the weights. `above` is the part that was not yet in use before the case.
    """

    total: int
    above: int


def times(cases: Cases, repeats: int, device: str = "cpu", reference: str | None = None) -> dict[str, float]:
    """Median seconds of each case.

    The cases take turns, so that a slow moment of the machine meets all of them. With more than one
    repeat, a warm-up turn comes first and is not counted.

    The `reference` is the case that the others are divided by. It runs again before every second
    case, because machines drift by several percent within minutes.
    """
    order = list(cases)
    if reference is not None:
        others = [name for name in cases if name != reference]
        order = [name for i, other in enumerate(others) for name in ([reference] * (i % 2 == 0) + [other])]
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + (repeats > 1)):
        for name in order:
            start = time.perf_counter()
            cases[name]()
            if device != "cpu":
                torch.cuda.synchronize(device)
            if turn or repeats == 1:
                taken[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in taken.items()}


def peaks(cases: Cases, device: str, repeats: int) -> dict[str, Peak | None]:
    """Median peak memory of each case, or None where the system does not report it."""
    return {name: _peak(case, device, repeats) for name, case in cases.items()}


def _peak(case: Callable[[], object], device: str, repeats: int) -> Peak | None:
    reset = Path("/proc/self/clear_refs")
    if device == "cpu" and not reset.exists():
        return None
    runs = []
    for _ in range(repeats):
        gc.collect()
        if device == "cpu":
            # Memory that earlier cases freed goes back to the system, or it would hide this peak.
            ctypes.CDLL(None).malloc_trim(0)
            before = _status("VmRSS")
            reset.write_text("5")  # resets VmHWM, the process's highest memory so far
            case()
            total = _status("VmHWM")
        else:
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            case()
            total = torch.cuda.max_memory_allocated(device)
        runs.append(Peak(total, total - before))
    return Peak(int(median(p.total for p in runs)), int(median(p.above for p in runs)))


def _status(name: str) -> int:
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def machine(device: str = "cpu") -> str:
    """Processor or GPU, threads and torch version. benchmark.json holds one record for each."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        model = next(iter(re.findall(r"model name\s*:\s*(.+)", info.read_text())), model)
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"
