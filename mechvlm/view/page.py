"""`View`: an interactive page in one HTML file, with a picture of it.

The page loads nothing. The picture stands for it where scripts cannot run.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from mechvlm.errors import ViewError

PAGE_LIMIT = 50_000_000
"""Most bytes of a page: browsers and notebooks stall on more."""

# The browser enforces this: a page loads nothing, not even from its own folder.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)

# Until a script has run, the view is hidden and the page has no background, so that in a notebook
# the picture under the frame shows through.
PAGE_STYLE = """
html.live { background: #fff; color: #222; }
body { margin: 0; padding: 12px; font: 14px/1.4 system-ui, "DejaVu Sans", sans-serif; }
main { display: none; }
html.live main { display: block; }
html.live .preview { display: none; }
"""
MARK_LIVE = 'document.documentElement.className = "live";'
NO_SCRIPTS = '<p class="preview">This page is drawn by its scripts, which do not run here. Open it where they may.</p>'


@dataclass(frozen=True)
class View:
    """A self-contained HTML page with a picture of it. `first + second` puts two views on one page.

    A notebook shows the page in a sandboxed frame, and the picture where frames or scripts are
    stripped.

        >>> view = mechvlm.view.topk(inputs, lens)
        >>> view.save("lens.html")

    Attributes:
        title: the page's title.
        body: HTML, already escaped.
        scripts: JavaScript sources, run in this order after the body has loaded.
        styles: CSS.
        preview: draws `picture`, as the bytes of a PNG.
        height: height of the frame in a notebook, in pixels.
        instead: what to choose when the page is too large; part of the error.

    Raises:
        ViewError: when the page has more than `PAGE_LIMIT` bytes.
    """

    title: str
    body: str = field(repr=False)
    scripts: tuple[str, ...] = field(default=(), repr=False)
    styles: tuple[str, ...] = field(default=(), repr=False)
    preview: Callable[[], bytes] | None = field(default=None, repr=False)
    height: int = 480
    instead: str = field(default="fewer layers, heads, positions or examples", repr=False)

    def __post_init__(self):
        size = sum(len(part.encode()) for part in (self.body, *self.scripts, *self.styles))
        if size > PAGE_LIMIT:
            raise ViewError(
                f"The view {self.title!r} would have {size / 1e6:.0f} MB; at most {PAGE_LIMIT / 1e6:.0f} MB are shown. "
                f"Choose {self.instead}."
            )

    @cached_property
    def picture(self) -> bytes:
        """A PNG of the view as it first looks; empty without a `preview`.

        It is drawn on first use, because a saved page needs none.
        """
        return self.preview() if self.preview else b""

    def __add__(self, other: "View") -> "View":
        """Both views on one page, one below the other; shared scripts and styles appear once."""
        return View(
            f"{self.title}; {other.title}",
            f"<section>{self.body}</section>\n<section>{other.body}</section>",
            tuple(dict.fromkeys(self.scripts + other.scripts)),
            tuple(dict.fromkeys(self.styles + other.styles)),
            lambda: _stack_pictures(self.picture, other.picture),
            self.height + other.height,
            "fewer views on one page",
        )

    def html(self) -> str:
        """The page as HTML. It makes no request and needs no other file."""
        return self._page(NO_SCRIPTS)

    def save(self, path: str | PathLike) -> Path:
        """Write the page to `path`, and return it as a `Path`.

        Raises:
            FileNotFoundError: when the folder does not exist.
        """
        path = Path(path).expanduser()
        if not path.parent.is_dir():
            raise FileNotFoundError(f"Nothing can be saved as {path}: the folder {path.parent} is not there.")
        path.write_text(self.html(), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        """The page in a frame over its picture, for notebooks.

        Where the frame's scripts do not run, its page stays transparent and the picture shows
        through. Where frames are stripped, the picture is what remains.
        """
        picture = ""
        if self.picture:
            source = f"data:image/png;base64,{base64.b64encode(self.picture).decode()}"
            picture = f'<img style="max-width:100%;max-height:100%" alt="{escape(self.title)}" src="{source}">'
        frame = (
            f'<iframe sandbox="allow-scripts" title="{escape(self.title)}" srcdoc="{escape(self._page(""))}" '
            'style="position:absolute;top:0;left:0;width:100%;height:100%;border:0"></iframe>'
        )
        return f'<div style="position:relative;height:{self.height}px">{picture}{frame}</div>'

    def _page(self, notice: str) -> str:
        """The page; `notice` is the HTML shown where scripts do not run."""
        styles = "".join(f"<style>{_inert(css, 'style')}</style>\n" for css in (PAGE_STYLE, *self.styles))
        scripts = "".join(f"<script>{_inert(source, 'script')}</script>\n" for source in self.scripts)
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
            f"<title>{escape(self.title)}</title>\n{styles}</head>\n"
            f"<body>\n<script>{MARK_LIVE}</script>\n{notice}\n<main>\n{self.body}\n</main>\n{scripts}</body>\n</html>\n"
        )


def page_script(names: Sequence[str]) -> str:
    """Scripts of this folder as one function, so that no name of theirs reaches another view's."""
    folder = files("mechvlm.view")
    sources = [(folder / f"{name}.js").read_text("utf-8") for name in names]
    return '(() => {\n"use strict";\n' + "\n".join(sources) + "})();\n"


def to_json(data: Any) -> str:
    """JSON that is safe inside a <script>: ASCII, without `<`, `>` and `&`.

    Raises:
        ViewError: when the data hold NaN or infinity, which JSON cannot write.
    """
    try:
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise ViewError(
            f"The view's values hold NaN or infinity and cannot be drawn ({error}). Give finite values."
        ) from error
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _inert(source: str, tag: str) -> str:
    r"""The source, unable to end its element: `<` becomes `\x3c` in scripts, `\3c ` in CSS."""
    code = r"\x3c" if tag == "script" else r"\3c "
    return re.sub(rf"<(?=/{tag}|!--)", lambda _: code, source, flags=re.IGNORECASE)


def _stack_pictures(first: bytes, second: bytes) -> bytes:
    """Both PNGs on one, the second below the first; where one is empty, the other."""
    if not (first and second):
        return first or second
    above, below = (Image.open(io.BytesIO(picture)).convert("RGB") for picture in (first, second))
    both = Image.new("RGB", (max(above.width, below.width), above.height + below.height), "white")
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height))
    file = io.BytesIO()
    both.save(file, "PNG", optimize=True)
    return file.getvalue()
