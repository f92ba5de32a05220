"""The built site: it builds without a warning, its links lead somewhere, and it asks for nothing.

`pytest -m docs -n 0`; it needs the extra `docs`, and chromium.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from check_site import faults_of  # noqa: E402

OPENED = (
    "docs/index.html", "docs/quickstart.html", "docs/methods/norm_attention.html", "docs/models.html",
    "docs/api/results.html", "docs/recipes.html", "docs/tutorials.html", "tutorials/8_what_it_looked_at.html",
    "SECURITY.html",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built by its one command, which fails for a warning or a broken link."""
    folder = tmp_path_factory.mktemp("site") / "docs"
    done = subprocess.run([sys.executable, ROOT / "docs" / "build", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.docs
def test_pages_open_from_their_folder(site, chromium):
    """At two widths, in light and dark: no error, no request outside, no page too wide."""
    wrong = []
    for width, scheme in ((1280, "light"), (390, "light"), (390, "dark")):
        context = chromium.new_context(offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on(
            "request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
        )
        for name in OPENED:
            page.goto((site / name).as_uri())
            page.wait_for_load_state()
            if (over := page.evaluate("document.documentElement.scrollWidth - innerWidth")) > 0:
                wrong.append(f"{name} at {width}: {over} pixels too wide")
        page.goto((site / "index.html").as_uri())
        page.wait_for_url("**/docs/index.html")
        context.close()
    assert wrong == []


@pytest.mark.docs
def test_the_search_finds_a_page_offline(site, chromium):
    context = chromium.new_context(offline=True)
    page = context.new_page()
    page.goto((site / "search.html").as_uri() + "?q=anisotropy")
    page.wait_for_selector("#search-results li a:has-text('Glossary')")
    context.close()


GOOD = '<html><body><h1 id="a">A</h1><a href="#a">a</a><a href="two.html#b">b</a><a href="https://x.org">x</a></body></html>'


def test_a_broken_link_is_told(tmp_path):
    """A page, a place and a picture that are not there, and each kind of fetched address."""
    (tmp_path / "one.html").write_text(GOOD)
    (tmp_path / "two.html").write_text(
        '<p id="b"><a href="one.html">one</a></p><link rel="canonical" href="https://x.org">'
    )
    (tmp_path / "site.css").write_text("p { background: url(data:image/png;base64,aaaa) }")
    assert faults_of(tmp_path) == []
    for bad, said in {
        '<a href="three.html">': "one.html leads to three.html, which is not there",
        '<a href="two.html#c">': "one.html leads to two.html#c: the page has no such place",
        '<img src="none.png">': "one.html leads to none.png, which is not there",
        '<script src="https://cdn.org/a.js"></script>': "one.html loads https://cdn.org/a.js",
        '<link rel="stylesheet" href="//fonts.org/a.css">': "one.html loads //fonts.org/a.css",
        '<iframe src="http://x.org"></iframe>': "one.html loads http://x.org",
    }.items():
        (tmp_path / "one.html").write_text(GOOD + bad)
        assert faults_of(tmp_path) == [said]
    (tmp_path / "one.html").write_text(GOOD)
    (tmp_path / "site.css").write_text('@import "https://x.org/a.css"; p { background: url(https://x.org/b.png) }')
    assert faults_of(tmp_path) == ["site.css loads https://x.org/a.css", "site.css loads https://x.org/b.png"]


def test_an_empty_folder_is_no_site(tmp_path):
    assert faults_of(tmp_path) == [f"{tmp_path} holds no page"]
