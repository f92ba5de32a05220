"""A real browser for the tests of views: Debian's chromium, offline.

No page may raise an error or make a request.
"""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def chromium():
    """One browser for all tests. It must be installed: without it the views are not tested."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("The browser tests need chromium on the PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, tmp_path):
    """`page = open_page(view)` opens a view's page from a file.

    A string is opened as HTML. A path is opened where it lies, and links to pages in its folder may
    be followed. Keyword arguments go to the browser's context (`java_script_enabled`, `viewport`).

    The test fails at its end if a page threw an error, wrote one to the console, or requested
    anything but itself. `open_page.wrong` lists these events.
    """
    contexts, wrong = [], []

    def open_page(view, **options):
        in_place = isinstance(view, Path)
        file = view if in_place else tmp_path / f"page-{len(contexts)}.html"
        if not in_place:
            file.write_text(view if isinstance(view, str) else view.html(), encoding="utf-8")
        context = chromium.new_context(**{"offline": True, "viewport": {"width": 1100, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on(
            "console", lambda message: wrong.append(f"console: {message.text}") if message.type == "error" else None
        )
        page.on("requestfailed", lambda request: wrong.append(f"request failed: {request.url[:200]}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))

        def check(request):
            if in_place and request.is_navigation_request() and request.url.startswith(f"{file.parent.as_uri()}/"):
                return
            # Data URLs and a notebook's frames are parts of the page itself.
            if request.url not in (file.as_uri(), "about:srcdoc") and not request.url.startswith(("data:", "blob:")):
                wrong.append(f"request: {request.url[:200]}")

        page.on("request", check)
        page.goto(file.as_uri())
        return page

    open_page.wrong = wrong
    yield open_page
    for context in contexts:
        context.close()
    assert not wrong, "\n".join(wrong)
