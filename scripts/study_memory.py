"""Memory of a study of many examples.

    python scripts/study_memory.py

Each number of examples runs in a process of its own, with tiny-llava on a folder of pictures. Prints the
resident memory while examples are read, the peak up to each stage, and the peak of the whole study.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PICTURES = 100
"""Number of different pictures. Further examples are the same files under other names."""
COLORS = ("red", "green", "blue", "yellow", "white")
"""One for each of an image's five captions; COCO has five captions per image too."""


def resident() -> float:
    """Resident memory of this process, in MB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def peak() -> float:
    """Highest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_pictures(n: int, folder: Path) -> None:
    """Write `n` pictures and captions.jsonl, which is what `folder:` data sets hold."""
    from mechvlm.datasets.scenes import scenes

    lines = []
    for i, scene in enumerate(scenes(min(n, PICTURES))):
        scene.image.save(folder / f"{i}.png")
    for i in range(n):
        path = folder / f"{i}.png"
        if i >= PICTURES:
            path.hardlink_to(folder / f"{i % PICTURES}.png")
        captions = [f"picture {i % PICTURES} shows a {color} circle on sand" for color in COLORS]
        lines.append(json.dumps({"image": path.name, "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def by_tenths(while_reading: dict[int, float], n: int) -> list[float]:
    """What was measured last before each tenth of `n` examples was done; NaN before the first.

    `while_reading` is {examples done: MB}.
    """
    points = [max((done for done in while_reading if done <= n * k / 10), default=None) for k in range(1, 11)]
    return [math.nan if point is None else while_reading[point] for point in points]


def measure(n: int) -> None:
    """Run a study of `n` examples and print its memory."""
    from mechvlm.study import run

    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "pictures"
        folder.mkdir()
        write_pictures(n, folder)
        while_reading: dict[int, float] = {}
        at_stage: dict[str, float] = {}

        def progress(stage: str, done: int, total: int) -> None:
            at_stage.setdefault(stage, peak())
            if "reading" in stage:
                while_reading[done] = resident()

        started = time.perf_counter()
        run(["tiny-llava"], f"folder:{folder}", out=Path(home) / "out", progress=progress)
        seconds = time.perf_counter() - started
        print(f"{n} examples in {seconds:.0f} s; MB while reading, tenth by tenth:")
        print("  " + " ".join(f"{mb:.0f}" for mb in by_tenths(while_reading, n)))
        for stage, highest in at_stage.items():
            print(f"  peak until {stage}: {highest:.0f} MB")
        print(f"  peak: {peak():.0f} MB", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="numbers of examples (default: 500 and 5000)")
    parser.add_argument("--here", action="store_true", help="measure in this process, not in one of each number's own")
    args = parser.parse_args(argv)
    if min(args.numbers, default=1) < 1:
        parser.error("at least 1 example is needed")
    for n in args.numbers or (500, 5000):
        if args.here:
            measure(n)
        else:
            subprocess.run([sys.executable, __file__, "--here", str(n)], check=True)


if __name__ == "__main__":
    main()
