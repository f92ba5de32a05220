"""Memory of a study of many examples.

    python scripts/study_memory.py [N ...]     # numbers of examples (default: 500 and 5000)

Each number runs in a process of its own, with tiny-llava on a folder of pictures. Prints the
resident memory while examples are read, the peak up to each stage, and the peak of the whole study.
"""

import json
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
        points = [max((d for d in while_reading if d <= n * k / 10), default=0) for k in range(1, 11)]
        print(f"{n} examples in {seconds:.0f} s; MB while reading, tenth by tenth:")
        print("  " + " ".join(f"{while_reading[d]:.0f}" for d in points))
        for stage, highest in at_stage.items():
            print(f"  peak until {stage}: {highest:.0f} MB")
        print(f"  peak: {peak():.0f} MB", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]))
    else:
        for size in sys.argv[1:] or ("500", "5000"):
            subprocess.run([sys.executable, __file__, "--one", size], check=True)
