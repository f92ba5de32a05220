"""Views that overlap, in a real browser: drawn apart and together, with one cursor."""

import numpy as np
import pytest

import mechvlm as mv
from helpers.patch_page import CELLS, opened
from helpers.several_views import results, tokens_of

pytestmark = pytest.mark.browser

ALPHA = """n => { const c = document.querySelectorAll(".clip canvas")[n];
    const { data, width } = c.getContext("2d").getImageData(0, 0, c.width, c.height), rows = [];
    for (let i = 0; i < data.length / 4; i++) (rows[Math.floor(i / width)] ??= []).push(data[4 * i + 3]);
    return rows; }"""


@pytest.fixture
def example():
    return results(tokens_of())


@pytest.fixture
def page(open_page, example):
    return opened(open_page, mv.view.patches(*example))


def spot(page, stage: int, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the image, 60 x 40, lies on the page."""
    box = page.locator(".stage").nth(stage).bounding_box()
    return box["x"] + x / 60 * box["width"], box["y"] + y / 40 * box["height"]


def test_sheets_are_drawn_apart_and_together_on_one_scale(page, example):
    tokens, norm = example[0].tokens, example[2].norm[0, 0, 0].numpy()
    captions = page.locator(".look figcaption").all_inner_texts()
    assert captions == ["all views together", "thumbnail: 2 × 3 patches", "tile 0,1: 2 × 2 patches"]
    whole, tile = (norm[view.positions.numpy()] for view in tokens.views[0])
    # Columns of the whole end at 20, 40, 60; those of the tile at 45 and 60, from 30.
    both = whole[:, [0, 1, 1, 2, 2]].copy()
    both[:, 2:] += tile[:, [0, 0, 1]]
    top = both.max()
    drawn = np.array(page.evaluate(ALPHA, 0))
    assert drawn.shape == (213, 320)
    middles = (np.array([10, 25, 35, 42.5, 52.5]) / 60 * 320).astype(int)
    assert (drawn[np.ix_([53, 160], middles)] == 0).all(), "the image itself, inside the frames"
    # Where the tile lies, frames are those of its smaller cells, nearer to the edge.
    lines = np.array([[3, 3, 1, 1, 1], [110, 110, 108, 108, 108]])
    assert drawn[lines, middles] / 255 == pytest.approx(both / top, abs=0.005)
    views = [np.array(page.locator(".clip canvas").nth(n).evaluate(CELLS)) for n in (1, 2)]
    for view, values in zip(views, (whole, tile), strict=True):
        alpha = np.array([[cell["frame"][3] for cell in row] for row in view])
        assert alpha / 255 == pytest.approx(values / top, abs=0.01)
    assert float(page.locator(".panel-image .legend span").nth(1).inner_text()) == pytest.approx(top, rel=0.06)


def test_one_cursor_goes_through_all_pictures(page):
    read = page.locator(".read")
    page.mouse.move(*spot(page, 1, 50, 10))
    assert read.inner_text().startswith("row 0, column 2 of thumbnail:")
    page.mouse.move(*spot(page, 0, 50, 10))
    assert read.inner_text().startswith("row 0, column 1 of tile 0,1:"), "the finest cell, where views overlap"
    page.mouse.move(*spot(page, 0, 5, 30))
    assert read.inner_text().startswith("row 1, column 0 of thumbnail:")
    hovers = page.locator(".stage .hover")
    assert [hovers.nth(n).is_visible() for n in range(3)] == [True] * 3
    boxes = [hovers.nth(n).bounding_box() for n in range(3)]
    stages = [page.locator(".stage").nth(n).bounding_box() for n in range(3)]
    for box, stage in zip(boxes, stages, strict=True):
        assert box["width"] / stage["width"] == pytest.approx(1 / 3, abs=0.01)
        assert (box["x"] - stage["x"]) / stage["width"] == pytest.approx(0, abs=0.01)
    # Keys move within a view, and from its edge to the view beside it.
    page.mouse.click(*spot(page, 0, 5, 30))
    page.mouse.move(0, 0)
    page.locator(".stage").first.focus()
    names = []
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
        names.append(read.inner_text().split(":")[0])
    assert names == [f"row {row}, column {col} of thumbnail" for row, col in ((1, 1), (1, 2), (0, 2))]
    assert "of thumbnail, state" in page.locator(".panel-words h2").inner_text()


def test_tiles_alone_are_one_picture(open_page):
    page = opened(open_page, mv.view.patches(*results(tokens_of(whole=False))))
    assert page.locator(".stage").count() == 1
    assert page.locator(".clip canvas").count() == 2
    page.keyboard.press("Escape")
    page.mouse.click(*spot(page, 0, 25, 30))
    page.locator(".stage").focus()
    page.mouse.move(0, 0)
    page.keyboard.press("ArrowRight")
    assert page.locator(".read").inner_text().startswith("row 1, column 0 of tile 0,1:"), "over the edge of a tile"
