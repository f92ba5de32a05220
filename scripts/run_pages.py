"""Runs the Python of the documentation's pages, and writes what it prints and draws into them.

    python scripts/run_pages.py                     # every page with Python
    python scripts/run_pages.py docs/recipes.md     # this one

The blocks of a page are one program, run in an empty folder. A block's output stands in the block
`text` that follows it; a picture that the page shows from `docs/pictures/`, and that its program
saved under that name, is replaced. A run that changes no result changes no file.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PICTURES = DOCS / "pictures"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]\d+)?")
COLORS = 128
"""Of a committed picture: figures have few, and a palette makes their files small."""
THUMBNAIL = 520
"""Pixels, the longer side of a tutorial's picture."""


@dataclass(frozen=True)
class Block:
    """A block of Python, the line of the page on which it begins, and the output that is shown."""

    code: str
    line: int
    shown: str | None


def pages() -> list[Path]:
    """The pages that hold Python: those of the root, and of docs/."""
    every = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
    return [path for path in every if BLOCK.search(path.read_text(encoding="utf-8"))]


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page, in order."""
    matches = BLOCK.finditer(text)
    return [Block(m["code"], text.count("\n", 0, m.start("code")) + 1, m["shown"]) for m in matches]


def printed(text: str, folder: Path) -> Iterator[tuple[Block, str]]:
    """Each block with what it printed, run one after the other with `folder` as working folder.

    The program stands in a file, every line at the page's own number: nnsight reads the source of a
    trace from its file, and a failure names the line of the page.
    """
    blocks = blocks_of(text)
    lines = [""] * (text.count("\n") + 1)
    for block in blocks:
        for offset, line in enumerate(block.code.splitlines()):
            lines[block.line - 1 + offset] = line
    file = folder / "page.py"
    file.write_text("\n".join(lines), encoding="utf-8")
    names: dict = {"__name__": "page"}
    here = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks:
            code = "\n" * (block.line - 1) + block.code
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, str(file), "exec"), names)
            yield block, output.getvalue()
    finally:
        os.chdir(here)
        close_figures()


def close_figures() -> None:
    """Forget the figures that a page drew."""
    from matplotlib import pyplot

    pyplot.close("all")


def same(shown: str, now: str) -> bool:
    """Whether two outputs agree: the same words, and numbers up to the differences of machines."""
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", now).split():
        return False
    pairs = zip(map(float, NUMBER.findall(shown)), map(float, NUMBER.findall(now)), strict=True)
    return all(abs(a - b) <= 0.02 + 0.02 * abs(a) for a, b in pairs)


def layout(output: str) -> list[str]:
    """The lines of an output, any number for any other."""
    return NUMBER.sub("#", output).strip().splitlines()


def written(text: str, outputs: list[str]) -> str:
    """The page with these outputs; an output that agrees with the one that is shown stays."""
    remaining = iter(outputs)

    def block(match: re.Match) -> str:
        now = "\n".join(line.rstrip() for line in next(remaining).splitlines())
        code = f"```python\n{match['code']}```\n"
        if match["shown"] is not None and same(match["shown"], now) and layout(match["shown"]) == layout(now):
            return match[0]
        return f"{code}\n```text\n{now.strip(chr(10))}\n```\n" if now.strip() else code

    return BLOCK.sub(block, text)


def keep_pictures(text: str, folder: Path) -> None:
    """The pictures that the page shows and its program saved, into `docs/pictures/`."""
    from PIL import Image

    for name in re.findall(r"pictures/([\w-]+\.png)", text):
        if (folder / name).exists():
            with Image.open(folder / name) as picture:
                picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(PICTURES / name, optimize=True)


def keep_thumbnails() -> None:
    """A small picture of each tutorial, the last that it shows, for the page that lists them."""
    from PIL import Image

    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", ())]
        shown = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        with Image.open(io.BytesIO(base64.b64decode("".join(shown[-1])))) as picture:
            small = picture.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            small.quantize(COLORS).save(PICTURES / f"tutorial-{path.stem[0]}.png", optimize=True)


def main() -> None:
    """Run the pages in place. A page that fails stays as it is, and the others go on."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("pages", nargs="*", type=Path)
    PICTURES.mkdir(exist_ok=True)
    keep_thumbnails()
    failed = False
    for path in arguments.parse_args().pages or pages():
        try:
            changed = run(path)
        except Exception:
            traceback.print_exc()
            failed = True
            print(f"{path}: failed", flush=True)
        else:
            print(f"{path}: {'changed' if changed else 'the same'}", flush=True)
    sys.exit(failed)


def run(path: Path) -> bool:
    """Run one page in place, and say whether it changed."""
    text = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new = written(text, [output for _, output in printed(text, Path(folder))])
        keep_pictures(text, Path(folder))
    path.write_text(new, encoding="utf-8")
    return new != text


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "agg")
    main()
