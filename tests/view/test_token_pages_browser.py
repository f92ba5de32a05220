"""The numbers on pages of single tokens, on every screen, against the arrays that were drawn."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.page_rules import CONTRAST, CUT, SCREENS, SMALL
from helpers.patch_page import CELLS
from helpers.token_pages import hostile_results, opened, pixels, plain, shown, views
from mechvlm.datasets.scenes import scenes
from mechvlm.view.pooling import pool_attention, token_groups

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def read(llava_vlm):
    return hostile_results(llava_vlm)


def shares(page) -> dict[str, float]:
    """The share of the largest that each token's color shows, by its text; below 0 as such."""
    read = """spans => spans.map(s => [s.textContent,
        (s.classList.contains("below") ? -1 : 1) * s.style.getPropertyValue("--share")])"""
    return {
        shown(text): share for text, share in page.locator(".panel-tokens .colored-tokens > span").evaluate_all(read)
    }


def frames(page) -> np.ndarray:
    """The opacity of each cell's frame, and below 0 where it has the other color."""
    cells = page.locator(".clip canvas").evaluate_all(
        f"canvases => canvases.flatMap(c => ({CELLS})(c)).flat().map(c => c.frame)"
    )
    return np.array([(-alpha if green > red else alpha) / 255 for red, green, _, alpha in cells])


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_everything_is_read_and_hit_on_every_screen(open_page, read, width, scheme):
    together = views(read)
    first, *others = together.values()
    for view in others:
        first = first + view
    page = opened(open_page, first, width, scheme)
    page.locator("input[type=search]").fill("w")
    seen = page.evaluate(CONTRAST)
    assert len(seen) > 150
    assert [text for ratio, text in seen if ratio < 4.5] == []
    assert (
        page.evaluate(
            SMALL.replace("input, select", "input, select, .panel-tokens .colored-tokens > span, .maps [role=button]")
        )
        == []
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page does not scroll sideways"
    assert page.locator("main").count() == page.locator("h1").count() == 1
    assert page.locator(".title").count() == 5
    assert page.evaluate(CUT, ".title, h2, .why, .asked, .tokens, .line, .colored-tokens > span > span, .keys") == []
    paper = "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 28)"
    for where in ("html", ".token-view"):
        assert page.locator(where).first.evaluate("n => getComputedStyle(n).backgroundColor") == paper
    assert page.locator("[data-circuitsvis] > div:not(:empty)").count() > 10
    bundles = "[...document.scripts].filter(s => s.text.startsWith('\"use strict\";var CircuitsVis')).length"
    assert page.evaluate(bundles) == 1
    light = pixels(page.locator(".maps canvas").last)[5, -5]
    assert (light.min() > 240) == (scheme == "light"), "the maps' ground is the page's"


def test_tokens_have_the_colors_of_their_values(open_page, read):
    """On the words and on the image, each to its own largest, with the legends that say it."""
    inputs, *_ = read
    tokens, values = inputs.tokens, torch.zeros(len(inputs.tokens))
    values[tokens.image] = torch.linspace(-1, 3, 16)
    last = tokens.last
    values[last], values[0] = -2.0, 1.0
    page = opened(open_page, mv.view.tokens(inputs, values, name="my values"))
    assert page.locator("h1").inner_text() == "my values"
    assert page.locator(".asked").inner_text() == f"{inputs.model} was asked: {inputs.prompts[0]}"
    words = shares(page)
    assert len(words) == len(tokens.text) + len(tokens.special)
    assert [share for share in words.values() if share] == [0.5, -1], "half of the largest, and the largest below 0"
    assert frames(page) == pytest.approx(np.linspace(-1, 3, 16) / 3, abs=0.005)
    legends = page.locator(".legend")
    assert [text.split("\n") for text in legends.all_inner_texts()] == [
        ["-3", "3", "my values"],
        ["-2", "2", "my values"],
    ]
    assert page.locator(".chip.image").count() == 1, "the image's patches stand on the image alone"
    assert page.locator("figure.look").bounding_box()["x"] < page.locator(".tokens").bounding_box()["x"], (
        "beside each other"
    )
    ground = "s => getComputedStyle(s.firstChild).backgroundColor"
    colors = [page.locator(".colored-tokens > span").nth(i).evaluate(ground) for i in (0, -1)]
    # The frames' pink, and the green of values below 0.
    assert colors[0].startswith("color(srgb 0.83")
    assert colors[1].startswith("color(srgb 0 0.47")
    stage = page.locator(".stage")
    box = stage.bounding_box()
    stage.hover(position={"x": box["width"] * 0.75, "y": box["height"] * 0.9})
    assert (
        page.locator(".read").first.inner_text()
        == f"patch at row 3, column 3, position {int(tokens.image[-1])}: 3, 100 % of the largest"
    )
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".read").last.inner_text().endswith(f"position {last}: -2, 100 % of the largest")
    page.keyboard.press("ArrowLeft")
    assert f"position {last - 1}: 0, 0 %" in page.locator(".read").last.inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".pinned").count() == 0


def test_the_answer_stands_first(open_page, llava_vlm):
    answer = llava_vlm.generate(llava_vlm.inputs(noise_image(0), "what is this"), max_new_tokens=5)[0]
    page = opened(open_page, mv.view.tokens(answer, answer.logprobs, name="log-probability"))
    headings = page.locator("h2").all_inner_texts()
    assert headings == ["Image", "Answer", "Prompt"]
    own = page.locator(".tokens").first.locator(".colored-tokens > span")
    drawn = own.evaluate_all("spans => spans.map(s => -s.style.getPropertyValue('--share'))")
    assert drawn == pytest.approx((answer.logprobs / answer.logprobs.abs().max()).tolist(), abs=0.001)
    assert page.locator(".tokens").last.locator(".colored-tokens > span:not(.without)").count() == 0
    page.locator(".tokens").last.locator(".colored-tokens > span").first.hover()
    assert page.locator(".read").last.inner_text().endswith("no value")


def test_a_row_answers_to_its_layer_and_head(open_page, read):
    inputs, _, norms = read
    last, tokens = inputs.tokens.last, inputs.tokens
    page = opened(open_page, mv.view.attention_row(inputs, norms, last))
    words = torch.tensor([p for p in tokens.all.tolist() if p not in set(tokens.image.tolist())])
    assert page.locator(".layer output b").inner_text() == "1", "the middle layer first, as in the patch view"
    for keys, layer, head, values in [
        ("ArrowLeft", 0, 0, norms.norm[0, 0, last]), ("ArrowRight ArrowRight", 2, 0, norms.norm[2, 0, last]),
        ("", 2, 3, norms.norm_head[2, 0, 2, last]),
    ]:  # fmt: skip
        page.locator("select").select_option(index=head)
        page.locator("select").evaluate("s => s.blur()")
        for key in keys.split():
            page.keyboard.press(key)
        page.wait_for_selector(".drawing", state="detached")
        assert page.locator(".layer output b").inner_text() == str(layer)
        assert frames(page) == pytest.approx((values[tokens.image] / values[tokens.image].max()).numpy(), abs=0.005)
        drawn = page.locator(".colored-tokens > span").evaluate_all(
            "s => s.map(x => +x.style.getPropertyValue('--share'))"
        )
        assert drawn == pytest.approx((values[words] / values[words].max()).tolist(), abs=0.002)
        tops = [float(text.split("\n")[1]) for text in page.locator(".legend").all_inner_texts()]
        assert tops == pytest.approx([float(values[tokens.image].max()), float(values[words].max())], rel=0.05)


def test_attention_shows_what_a_picked_destination_reads(open_page, read):
    """Maps by pointer, by keys and by the slider; the image's cells and the tokens follow."""
    inputs, _, norms = read
    page = opened(open_page, mv.view.attention(inputs, norms, [0, 2], pool=2, heads=[0, 1]))
    names, member = token_groups(inputs.tokens, 2)
    cells = [names.index(f"▦r{r}c{c}") for r in (0, 1) for c in (0, 1)]
    small = page.locator(".maps [role=button]")
    assert page.locator("h4").all_inner_texts() == ["0 all", "0.0", "0.1", "2 all", "2.0", "2.1"]

    def check(layer: int, head: int, dest: int):
        page.wait_for_selector(".run > .drawing", state="detached")
        values = norms.norm[layer, 0] if not head else norms.norm_head[layer, 0, head - 1]
        row = pool_attention(values, member)[dest]
        assert frames(page) == pytest.approx((row[cells] / row[cells].max()).numpy(), abs=0.005)
        others = [i for i in range(len(names)) if i not in cells]
        drawn = page.locator(".panel-tokens .colored-tokens > span").evaluate_all(
            "s => s.map(x => +x.style.getPropertyValue('--share'))"
        )
        assert drawn == pytest.approx((row[others] / row[others].max()).tolist(), abs=0.002)
        pressed = [i for i, one in enumerate(small.all()) if one.get_attribute("aria-pressed") == "true"]
        assert pressed == [(0 if layer == 0 else 3) + head]
        return pixels(page.locator(".maps canvas").last)

    seen = [check(0, 0, -1)]
    assert (np.ptp(seen[0], axis=2) > 40).any(), "there is color in it"
    small.nth(4).click()
    page.mouse.move(1, 1)
    seen.append(check(2, 1, -1))
    page.keyboard.press("ArrowRight")
    seen.append(check(2, 2, -1))
    page.keyboard.press("Escape")
    page.locator(".layer input").fill("0")
    seen.append(check(0, 2, -1))
    small.nth(0).hover()
    page.mouse.move(1, 1)
    page.wait_for_timeout(200)
    for before, after in pairwise(seen):
        assert (before != after).any(axis=2).mean() > 0.01, "the large map is another"
    page.locator(".stage").click(position={"x": 200, "y": 100})
    page.mouse.move(1, 1)
    check(0, 2, cells[0])
    assert page.locator(".read").first.inner_text().startswith("cell r0c0: ")
    page.locator(".panel-tokens .colored-tokens > span").nth(-3).click()
    page.mouse.move(1, 1)
    check(0, 2, [i for i in range(len(names)) if i not in cells][-3])
    small.nth(5).focus()
    page.keyboard.press("Enter")
    assert page.locator(".panel-tokens h2 small").inner_text().strip() == "layer 2, head 1"
    box = page.locator(".stage").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(90 / 60, rel=0.02)


def test_a_maps_colors_follow_its_values(open_page, read):
    inputs, _, norms = read
    page = opened(open_page, mv.view.attention(inputs, norms, 1, pool=1, heads=(), measure="weight"))
    picture = pixels(page.locator(".maps canvas").first)  # the small map has no axes
    data = page.locator("script[type='application/json']").evaluate("s => JSON.parse(s.textContent)")
    values, n = np.array(data["patterns"][0]), len(data["labels"])
    height, width, _ = picture.shape
    at = [[picture[int((i + 0.5) * height / n), int((j + 0.5) * width / n)] for j in range(n)] for i in range(n)]
    darkness = 255 * 3 - np.array(at).sum(2)
    assert np.corrcoef(darkness.ravel(), values.ravel())[0, 1] > 0.9


def test_topk_shows_the_words_of_a_patch(open_page):
    """The words of a trained model, whose chances are not all alike."""
    vlm = mv.load("tiny-llava")
    inputs = vlm.inputs([*scenes(6)][5].image, "Describe the scene.")
    lens = mv.logit_lens(vlm, inputs, k=3)
    page, pieces, grid = opened(open_page, mv.view.topk(inputs, lens)), lens.pieces(), inputs.tokens.grids[0]
    states = lens.states[::-1]
    for row, col, state in [(1, 1, states[0]), (2, 4, 3), (7, 6, 1)]:
        page.locator(".layer input").fill(str(state))
        box, place = page.locator(".stage").bounding_box(), inputs.tokens.position(row, col)
        spot = {"x": box["width"] * (col + 0.5) / grid.cols, "y": box["height"] * (row + 0.5) / grid.rows}
        page.locator(".stage").click(position=spot)
        page.mouse.move(1, 1)
        page.wait_for_selector(".drawing", state="detached")
        read = "rows => rows.map(r => [...r.querySelectorAll('bdi')].map(n => n.textContent))"
        words = page.locator("tbody tr").evaluate_all(read)
        assert [[plain(w) for w in line] for line in words] == [[plain(w) for w in pieces[s][place]] for s in states]
        assert page.locator(".panel-lines h2").inner_text() == f"At state {state}: row {row}"
        listed = [
            [plain(t) for t in line.locator(".colored-tokens > span > span").all_text_contents()]
            for line in page.locator(".line").all()
        ]
        own = [inputs.tokens.position(row, c) for c in range(grid.cols)]
        assert listed == [[plain(w) for w in pieces[state][position]] for position in own]
        chances = lens.probs[lens.states.index(state), :, 0].numpy()
        assert np.ptp(chances) > 0.05, "else nothing is tested"
        assert frames(page) == pytest.approx(chances, abs=0.009)
        point = lens.position.tolist().index(place)
        said = page.locator(".read").first.inner_text()
        assert said.startswith(f"patch at row {row}, column {col}, position {place}: ")
        assert float(said.split(": ")[1].strip("< %")) == pytest.approx(100 * chances[point], abs=0.6)
    assert page.locator(".legend").first.inner_text().split("\n")[:2] == ["0", "1"]
    assert not page.locator(".panel-tokens .legend").is_visible(), "no token was read, so there is nothing to show"
    page.locator(".line button").first.click()
    title = page.locator(".panel-tokens h2 small").inner_text().strip()
    assert title == f"patch at row 7, column 0, position {inputs.tokens.position(7, 0)}"


def test_queries_stand_among_the_words(open_page, blip_vlm):
    """They have no place on the image, which is shown as it is."""
    inputs = blip_vlm.inputs(noise_image(0, (90, 60)), "what is this")
    lens, norms = mv.read(blip_vlm, inputs, mv.LogitLens(k=2), mv.NormAttention(dst="all pairs"))
    tokens, last = inputs.tokens, inputs.tokens.last
    views = [
        mv.view.attention_row(inputs, norms, last), mv.view.topk(inputs, lens), mv.view.attention(inputs, norms, 1, pool=2),
    ]  # fmt: skip
    page = opened(open_page, views[0] + views[1] + views[2])
    first = page.locator(".token-view").first
    assert first.locator(".stage, .chip.image, .panel-image .legend").count() == 0
    assert first.locator(".look img").evaluate("i => [i.naturalWidth, i.naturalHeight]") == [90, 60]
    assert "No token has a place on the image" in first.locator(".panel-image").inner_text()
    chips = first.locator(".colored-tokens > span")
    assert [plain(text) for text in chips.all_text_contents()][:5] == [f"q{i}" for i in range(5)]
    row = norms.norm[int(first.locator(".layer output b").inner_text()), 0, last, tokens.all]
    drawn = chips.evaluate_all("s => s.map(x => +x.style.getPropertyValue('--share'))")
    assert drawn == pytest.approx((row / row.max()).tolist(), abs=0.002)
    names = page.locator(".token-view").nth(2).locator(".colored-tokens > span").all_text_contents()
    assert [plain(name) for name in names][:2] == ["q0–2", "q3–4"]
