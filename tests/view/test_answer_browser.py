"""The answer's words and the map of heads in a real browser, against the results' own numbers."""

import itertools

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers.patch_page import CELLS, SHOWN, near, number, opened, shares, word_row
from helpers.patch_results import large_inputs, synthetic, uneven

pytestmark = pytest.mark.browser

ANSWER = (" red", " squ", "irrel", ",", " red")
"""Tokens of an answer at the positions 21 to 25."""
WROTE = [[20], [21, 22], [23], [24], [25]]
"""The positions that wrote its words, a comma among them; the last is what came after it."""
CASES = list(itertools.product(range(5), (0, 4, 10), (0, 1, 3), (0, 1)))
"""(word, layer, head with 0 for all, measure with 0 for raw)."""


@pytest.fixture(scope="module")
def results():
    return uneven(dest=(22, 17, 20, 25, 21, 13, 23, 24), answer=ANSWER)


@pytest.fixture
def page(open_page, results):
    return opened(open_page, mv.view.patches(*results))


def test_the_answer_is_at_the_top(page):
    assert page.locator("h2").first.inner_text().startswith("Answer")
    assert page.locator(".written .chip").all_inner_texts() == ["red", "squirrel", ",", "red", "…"]
    assert page.locator(".prompt:not(.written) .chip").all_inner_texts()[-2:] == ["is", "it"], "not in the prompt again"
    assert page.locator(".panel-image h2").inner_text().startswith("Looked at while it wrote “red”")
    assert page.locator("[aria-pressed=true].chip").all_inner_texts() == ["red"]
    assert (
        page.locator(".written .chip").nth(1).get_attribute("aria-label")
        == "while it wrote “squirrel”, at positions 21 to 22"
    )


def test_a_words_numbers_are_means_over_the_positions_that_wrote_it(page, results):
    inputs, _, norms = results
    tokens = inputs.tokens
    groups = {
        "on image 0": tokens.images[0], "on image 1": tokens.images[1], "on text": tokens.text,
        "on special tokens": tokens.special,
    }  # fmt: skip
    rest = torch.cat([tokens.text, tokens.special])
    names = [
        "while it wrote “red”",
        "while it wrote “squirrel”",
        "while it wrote “,”",
        "while it wrote “red”",
        "after the answer",
    ]
    for word, layer, head, measure in CASES:
        case = word, layer, head, measure
        shown, row = page.evaluate(SHOWN, [[word], layer, head, measure]), word_row(norms, WROTE[word], *case[1:])
        top = row[tokens.image].max()
        assert shown["heading"] == f"Looked at {names[word]}  attention of layer {layer}", case
        assert len(shown["pressed"]) == 1
        assert shown["pressed"][0].startswith(names[word])
        assert shown["unit"].endswith("mean over the 2 positions that wrote its tokens") == (word == 1), case
        expected = {name: 100 * row[where].sum() / row.sum() for name, where in groups.items()}
        facts = {name: number(value) for name, value in shown["facts"].items() if name in groups}
        assert facts == pytest.approx(expected, abs=0.051), case
        assert number(shown["top"]) == near(top, 0), case
        assert shares(shown["heat"]) == pytest.approx(row[tokens.image] / top, abs=0.02), case
        bars = np.array([x for bars in shown["wordBars"] for x in bars])
        lengths = row[21:26] / row[rest].max()
        assert bars == pytest.approx(np.where(lengths < 0.02, 0, lengths), abs=0.025), case
        assert shown["bars"]["10"] == pytest.approx(row[10] / row[rest].max(), abs=0.045), case
        by_head = [[word_row(norms, WROTE[word], la, h, measure) for h in range(4)] for la in range(11)]
        on_image = np.array(by_head)[..., tokens.image].sum(-1) / np.array(by_head).sum(-1)
        assert [number(x) for x in shown["mapEnds"]] == pytest.approx([0, 100 * on_image.max()], abs=0.051), case


def test_the_prompts_last_token_and_the_first_word_are_one_row(page, results):
    first, last = (page.evaluate(SHOWN, [dest, 4, 2, 1]) for dest in ([0], 20))
    assert last["heading"].startswith("What “it” looked at")
    assert [first[key] for key in ("heat", "facts", "top", "map")] == [
        last[key] for key in ("heat", "facts", "top", "map")
    ]
    assert first["pressed"] != last["pressed"]


def test_words_by_pointer_and_keys(page):
    heading = page.locator(".panel-image h2")
    chips = page.locator(".written .chip")
    chips.nth(1).hover()
    assert heading.inner_text().startswith("Looked at while it wrote “squirrel”")
    page.mouse.move(5, 5)
    assert heading.inner_text().startswith("Looked at while it wrote “red”")
    chips.nth(2).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert chips.nth(3).get_attribute("aria-pressed") == "true"
    assert chips.nth(0).get_attribute("aria-pressed") == "false", "the other “red”"
    page.keyboard.press("ArrowRight")
    assert page.locator(".layer output b").inner_text() == "6", "arrows still move the layer"
    boxes = [bar.evaluate("i => [i.offsetLeft, i.offsetWidth]") for bar in chips.nth(1).locator("i").all()]
    assert boxes[0][0] + boxes[0][1] == pytest.approx(boxes[1][0], abs=1), "one bar for each token, side by side"


def test_a_word_that_was_not_read_is_no_button(open_page):
    page = opened(open_page, mv.view.patches(*uneven(dest=(20, 21), answer=ANSWER)))
    chips = page.locator(".written .chip")
    assert chips.all_inner_texts() == ["red", "squ", "irrel", ",", "red"], "a word of which half was read is in two"
    assert [chip.evaluate("c => c.type === 'button'") for chip in chips.all()] == [True, True, False, False, False]
    assert chips.nth(2).get_attribute("title") == "while it wrote “irrel”, at position 22: no destination of norms"


def test_the_answer_of_queries(open_page):
    inputs, lens, norms, reading = uneven(patches=False, dest=(20, 21, 22), answer=ANSWER[:3])
    page, maps = opened(open_page, mv.view.patches(inputs, lens, norms, reading)), reading.map[0].double().numpy()
    for layer, head, measure in itertools.product((0, 10), (0, 3), (0, 1)):
        shown = page.evaluate(SHOWN, [[1], layer, head, measure])
        heat = np.einsum("q,qrc->rc", word_row(norms, [21, 22], layer, head, measure)[inputs.tokens.image], maps)
        assert number(shown["top"]) == near(heat.max(), heat.max())
        assert shares(shown["heat"]) == pytest.approx(heat.flatten() / heat.max(), abs=0.03)


PICKED = """() => { const text = s => document.querySelector(s).textContent;
    const cells = (CELLS)(document.querySelector(".clip canvas"));
    return { layer: Number(text(".layer output b")), head: Number(document.querySelector("select").value),
        note: text(".panel-map h2 small").trim(), share: text("dd"), top: text(".panel-image .legend span:nth-of-type(2)"),
        heat: [cells.map(row => row.map(cell => cell.frame))] }; }""".replace("CELLS", CELLS)


@pytest.fixture(scope="module")
def large():
    """32 layers x 32 heads, and an answer of two words."""
    inputs = large_inputs(answer="a redhead")
    return inputs, *synthetic(inputs, dest=tuple(inputs.tokens.writing.tolist()))


@pytest.mark.parametrize(("width", "touch"), [(1280, False), (1440, False), (390, True)])
def test_heads_are_picked_at_32_x_32(open_page, large, width, touch):
    inputs, _, norms = large
    tokens = inputs.tokens
    page = open_page(
        mv.view.patches(*large), viewport={"width": width, "height": 900}, has_touch=touch, is_mobile=touch
    )
    page.wait_for_selector(".patch-view[data-ready]", timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".written .chip").nth(1).click()
    wrote = tokens.wrote("redhead").tolist()
    assert len(wrote) > 1
    canvas = page.locator(".map canvas").nth(1)
    canvas.scroll_into_view_if_needed()
    area = canvas.bounding_box()
    cell = area["width"] / 32, area["height"] / 32
    assert min(cell) > 8.5, "large enough to be hit"

    def check(layer: int, head: int):
        page.mouse.move(1, 1)
        picked, row = page.evaluate(PICKED), word_row(norms, wrote, layer, head, 1)
        assert (picked["layer"], picked["head"]) == (layer, head)
        assert picked["note"] == f"layer {layer}, " + (f"head {head - 1}" if head else "all heads")
        assert number(picked["share"]) == pytest.approx(100 * row[tokens.image].sum() / row.sum(), abs=0.051)
        assert number(picked["top"]) == near(row[tokens.image].max(), row[tokens.image].max())
        assert shares(picked["heat"]) == pytest.approx(row[tokens.image] / row[tokens.image].max(), abs=0.05)

    pick = page.touchscreen.tap if touch else page.mouse.click
    for layer, head in [(0, 1), (31, 32), (0, 32), (31, 1), (17, 9), (18, 9), (18, 10), (5, 24)]:
        for x, y in ((0.2, 0.2), (0.8, 0.8)):
            pick(area["x"] + (head - 1 + x) * cell[0], area["y"] + (31 - layer + y) * cell[1])
            check(layer, head)
    mark = page.locator(".map .mark").bounding_box()
    center = [mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2]
    assert center == pytest.approx([area["x"] + 23.5 * cell[0], area["y"] + 26.5 * cell[1]], abs=1)
    page.locator(".map").focus()
    for key, layer, head in [("ArrowUp", 6, 24), ("ArrowRight", 6, 25), ("ArrowDown", 5, 25), ("ArrowLeft", 5, 24)]:
        page.keyboard.press(key)
        check(layer, head)
    together = page.locator(".map canvas").first.bounding_box()
    pick(together["x"] + together["width"] / 2, area["y"] + 26.5 * cell[1])
    check(5, 0)
    page.keyboard.press("ArrowLeft")
    check(5, 0)
