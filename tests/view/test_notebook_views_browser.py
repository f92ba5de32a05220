"""Views in notebooks, and pages whose scripts or frames do not run."""

import html
import io
import re
from dataclasses import replace

import bleach
import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter
from PIL import Image

import mechvlm as mv
from helpers.patch_results import large_inputs, synthetic
from helpers.token_pages import hostile_results, views

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def read(llava_vlm):
    return hostile_results(llava_vlm)


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
    inside = page.frames[1:]
    assert len(inside) == len(named_views)
    for frame, (name, view) in zip(inside, named_views.items(), strict=True):
        frame.wait_for_selector(".token-view[data-ready]", timeout=20_000)
        assert frame.locator(".maps canvas").count() == (4 if name.endswith("attention") else 0)
        assert frame.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        assert frame.evaluate("innerHeight") == view.height
        assert frame.evaluate("window.origin") == "null", "it cannot reach the notebook"
        overflow = frame.evaluate("document.documentElement.scrollHeight - innerHeight")
        assert overflow < 150, f"{name} does not fit its frame"
    inside[0].locator(".maps canvas").nth(1).click()
    assert inside[0].locator(".panel-tokens h2 small").inner_text().strip() == "layer 2, head 0"


def test_the_picture_shows_where_scripts_do_not_run(open_page, read):
    view = views(read)["attention_row"]
    picture = np.asarray(Image.open(io.BytesIO(view.picture)).convert("RGB")).astype(int)
    height, width, _ = picture.shape
    page = open_page(view, java_script_enabled=False)
    assert "do not run here" in page.locator("p.preview").inner_text()
    assert not page.locator("main").is_visible()
    page = open_page(view)
    page.wait_for_selector(".colored-tokens", state="attached")
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


@pytest.mark.parametrize("layers", [8, 32])
@pytest.mark.parametrize("answer", [None, "a red circle and a blue square on sand"])
def test_the_patch_view_fits_its_frame(open_page, answer, layers):
    """In JupyterLab beside its list of files; a frame that is a little too tall leaves white."""
    inputs = large_inputs(answer=answer)
    view = mv.view.patches(
        inputs, *synthetic(inputs, layers, heads=8, dest=tuple(inputs.tokens.writing.tolist()) if answer else ())
    )
    page = open_page(view, viewport={"width": 840, "height": view.height})
    page.wait_for_selector(".view[data-ready]")
    bottom = page.locator(".view").evaluate("node => node.getBoundingClientRect().bottom")
    assert view.height - 120 < bottom < view.height + 60
