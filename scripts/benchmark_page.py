"""What a patch view costs at the size of a 7B model: its bytes, the time to pack it, to draw it.

    python scripts/benchmark_page.py

Two pages of 32 layers x 32 heads x about 620 tokens with a lens of 576 patches: of one destination,
and of all 60 words of an answer. Attention is invented: standard normal logits times 2.5, with a
sink. With chromium and playwright each page is opened three times; the quickest counts.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import mechvlm as mv
from helpers.patch_results import large_inputs, synthetic

BARS = {"one destination": (1e6, 300), "60 words": (12e6, 300)}
"""Most bytes of each page, and most milliseconds until it is drawn."""


def page(words: int) -> mv.view.View:
    """The page of an answer of so many words; of none, of the prompt's last token."""
    answer = " ".join(["red", "cat"] * 30)[: 8 * words // 2]
    inputs = large_inputs(answer=answer or None)
    return mv.view.patches(inputs, *synthetic(inputs, dest=tuple(inputs.tokens.writing.tolist()[:words])))


def drawn_after(path: Path) -> float | None:
    """Milliseconds from the navigation until the page is drawn; None without a browser."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        times = []
        for _ in range(3):
            tab = browser.new_page()
            tab.goto(path.as_uri())
            tab.wait_for_selector(".patch-view[data-ready]", timeout=60_000)
            times.append(tab.evaluate("performance.getEntriesByName('patches drawn')[0].startTime"))
            tab.close()
        browser.close()
    return min(times)


def main() -> int:
    """Print what each page costs; 1 where one misses its bar."""
    missed = False
    for (name, (most_bytes, most_ms)), words in zip(BARS.items(), (0, 60), strict=True):
        began = time.perf_counter()
        view = page(words)
        seconds, size = time.perf_counter() - began, len(view.html().encode())
        with tempfile.TemporaryDirectory() as folder:
            ms = drawn_after(view.save(Path(folder) / "page.html"))
        drawn = "no browser" if ms is None else f"drawn after {ms:.0f} ms"
        print(f"{name}: {size / 1e6:.2f} MB of {most_bytes / 1e6:.0f}, made in {seconds:.1f} s, {drawn}")
        missed |= size > most_bytes or (ms or 0) > most_ms
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
