"""Checks a built site: every link within it leads somewhere, and no page loads anything from outside.

    python scripts/check_site.py build/docs

`docs/build` does it after each build.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("link", "href"), ("source", "src"), ("video", "src")}
"""Attributes whose addresses a browser fetches by itself."""
NOT_FETCHED = {"canonical", "author", "index", "search", "next", "prev"}
"""Kinds of <link> that only name a page."""


class Page(HTMLParser):
    """The ids of a page, the links that it holds, and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        names_page = tag == "link" and set((values.get("rel") or "").split()) <= NOT_FETCHED
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif value and (tag, name) in LOADED and not names_page:
                self.loads.append(value)
            elif value and name == "href":
                self.links.append(value)


def is_outside(address: str) -> bool:
    """Whether a browser that fetches it leaves the folder."""
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ftp")


def faults_of(site: Path) -> list[str]:
    """Each broken link, and each address outside that is loaded, with the page that holds it."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    faults = [] if pages else [f"{site} holds no page"]
    for path, page in pages.items():
        here = path.relative_to(site.resolve())
        faults += [f"{here} loads {address}" for address in page.loads if is_outside(address)]
        for address in [*page.links, *page.loads]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file():
                faults.append(f"{here} leads to {address}, which is not there")
            elif anchor and target in pages and anchor not in pages[target].ids:
                faults.append(f"{here} leads to {address}: the page has no such place")
    for path in sorted(site.rglob("*.css")):
        outside = re.findall(r"url\(['\"]?((?:https?:)?//[^)'\"]+)|@import\s+['\"](https?:[^'\"]+)", path.read_text())
        faults += [f"{path.relative_to(site)} loads {a or b}" for a, b in outside]
    return faults


if __name__ == "__main__":
    wrong = faults_of(Path(sys.argv[1]))
    print("\n".join(wrong) or "no fault")
    sys.exit(bool(wrong))
