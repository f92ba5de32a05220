"""Time and peak memory of small cases, and the machine they were taken on."""

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
    """Bytes: of the process (on a GPU: of its memory), weights included; and above what was held before the case."""

    total: int
    above: int


def times(cases: Cases, repeats: int, device: str = "cpu", reference: str | None = None) -> dict[str, float]:
    """Median seconds of each case. They take turns, so that a slow moment of the machine meets all of them.

    The first of several turns is not counted. The `reference`, which all others are divided by, runs again after every second
    case: machines drift by several percent within minutes.
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
    """Median peak memory of each case; None on a machine that does not tell."""
    return {name: _peak(case, device, repeats) for name, case in cases.items()}


def _peak(case: Callable[[], object], device: str, repeats: int) -> Peak | None:
    reset = Path("/proc/self/clear_refs")
    if device == "cpu" and not reset.exists():
        return None
    found = []
    for _ in range(repeats):
        gc.collect()
        if device == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # what earlier cases freed goes back before this one is measured
            before = _status("VmRSS")
            reset.write_text("5")  # the highest so far is forgotten
            case()
            total = _status("VmHWM")
        else:
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            case()
            total = torch.cuda.max_memory_allocated(device)
        found.append(Peak(total, total - before))
    return Peak(int(median(p.total for p in found)), int(median(p.above for p in found)))


def _status(name: str) -> int:
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def machine(device: str = "cpu") -> str:
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        model = next(iter(re.findall(r"model name\s*:\s*(.+)", info.read_text())), model)
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"
