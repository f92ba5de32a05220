"""Every view in a real browser: it draws, reacts, shows hostile text as text, and loads nothing.

`open_page` checks that it loads nothing.
"""

import html
import io
import re
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from urllib.request import urlopen

import bleach
import nbformat
import numpy as np
import pytest
import torch
from nbconvert import HTMLExporter
from PIL import Image

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.view.pooling import readable

pytestmark = pytest.mark.browser

HOSTILE = [
    "<script>window.ran = 1; alert(1)</script>", "</script>", "<img src=x onerror='window.ran = 1'>", '"quoted"', "'single'",
    "a\u2028b", "<s>", "&lt;", "שלום עולם", "👩\u200d🚀", "<!--", "\u202eturned", "{{7*7}}", "`${1}`", "\\", "<image>",
]  # fmt: skip


@pytest.fixture(scope="module")
def read(llava_vlm):
    """Inputs with hostile text tokens, a lens with hostile words, and all attention."""
    inputs = llava_vlm.inputs(noise_image(0, (90, 60)), "what is this and that and more and yet more of it")
    tokens = inputs.tokens
    places = [int(tokens.special[0]), *tokens.text.tolist()][: len(HOSTILE)]
    assert len(places) == len(HOSTILE)
    strings = list(tokens.strings)
    for place, piece in zip(places, HOSTILE, strict=True):
        strings[place] = piece
    inputs = replace(inputs, token_maps=(replace(tokens, strings=tuple(strings)),))
    lens, norms = mv.read(llava_vlm, inputs, mv.LogitLens(k=3), mv.NormAttention(dst="all pairs"))
    words = tuple((i, HOSTILE[n % len(HOSTILE)]) for n, (i, _) in enumerate(lens.vocabulary))
    return inputs, replace(lens, vocabulary=words), norms


def shown(text: str) -> str:
    """Text on the page without invisible characters."""
    return text.replace("\u2060", "").replace("\xa0", " ").strip()


def views(read) -> dict[str, mv.view.View]:
    inputs, lens, norms = read
    values = torch.linspace(-1, 2, len(inputs.tokens))
    return {
        "attention": mv.view.attention(inputs, norms, 2, pool=2, heads=[0, 1]),
        "raw attention": mv.view.attention(inputs, norms, 2, pool=2, heads=[0, 1], measure="weight"),
        "tokens": mv.view.tokens(inputs, values, name=HOSTILE[0]),
        "attention_row": mv.view.attention_row(inputs, norms, inputs.tokens.last),
        "topk": mv.view.topk(inputs, lens),
    }


def pixels(locator) -> np.ndarray:
    """The pixels of an element, or of the part of a page in the window, [y, x, rgb]."""
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB")).astype(int)


def chips(page) -> list[tuple[str, str]]:
    """The colored tokens: their text and their color."""
    spans = page.locator(".colored-tokens span span")
    return spans.evaluate_all("spans => spans.map(s => [s.textContent, getComputedStyle(s).backgroundColor])")


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


# --- each view


def test_attention_draws_and_answers_to_clicks(open_page, read):
    inputs, _, norms = read
    page = open_page(mv.view.attention(inputs, norms, [0, 2], pool=2, heads=[0, 1]))
    page.wait_for_selector("canvas")
    page.wait_for_timeout(300)
    maps = page.locator("canvas")
    assert maps.count() == 6 + 1
    assert page.locator("h4").all_inner_texts() == ["0 all", "0.0", "0.1", "2 all", "2.0", "2.1"]
    before = pixels(maps.last)
    assert (np.ptp(before, axis=2) > 60).any(), "there is blue in it"
    for head in (4, 2):
        maps.nth(head).click()
        page.mouse.move(1, 1)
        page.wait_for_timeout(200)
        assert page.locator("h2").last.inner_text() == page.locator("h4").nth(head).inner_text()
        after = pixels(maps.last)
        assert after.shape == before.shape
        assert (after != before).any(axis=2).mean() > 0.01, "the large pattern is that of the head"
        before = after
    figure = page.locator("figure.cells")
    assert figure.locator("text").all_text_contents() == ["r0c0", "r0c1", "r1c0", "r1c1"]
    box = figure.locator("svg").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(90 / 60, rel=0.02)


def test_attention_shows_the_value_under_the_pointer(open_page, read):
    """The map's colors follow its values."""
    inputs, _, norms = read
    page = open_page(mv.view.attention(inputs, norms, 1, pool=1, heads=(), measure="weight"))
    page.wait_for_selector("canvas")
    page.wait_for_timeout(300)
    page.locator("h4").evaluate("label => label.remove()")  # it covers part of the map
    picture = pixels(page.locator("canvas").first)  # the small map has no axes
    n = len(page.locator("script[type='application/json']").evaluate("s => JSON.parse(s.textContent).tokens"))
    values = np.array(
        page.locator("script[type='application/json']").evaluate("s => JSON.parse(s.textContent).attention")
    )
    height, width, _ = picture.shape
    at = [[picture[int((i + 0.5) * height / n), int((j + 0.5) * width / n)] for j in range(n)] for i in range(n)]
    darkness = 255 * 3 - np.array(at).sum(2)
    assert np.corrcoef(darkness.ravel(), values[0].ravel())[0, 1] > 0.9


def test_tokens_have_the_colors_of_their_values(open_page, read):
    inputs, *_ = read
    values = torch.zeros(len(inputs.tokens))
    values[3], values[-1] = 2.0, -1.0
    page = open_page(mv.view.tokens(inputs, values, name="my values"))
    page.wait_for_selector(".colored-tokens")
    colors = [color for _, color in chips(page)]
    assert len(colors) == len(inputs.tokens)
    assert colors.count("rgb(255, 255, 255)") == len(colors) - 2
    assert (colors[3], colors[-1]) == ("rgb(0, 114, 178)", "rgb(213, 94, 0)")
    point_at(page, page.locator(".colored-tokens span span").nth(3))
    page.wait_for_selector(".colored-tokens strong")
    assert page.locator(".colored-tokens strong + br").count() == 1
    assert page.locator(".colored-tokens div").inner_text().endswith("2")
    rows = page.locator(".colored-tokens span span").evaluate_all(
        "s => s.map(x => Math.round(x.getBoundingClientRect().y))"
    )
    start = int(inputs.tokens.image[0])
    assert [len(set(rows[start + 4 * r : start + 4 * r + 4])) for r in range(4)] == [1] * 4
    assert len(set(rows[start : start + 16])) == 4, "patches stand in rows as on the image"


def test_a_row_answers_to_its_layer_and_head(open_page, read):
    inputs, _, norms = read
    last = inputs.tokens.last
    page = open_page(mv.view.attention_row(inputs, norms, last))
    for layer, head, values in [
        (0, 0, norms.norm[0, 0, last]), (2, 0, norms.norm[2, 0, last]), (2, 3, norms.norm_head[2, 0, 2, last]),
    ]:  # fmt: skip
        page.locator("#layer-selector").select_option(index=layer)
        page.locator("#neuron-selector").select_option(index=head)
        page.wait_for_timeout(100)
        colors = [np.array(re.findall(r"[\d.]+", color)[:3], float) for _, color in chips(page)]
        darkness = 255 - np.array([c[:2].mean() for c in colors])
        assert int(darkness.argmax()) == int(values.argmax())
        assert np.corrcoef(darkness, values.numpy())[0, 1] > 0.9


def test_topk_shows_the_words_of_a_patch(open_page, read):
    inputs, lens, _ = read
    page = open_page(mv.view.topk(inputs, lens))
    table, lines = page.locator("[data-circuitsvis=TopkTokens]"), page.locator("[data-circuitsvis=TopkSamples]")
    pieces = lens.pieces()
    for row, at in [(0, 0), (2, 0), (3, 2)]:
        layer = 3 - at
        table.locator("#sample-selector").select_option(label=f"row {row}")
        table.locator("#layer-selector").select_option(label=str(layer))
        page.wait_for_timeout(100)
        cells = [shown(t) for t in table.locator("td > span").all_text_contents()]
        expected = [
            readable(pieces[layer][inputs.tokens.position(row, col)][rank]).strip() if col < 4 else ""
            for rank in range(3)
            for col in range(5)
        ]
        assert cells == expected
    place = inputs.tokens.position(2, 1)
    lines.locator("#layer-selector").select_option(label="row 2")
    lines.locator("#neuron-selector").select_option(index=1)
    page.wait_for_timeout(100)
    spoken = [
        [shown(t) for t in line.locator("span span").all_text_contents()]
        for line in lines.locator(".colored-tokens").all()
    ]
    assert spoken == [[f"{layer}:", *(readable(p).strip() for p in pieces[layer][place])] for layer in (3, 2, 1, 0)]
    assert not table.locator("#filter-select").is_visible(), "there are no lowest tokens to choose"


def test_several_views_on_one_page(open_page, read):
    together = views(read)
    first, *others = together.values()
    for view in others:
        first = first + view
    page = open_page(first)
    page.wait_for_selector("canvas")
    page.wait_for_selector(".colored-tokens")
    assert page.locator("[data-circuitsvis] > div:not(:empty)").count() == 6
    assert page.locator("section").last.locator("td > span").count() > 10
    assert (
        page.evaluate("[...document.scripts].filter(s => s.text.startsWith('\"use strict\";var CircuitsVis')).length")
        == 1
    )


# --- hostile text


@pytest.mark.parametrize("name", ["attention", "raw attention", "tokens", "attention_row", "topk"])
def test_hostile_tokens_are_text(name, open_page, read):
    view = views(read)[name]
    page = open_page(view)
    page.wait_for_selector("canvas, .colored-tokens")
    page.wait_for_timeout(300)
    if "attention" in name and name != "attention_row":
        data = page.locator("script[type='application/json']").evaluate("s => JSON.parse(s.textContent).tokens")
        assert {readable(piece) for piece in HOSTILE} <= set(data), "drawn on a canvas: there they are text"
    else:
        on_page = {shown(t) for t in page.locator("span").all_text_contents()}
        for row in range(4) if name == "topk" else ():
            page.locator("#sample-selector").first.select_option(label=f"row {row}")
            for layer in range(4):
                page.locator("[data-circuitsvis=TopkTokens] #layer-selector").select_option(index=layer)
                page.wait_for_timeout(30)
                on_page |= {shown(t) for t in page.locator("td > span").all_text_contents()}
        assert {readable(piece).strip() for piece in HOSTILE} <= on_page
        for span in page.locator("span span, td > span").all()[:40]:
            point_at(page, span)  # tooltips treat the token differently
    assert page.evaluate("window.ran") is None
    assert page.locator("main img").count() == 0
    scripts = page.evaluate("[...document.scripts].length")
    assert scripts == 1 + len(view.scripts) + view.body.count('<script type="application/json">')


def test_tooltips_show_the_token_itself(open_page, read):
    page = open_page(views(read)["tokens"])
    spans = page.locator(".colored-tokens span span")
    for piece in ("<s>", "&lt;", "</script>"):
        at = [shown(t) for t in spans.all_text_contents()].index(piece)
        point_at(page, spans.nth(at))
        page.wait_for_selector("strong")
        assert shown(page.locator("strong").inner_text()) == piece


def test_hostile_names_are_text(open_page, llava_vlm, read):
    inputs, lens, norms = read
    evil = "<img src=x onerror='window.ran=1'></title><script>window.ran=1</script>"
    inputs, lens, norms = replace(inputs, model=evil), replace(lens, model=evil), replace(norms, model=evil)
    for name, view in views((inputs, lens, norms)).items():
        page = open_page(view + view)
        page.wait_for_timeout(200)
        assert page.evaluate("window.ran") is None, name
        assert evil in page.title()
        assert evil in page.locator("h2").first.inner_text()


# --- notebooks, and pages without scripts or frames


def notebook(*shown: str) -> str:
    """A saved notebook with these outputs, in nbconvert's HTML without the libraries it loads."""
    book = nbformat.v4.new_notebook()
    for n, output in enumerate(shown):
        cell = nbformat.v4.new_code_cell("view", execution_count=n + 1)
        cell.outputs = [
            nbformat.v4.new_output(
                "execute_result", {"text/plain": "View(...)", "text/html": output}, execution_count=n + 1
            )
        ]
        book.cells.append(cell)
    saved = nbformat.reads(nbformat.writes(book), as_version=4)
    exporter = HTMLExporter(require_js_url="", mathjax_url="", jquery_url="", mermaid_js_url="")
    return exporter.from_notebook_node(saved)[0]


def test_a_saved_notebook_shows_its_views(open_page, read):
    named_views = views(read)
    page = open_page(notebook(*(view._repr_html_() for view in named_views.values())))
    page.wait_for_timeout(1500)
    frames = page.frames[1:]
    assert len(frames) == len(named_views)
    for frame, (name, view) in zip(frames, named_views.items(), strict=True):
        frame.wait_for_selector("canvas, .colored-tokens", timeout=20_000)
        assert frame.locator("canvas").count() == (4 if name.endswith("attention") else 0)
        assert frame.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        assert frame.evaluate("innerHeight") == view.height
        assert frame.evaluate("window.origin") == "null", "it cannot reach the notebook"
    assert (pixels(page) == [0, 114, 178]).all(2).any(), "the view's blue, not the picture's colors"
    frames[0].locator("canvas").nth(1).click()
    assert frames[0].locator("h2").last.inner_text() == "2.0"


def test_the_picture_shows_where_scripts_do_not_run(open_page, read):
    view = views(read)["attention_row"]
    picture = np.asarray(Image.open(io.BytesIO(view.picture)).convert("RGB")).astype(int)
    height, width, _ = picture.shape
    page = open_page(view, java_script_enabled=False)
    assert "do not run here" in page.locator("p.preview").inner_text()
    assert not page.locator("main").is_visible()
    page = open_page(view)
    page.wait_for_selector(".colored-tokens")
    assert not page.locator("p.preview").is_visible()
    # In a notebook the picture shows through a frame whose scripts do not run.
    frame = replace(view, height=700)._repr_html_()
    page = open_page(frame.replace('sandbox="allow-scripts"', 'sandbox=""'))
    page.wait_for_timeout(300)
    assert all("Blocked script execution" in said for said in open_page.wrong), open_page.wrong
    open_page.wrong.clear()
    assert page.locator("iframe").count() == 1
    box = page.locator("img").bounding_box()
    screen = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)
    left, top = round(box["x"]), round(box["y"])
    np.testing.assert_array_equal(screen[top : top + height, left : left + width], picture)


def test_the_picture_shows_where_frames_are_stripped(open_page, read):
    """A site that shows other people's notebooks keeps only harmless elements of the output."""
    for name, view in views(read).items():
        safe = bleach.clean(
            notebook(view._repr_html_()), tags=["div", "img"], attributes={"img": ["src", "alt"]}, protocols=["data"],
            strip=True,
        )  # fmt: skip
        assert "<iframe" not in safe
        assert "srcdoc" not in safe
        (source,) = re.findall(r'src="(data:image/png;base64,[^"]*)"', safe)
        page = open_page(f'<img id="only" src="{html.unescape(source)}">')
        size = Image.open(io.BytesIO(view.picture)).size
        assert page.locator("#only").evaluate("i => [i.naturalWidth, i.naturalHeight]") == list(size), name
