"""Every view in a real browser: it shows hostile text as text, and loads nothing.

`open_page` checks that it loads nothing.
"""

from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from urllib.request import urlopen

import pytest

import mechvlm as mv
from helpers.token_pages import HOSTILE, hostile_results, opened, plain, views
from mechvlm.view.pooling import readable

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def read(llava_vlm):
    return hostile_results(llava_vlm)


def point_at(page, locator) -> None:
    """Move the pointer over an element, after closing any tooltip in the way."""
    page.mouse.move(1, 1)
    box = locator.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


# --- the lane itself


def test_the_lane_sees_what_goes_wrong(open_page):
    open_page("<script>throw Error('thrown')</script>").wait_for_timeout(100)
    open_page("<script>console.error('said')</script>").wait_for_timeout(100)
    open_page("<img src='http://localhost/asked.png'>").wait_for_timeout(100)
    reported = "\n".join(open_page.wrong)
    assert "error: thrown" in reported
    assert "console: said" in reported
    assert "request: http://localhost/asked.png" in reported
    open_page.wrong.clear()


def test_a_page_cannot_ask_even_with_a_network(open_page):
    """Every page carries a policy that stops its scripts and styles from loading anything."""
    requests = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    script = f"fetch('{url}/fetch').catch(() => 0); new Image().src = '{url}/image'; window.ran = 1;"
    body = f'<img src="{url}/body"><script src="{url}/script"></script><link rel="stylesheet" href="{url}/link">'
    view = mv.view.View("asks", body, (script,), (f"@import '{url}/import'; main {{ background: url({url}/url) }}",))
    page = open_page(view, offline=False)
    page.wait_for_timeout(500)
    assert page.evaluate("window.ran") == 1
    assert requests == []
    open_page.wrong.clear()  # the browser writes each refusal to the console
    urlopen(f"{url}/by-hand").close()
    assert requests == ["/by-hand"], "the server does answer"
    server.shutdown()


# --- hostile text


@pytest.mark.parametrize("name", ["attention", "raw attention", "tokens", "attention_row", "topk"])
def test_hostile_tokens_are_text(name, open_page, read):
    view = views(read)[name]
    page = opened(open_page, view)
    on_page = {plain(t) for t in page.locator("span").all_text_contents()}
    assert {plain(piece) for piece in HOSTILE} <= on_page
    for span in page.locator(".colored-tokens > span").all()[:40]:
        point_at(page, span)  # tooltips treat the token differently
    if "attention" in name and name != "attention_row":
        data = page.locator("script[type='application/json']").evaluate("s => JSON.parse(s.textContent).labels")
        assert {readable(piece) for piece in HOSTILE} <= set(data), "drawn on a canvas: there they are text"
    if name == "topk":
        for word in {plain(w) for w in HOSTILE}:
            page.locator("input[type=search]").fill(word)
            assert word in plain(page.locator(".said").inner_text())
    assert page.evaluate("window.ran") is None
    assert page.locator("main img:not(.stage img)").count() == 0
    scripts = page.evaluate("[...document.scripts].length")
    assert scripts == 1 + len(view.scripts) + view.body.count('<script type="application/json">')


def test_tooltips_show_the_token_itself(open_page, read):
    page = opened(open_page, views(read)["tokens"])
    spans = page.locator(".colored-tokens > span")
    for piece in ("<s>", "&lt;", "</script>"):
        at = [plain(t) for t in spans.all_text_contents()].index(piece)
        point_at(page, spans.nth(at))
        page.wait_for_selector("strong")
        assert plain(page.locator("strong").inner_text()) == piece


def test_hostile_names_are_text(open_page, llava_vlm, read):
    inputs, lens, norms = read
    evil = "<img src=x onerror='window.ran=1'></title><script>window.ran=1</script>"
    inputs, lens, norms = replace(inputs, model=evil), replace(lens, model=evil), replace(norms, model=evil)
    for name, view in views((inputs, lens, norms)).items():
        page = opened(open_page, view + view)
        assert page.evaluate("window.ran") is None, name
        assert evil in page.title()
        assert evil in page.locator(".asked").first.inner_text()
