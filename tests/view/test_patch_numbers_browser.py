"""The numbers on the patch view's page, in a real browser, against the results' own numbers.

Two images with grids that are not square, eleven layers, destinations out of order: no two axes,
measures, parts or rows can be exchanged unseen.
"""

import itertools

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers.patch_page import SHOWN, near, number, opened, row_of, share_on_images, shares
from helpers.patch_results import UNEVEN_DEST, uneven

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def results():
    return uneven()


@pytest.fixture
def page(open_page, results):
    return opened(open_page, mv.view.patches(*results))


def center(page, grid, stage: int, row: int, col: int) -> tuple[float, float]:
    """The pixel on the page of a patch's center: the crop evenly divided."""
    area = page.locator(".stage").nth(stage).locator(".sees").bounding_box()
    return area["x"] + (col + 0.5) / grid.cols * area["width"], area["y"] + (row + 0.5) / grid.rows * area["height"]


CASES = list(itertools.product(UNEVEN_DEST, (0, 4, 10), (0, 1, 3), (0, 1)))
"""(destination, layer, head with 0 for all, measure with 0 for raw)."""


def test_all_facts_are_the_results_shares(page, results):
    inputs, _, norms = results
    tokens = inputs.tokens
    page.mouse.click(*center(page, tokens.grids[1], 1, 2, 0))
    pinned = tokens.position(2, 0, image=1)
    for case in CASES:
        pinned = 13 if case[0] == 13 else pinned  # a patch that is picked shows its own words
        shown, row = page.evaluate(SHOWN, list(case)), row_of(norms, *case)
        groups = {
            "on image 0": tokens.images[0], "on image 1": tokens.images[1], "on text": tokens.text,
            "on special tokens": tokens.special,
        }  # fmt: skip
        expected = {name: 100 * row[where].sum() / row.sum() for name, where in groups.items()}
        facts = {name: number(value) for name, value in shown["facts"].items()}
        this = facts.pop("on this patch")
        assert list(facts) == list(expected)
        assert facts == pytest.approx(expected, abs=0.051), case
        assert this == near(row[pinned], row[tokens.image].max()), case
        on_chips = [number(text.split(" · ")[2]) for text in shown["images"]]
        assert on_chips == pytest.approx([expected["on image 0"], expected["on image 1"]], abs=0.051)
        assert [text.split(" · ")[:2] for text in shown["images"]] == [
            ["image 0", "2 × 3 patches"], ["image 1", "3 × 2 patches"],
        ]  # fmt: skip


def test_a_text_tokens_own_number(page, results):
    """Its part of the row has a maximum of its own."""
    inputs, _, norms = results
    tokens = inputs.tokens
    page.get_by_role("button", name="at position 10", exact=False).click()
    for dest, layer, head, measure in itertools.product((19, 20), (0, 10), (0, 3), (0, 1)):
        facts = page.evaluate(SHOWN, [dest, layer, head, measure])["facts"]
        row = row_of(norms, dest, layer, head, measure)
        assert number(facts["on token “or”"]) == near(row[10], row[torch.cat([tokens.text, tokens.special])].max())


def test_heat_legend_and_read_out_are_the_results_numbers(page, results):
    inputs, _, norms = results
    tokens = inputs.tokens
    page.mouse.move(*center(page, tokens.grids[1], 1, 2, 0))
    hovered = tokens.position(2, 0, image=1)
    for case in CASES:
        shown, row = page.evaluate(SHOWN, list(case)), row_of(norms, *case)
        top = row[tokens.image].max()
        assert number(shown["top"]) == near(top, 0), case
        assert [np.shape(view)[:2] for view in shown["heat"]] == [(2, 3), (3, 2)]
        assert shares(shown["heat"]) == pytest.approx(row[tokens.image] / top, abs=0.02), case
        assert shown["inside"] == 0, "inside its frame a patch keeps its colors"
        place, numbers = shown["read"].split(": ")
        value, percent = numbers.removesuffix(" % of the largest").split(", ")
        assert place == "row 2, column 0 of image 1"
        assert number(value) == near(row[hovered], top), case
        assert number(percent) == pytest.approx(100 * row[hovered] / top, abs=0.5), case
        _, layer, head, measure = case
        what = "norm written" if measure else "attention weight"
        by = (
            (" by " if measure else " of ") + f"head {head - 1}"
            if head
            else [", mean of 3 heads", ", heads summed"][measure]
        )
        assert shown["unit"] == what + by
        assert f"attention of layer {layer}, which reads state {layer}" in shown["heading"]


def test_bars_are_shares_of_the_largest_of_their_part(page, results):
    inputs, _, norms = results
    tokens = inputs.tokens
    rest = torch.cat([tokens.text, tokens.special])
    for case in CASES:
        shown, row = page.evaluate(SHOWN, list(case)), row_of(norms, *case)
        expected = {p: row[p] / row[rest].max() for p in rest.tolist()} | {13: row[13] / row[tokens.image].max()}
        expected = {p: 0 if x < 0.02 else x for p, x in expected.items()}
        assert {int(p): x for p, x in shown["bars"].items()} == pytest.approx(expected, abs=0.025), case


def test_every_patch_reads_out_its_own_number(page, results):
    inputs, _, norms = results
    tokens = inputs.tokens
    page.evaluate(SHOWN, [19, 10, 2, 1])
    row = row_of(norms, 19, 10, 2, 1)
    for image, grid in enumerate(tokens.grids):
        for r, c in np.ndindex(grid.rows, grid.cols):
            page.mouse.move(*center(page, grid, image, r, c))
            place, numbers = page.locator(".read").inner_text().split(": ")
            assert place == f"row {r}, column {c} of image {image}"
            value = row[tokens.position(r, c, image=image)]
            assert number(numbers.split(", ")[0]) == near(value, row[tokens.image].max())
            assert number(page.locator("dd").last.inner_text()) == number(numbers.split(", ")[0])


def test_the_map_of_layers_and_heads(page, results):
    """Opacity runs from 0 to the largest share, layer 0 at the bottom, head 0 left."""
    inputs, _, norms = results
    tokens = inputs.tokens
    for dest, measure in itertools.product(UNEVEN_DEST, (0, 1)):
        shown, share = page.evaluate(SHOWN, [dest, 7, 2, measure]), share_on_images(norms, tokens, dest, measure)
        high, area = share.max(), page.locator(".map").bounding_box()
        assert [number(x) for x in shown["mapEnds"]] == pytest.approx([0, 100 * high], abs=0.051)
        drawn = np.concatenate([np.array(canvas) for canvas in shown["map"]], 1)[::-1, :, 3]
        assert drawn.shape == share.shape
        assert drawn / 255 == pytest.approx(share / high, abs=0.003)
        for layer, head in ((0, 0), (10, 3), (9, 1)):
            x = 12 if head == 0 else area["width"] - (3 - head + 0.5) * 24
            page.mouse.move(area["x"] + x, area["y"] + area["height"] * (11 - layer - 0.5) / 11)
            name = f"head {head - 1}" if head else "all heads"
            start, value = page.locator(".map").get_attribute("title").split(": ")
            assert start == f"layer {layer}, {name}"
            assert number(value.removesuffix(" on the image")) == pytest.approx(100 * share[layer, head], abs=0.051)
        mark = page.locator(".map .mark").bounding_box()
        assert (mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2) == pytest.approx(
            (area["x"] + area["width"] - 1.5 * 24, area["y"] + area["height"] * 3.5 / 11), abs=2
        ), "layer 7, the second head"
    page.mouse.click(area["x"] + area["width"] - 3, area["y"] + area["height"] * 8.5 / 11)
    assert page.locator(".layer output").inner_text() == "2 of 0 to 10"
    assert page.locator("select").input_value() == "3"
    labels = {span.inner_text(): span.bounding_box() for span in page.locator(".map .axis").all()}
    for text in set(labels) - {"all", "0", "1", "2"} | {"10"}:
        middle = labels[text]["y"] + labels[text]["height"] / 2
        assert middle == pytest.approx(area["y"] + area["height"] * (10.5 - int(text)) / 11, abs=4)


def test_words_and_chances_of_each_state(page, results):
    """The lens read every other state: its rows keep their numbers, and others are not read."""
    inputs, lens, _ = results
    tokens = inputs.tokens
    pieces, probs = lens.pieces(), lens.probs.numpy()
    for place, cell in [(9, (0, 1, 2)), (15, (1, 2, 0)), (10, None)]:
        if cell:
            image, r, c = cell
            assert tokens.position(r, c, image=image) == place
            page.mouse.move(*center(page, tokens.grids[image], *cell))
        else:
            page.get_by_role("button", name="at position 10", exact=False).click()
            page.mouse.move(5, 5)
        point = lens.position.tolist().index(place)
        rows = page.locator("tbody tr").all()
        assert [row.locator("th").inner_text() for row in rows] == [str(s) for s in (11, 9, 7, 5, 3, 1)]
        for row, at in zip(rows, range(5, -1, -1), strict=True):
            assert row.locator("td bdi").all_inner_texts() == [p.strip() for p in pieces[lens.states[at]][place]]
            chances = [int(x or 0) for x in row.locator("td span").all_inner_texts()]
            assert chances == pytest.approx(100 * probs[at, point], abs=1)
    for layer, note in [(0, "state 0 not read"), (5, "state 5"), (10, "state 10 not read"), (11, "state 11, output")]:
        page.locator(".layer input").fill(str(layer))
        assert page.locator(".panel-words h2 small").inner_text().strip() == f"token “or”, {note}"
        marked = page.locator("tr[aria-current] th").all_inner_texts()
        assert marked == ([str(layer)] if layer % 2 else [])
    assert page.locator(".layer output").inner_text() == "output"
    assert page.locator("dt").count() == 0, "no layer reads the output: no shares"
    assert page.locator(".layer input").get_attribute("aria-valuetext") == "the output, state 11"


def test_no_layer_reads_the_output_so_it_has_no_heat(page, results):
    inputs, _, _ = results
    page.evaluate(SHOWN, [19, 10, 2, 1])
    page.mouse.move(*center(page, inputs.tokens.grids[1], 1, 2, 0))
    assert page.locator(".clip canvas:visible").count() == 2
    assert page.locator(".read").inner_text().startswith("row 2, column 0 of image 1: ")
    page.locator(".layer input").fill("11")
    assert page.locator(".clip canvas:visible").count() == 0
    assert not page.locator(".panel-image .legend").is_visible()
    assert page.locator(".read").inner_text() == "row 2, column 0 of image 1"
    assert "no layer reads state 11, the output" in page.locator(".panel-image h2").inner_text()
    page.locator(".layer input").fill("10")
    assert page.locator(".clip canvas:visible").count() == 2


def test_queries_have_maxima_of_their_own(open_page):
    inputs, lens, norms, reading = uneven(patches=False)
    page, tokens = opened(open_page, mv.view.patches(inputs, lens, norms, reading)), inputs.tokens
    maps = reading.map[0].double().numpy()
    for query, position in enumerate(tokens.image.tolist()):
        shown = page.evaluate(SHOWN, [position, 5, 0, 1])
        assert number(shown["top"]) == near(maps[query].max(), 0)
        assert shares(shown["heat"]) == pytest.approx(maps[query].flatten() / maps[query].max(), abs=0.02)
        assert shown["unit"] == f"Q-Former attention weight of query {query}, mean of layers and heads"
        page.mouse.move(*center(page, tokens.grids[0], 0, 1, 0))
        value, percent = page.locator(".read").inner_text().split(": ")[1].split(", ")
        assert number(value) == near(maps[query, 1, 0], maps[query].max())
        assert number(percent.removesuffix(" % of the largest")) == pytest.approx(
            100 * maps[query, 1, 0] / maps[query].max(), abs=0.5
        )
        page.mouse.move(5, 5)
    for dest, layer, head, measure in itertools.product((19, 17), (0, 10), (0, 3), (0, 1)):
        shown, row = page.evaluate(SHOWN, [dest, layer, head, measure]), row_of(norms, dest, layer, head, measure)
        heat = np.einsum("q,qrc->rc", row[tokens.image], maps)
        assert number(shown["top"]) == near(heat.max(), heat.max())
        assert shares(shown["heat"]) == pytest.approx(heat.flatten() / heat.max(), abs=0.03)
        assert "from each query × where that reads" in shown["unit"]
