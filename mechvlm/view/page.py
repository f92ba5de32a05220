"""One page for every interactive view: a single HTML file that asks for nothing, over a still picture of itself."""

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from mechvlm.errors import ViewError

LIMIT = 50_000_000
"""Bytes that a page may have: browsers and notebooks stall on more."""

# The browser itself holds a page to it: nothing is loaded from anywhere, not even from the page's own folder.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)

# Until a script has run the view is not shown, and the page has no ground: the picture under a frame is seen through it.
PAGE_STYLE = """
html.live { background: #fff; color: #222; }
body { margin: 0; padding: 12px; font: 14px/1.4 system-ui, "DejaVu Sans", sans-serif; }
main { display: none; }
html.live main { display: block; }
html.live .still { display: none; }
"""
ALIVE = 'document.documentElement.className = "live";'
STILL = '<p class="still">This page is drawn by its scripts, which do not run here. Open it where they may.</p>'


@dataclass(frozen=True)
class View:
    """A self-contained HTML page over a still picture of it. Views on one page are added: `first + second`.

    In a notebook it is shown in a sandboxed frame. The picture shows where frames or scripts are stripped.

    Attributes:
        title: what the page is called.
        body: HTML, escaped by whoever made it.
        scripts: JavaScript sources, run in this order after the body is there.
        styles: CSS.
        still: draws `picture`.
        height: of the frame in a notebook, in pixels.
        instead: what to choose where the page would be too large.

    Raises:
        ViewError: when the page would have more than `LIMIT` bytes.
    """

    title: str
    body: str = field(repr=False)
    scripts: tuple[str, ...] = field(default=(), repr=False)
    styles: tuple[str, ...] = field(default=(), repr=False)
    still: Callable[[], bytes] | None = field(default=None, repr=False)
    height: int = 480
    instead: str = field(default="fewer layers, heads, positions or examples", repr=False)

    def __post_init__(self):
        size = sum(len(part.encode()) for part in (self.body, *self.scripts, *self.styles))
        if size > LIMIT:
            raise ViewError(
                f"The view {self.title!r} would have {size / 1e6:.0f} MB; at most {LIMIT / 1e6:.0f} MB are shown. "
                f"Choose {self.instead}."
            )

    @cached_property
    def picture(self) -> bytes:
        """A PNG of the view as it first looks, drawn when it is first asked for: a page that is saved needs none."""
        return self.still() if self.still else b""

    def __add__(self, other: "View") -> "View":
        """Both on one page, one below the other; scripts and styles that they share stand there once."""
        return View(
            f"{self.title}; {other.title}",
            f"<section>{self.body}</section>\n<section>{other.body}</section>",
            tuple(dict.fromkeys(self.scripts + other.scripts)),
            tuple(dict.fromkeys(self.styles + other.styles)),
            lambda: _below(self.picture, other.picture),
            self.height + other.height,
            "fewer views on one page",
        )

    def html(self) -> str:
        """The page. It makes no request and needs no other file."""
        return self._page(STILL)

    def save(self, path: str | PathLike) -> Path:
        """Write the page; gives its path.

        Raises:
            FileNotFoundError: when the folder is not there.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"Nothing can be saved as {path}: the folder {path.parent} is not there.")
        path.write_text(self.html(), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        """The page in a frame over its picture, for notebooks.

        The frame has no background and the page only gets one when its scripts run: where a frame is left without them,
        the picture is seen through it; where frames are stripped, the picture is what remains.
        """
        still = ""
        if self.picture:
            source = f"data:image/png;base64,{base64.b64encode(self.picture).decode()}"
            still = f'<img style="max-width:100%;max-height:100%" alt="{escape(self.title)}" src="{source}">'
        frame = (
            f'<iframe sandbox="allow-scripts" title="{escape(self.title)}" srcdoc="{escape(self._page(""))}" '
            'style="position:absolute;top:0;left:0;width:100%;height:100%;border:0"></iframe>'
        )
        return f'<div style="position:relative;height:{self.height}px">{still}{frame}</div>'

    def _page(self, still: str) -> str:
        styles = "".join(f"<style>{_inert(css, 'style')}</style>\n" for css in (PAGE_STYLE, *self.styles))
        scripts = "".join(f"<script>{_inert(source, 'script')}</script>\n" for source in self.scripts)
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
            f"<title>{escape(self.title)}</title>\n{styles}</head>\n"
            f"<body>\n<script>{ALIVE}</script>\n{still}\n<main>\n{self.body}\n</main>\n{scripts}</body>\n</html>\n"
        )


def to_json(data: Any) -> str:
    """JSON that can stand inside a <script>: ASCII, without `<`, `>` and `&`.

    Raises:
        ViewError: when it holds NaN or infinity, which JSON has no way to write.
    """
    try:
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise ViewError(f"The view's values hold NaN or infinity ({error}): nothing can be drawn of them.") from error
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _inert(source: str, tag: str) -> str:
    """Source that cannot end its own element: in strings and patterns `\\x3c` is `<`, and so is `\\3c ` in CSS."""
    code = r"\x3c" if tag == "script" else r"\3c "
    return re.sub(rf"<(?=/{tag}|!--)", lambda _: code, source, flags=re.IGNORECASE)


def _below(first: bytes, second: bytes) -> bytes:
    """Both pictures on one, the second below the first."""
    if not (first and second):
        return first or second
    above, below = (Image.open(io.BytesIO(picture)).convert("RGB") for picture in (first, second))
    both = Image.new("RGB", (max(above.width, below.width), above.height + below.height), "white")
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height))
    written = io.BytesIO()
    both.save(written, "PNG", optimize=True)
    return written.getvalue()
