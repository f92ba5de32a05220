"""One page: everything inline, no request."""

import base64
import html
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def to_json(data) -> str:
    """JSON that is safe inside <script>."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text


@dataclass(frozen=True)
class View:
    """An interactive page."""

    title: str
    body: str
    scripts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    picture: bytes = b""
    height: int = 480

    def html(self) -> str:
        """The page."""
        styles = "".join(f"<style>{s}</style>" for s in self.styles)
        scripts = "".join(f"<script>{s}</script>" for s in self.scripts)
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
            f'content="{POLICY}"><title>{html.escape(self.title)}</title>{styles}</head><body>{self.body}{scripts}</body></html>'
        )

    def save(self, path: str | PathLike) -> Path:
        """Write the page."""
        Path(path).write_text(self.html(), encoding="utf-8")
        return Path(path)

    def _repr_html_(self) -> str:
        picture = base64.b64encode(self.picture).decode()
        return (
            f'<iframe srcdoc="{html.escape(self.html())}" sandbox="allow-scripts" width="100%" height="{self.height}">'
            f'</iframe><img src="data:image/png;base64,{picture}">'
        )
