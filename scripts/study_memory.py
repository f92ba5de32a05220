"""How much memory a study of many examples takes: python scripts/study_memory.py [N ...] (default: 500 and 5000)

Each size is a process of its own, on tiny-llava and a folder of pictures. Prints the resident memory while examples are read, at
its peak, and when all is written.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PICTURES = 100
"""Different ones; the rest are the same files under other names."""
COLORS = ("red", "green", "blue", "yellow", "white")
"""As many captions an image as COCO has."""


def resident() -> float:
    """This process's memory now, in MB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def peak() -> float:
    """The most that this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_pictures(n: int, folder: Path) -> None:
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
        for stage, most in at_stage.items():
            print(f"  peak until {stage}: {most:.0f} MB")
        print(f"  peak: {peak():.0f} MB", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]))
    else:
        for size in sys.argv[1:] or ("500", "5000"):
            subprocess.run([sys.executable, __file__, "--one", size], check=True)
