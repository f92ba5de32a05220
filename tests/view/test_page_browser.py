"""The patch view as a reader meets it: on small and large screens, light and dark."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import mechvlm as mv
from helpers.page_rules import CONTRAST, SCREENS, SMALL
from helpers.patch_page import CELLS
from helpers.patch_results import large_inputs, synthetic, uneven
from mechvlm.datasets.scenes import scenes
from mechvlm.errors import ViewError

pytestmark = pytest.mark.browser

ANSWER = (" red", " squ", "irrel", ",", " red")
FOCUSED = """() => { const n = document.activeElement, inside = { ".written": "word", ".prompt": "token", ".layers": "layers",
    ".heads": "heads", th: "state" };
    const at = Object.keys(inside).find(where => n.closest(where));
    return at ? inside[at] : n.className || n.type || n.tagName; }"""


@pytest.fixture(scope="module")
def results():
    return uneven(dest=(22, 17, 20, 25, 21, 13, 23, 24), answer=ANSWER)


@pytest.fixture(scope="module")
def scene():
    """A blue heart and what the bundled LLaVA says of it: (inputs, lens, norms)."""
    vlm = mv.load("tiny-llava")
    inputs = vlm.inputs([*scenes(6)][5].image, "Describe the scene.").answered("a blue heart")
    return inputs, *mv.read(vlm, inputs, mv.LogitLens(), mv.NormAttention(dst="writing"))


def screen(open_page, view, width: int, scheme: str = "light"):
    phone = {"has_touch": True, "is_mobile": True} if width < 500 else {}
    page = open_page(view, viewport={"width": width, "height": 900}, color_scheme=scheme, **phone)
    page.wait_for_selector(".patch-view[data-ready]", timeout=60_000)
    return page


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_everything_is_read_and_hit_on_every_screen(open_page, results, width, scheme):
    page = screen(open_page, mv.view.patches(*results), width, scheme)
    page.locator("input[type=search]").fill("w6")
    page.locator(".keep").click()
    page.locator(".overlay").click()
    seen = page.evaluate(CONTRAST)
    assert len(seen) > 80
    assert [text for ratio, text in seen if ratio < 4.5] == []
    assert page.evaluate(SMALL) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page does not scroll sideways"
    assert page.locator("main").count() == page.locator("h1").count() == 1
    ground = page.evaluate("getComputedStyle(document.querySelector('.patch-view')).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    cut = page.locator(".prompt, h1, h2, .why, .said").evaluate_all(
        "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth + 1).map(n => n.outerHTML.slice(0, 80))"
    )
    assert cut == [], "no word is cut"


def test_what_is_what_is_said_on_the_page(open_page, results):
    page = screen(open_page, mv.view.patches(*results), 1280)
    text = page.locator("main").inner_text()
    assert page.locator("h1").inner_text() == "What made looked at"
    assert page.locator("h2").all_inner_texts()[:2] == ["Answer", "Prompt"], "the answer stands at the top"
    for line in (
        "the frames on the image show where the model looked while it wrote it",
        "The stronger a patch's frame, the more was read from it; inside, the image is as it is.",
        "The words that a patch is nearest to at each state",
        "The model has 11 layers, one after the other",
        "Each head of a layer looks by itself",
        "Norm-based: how long the vectors are that attention wrote.",
    ):
        assert line in text
    page.locator('[data-measure="0"]').click()
    assert "Raw: the attention weights." in page.locator("main").inner_text()


def test_a_color_is_seen_where_the_model_looked(open_page, scene):
    """The screen's own pixels: the image's inside the hottest patch's frame, the hue on it."""
    page = screen(open_page, mv.view.patches(*scene), 1280)
    page.keyboard.press("Escape")
    cells = page.locator(".clip canvas").evaluate(CELLS)
    alpha = np.array([[cell["frame"][3] for cell in row] for row in cells])
    row, col = divmod(int(alpha.argmax()), alpha.shape[1])
    assert alpha.max() == 255
    box, image = page.locator(".stage").bounding_box(), scene[0].images[0][0]
    shot = Image.open(io.BytesIO(page.locator(".stage").screenshot())).convert("RGB")
    x, y = (col + 0.5) / alpha.shape[1], (row + 0.5) / alpha.shape[0]
    inside = shot.getpixel((int(x * box["width"]), int(y * box["height"])))
    original = image.getpixel((int(x * image.width), int(y * image.height)))
    assert np.abs(np.array(inside) - original).max() < 25, "as it is"
    thin = min(1, max(alpha.shape) / 14)
    on_frame = shot.getpixel((int(x * box["width"]), int((row + 0.155 * thin) / alpha.shape[0] * box["height"])))
    assert np.abs(np.array(on_frame) - (214, 0, 108)).max() < 25
    # The legend is drawn by the same rule: 0, a quarter, a half, three quarters, all.
    legend = page.locator(".swatches canvas").evaluate(
        """c => { const { data, width } = c.getContext("2d").getImageData(0, 0, c.width, c.height), k = c.width / 5;
        return [0, 1, 2, 3, 4].map(i => { const at = 4 * (Math.floor(0.155 * k) * width + Math.floor((i + 0.5) * k));
            return [...data.slice(at, at + 4)]; }); }"""
    )
    assert [round(pixel[3] / 255, 2) for pixel in legend] == [0, 0.25, 0.5, 0.75, 1]
    assert np.abs(np.array(legend[4][:3]) - (214, 0, 108)).max() <= 1


def test_where_does_a_word_appear(open_page, scene):
    inputs, lens, _ = scene
    tokens, pieces = inputs.tokens, lens.pieces()
    hits = {s: [p for p in tokens.image.tolist() if pieces[s][p][0].strip().lower() == "heart"] for s in lens.states}
    first = next(state for state, own in hits.items() if own)
    assert len(hits[first]) > 0
    page = screen(open_page, mv.view.patches(*scene), 1280)
    page.locator("input[type=search]").fill("Heart")
    assert f"from state {first} on" in page.locator(".said").inner_text()
    counts = {
        int(b.locator("span").inner_text()): int(b.locator("b").inner_text())
        for b in page.locator(".counts button").all()
    }
    assert counts == {state: len(own) for state, own in hits.items()}
    page.locator(".jump").click()
    assert page.locator(".layer output b").inner_text() == str(first)
    row, col = tokens.cell(hits[first][0])[1:]
    assert page.locator(".panel-words h2 small").inner_text().strip().startswith(f"patch r{row} c{col}")
    # Its chance over the states at this patch, where the lens carries it.
    point = lens.position.tolist().index(hits[first][0])
    probs = {s: lens.probs[i, point] for i, s in enumerate(lens.states)}
    carried = {s: [w.strip().lower() for w in pieces[s][hits[first][0]]] for s in lens.states}
    expected = {s: float(probs[s][words.index("heart")]) for s, words in carried.items() if "heart" in words}
    drawn = page.locator(".curve circle").evaluate_all("c => c.map(n => [+n.dataset.state, +n.dataset.share])")
    assert dict(drawn) == pytest.approx(expected, abs=0.005)
    page.locator("input[type=search]").fill("xylophone")
    assert "No patch has “xylophone” as its likeliest word at any state." in page.locator(".said").inner_text()
    assert not page.locator(".jump").is_visible()
    page.locator("input[type=search]").fill("")
    assert not page.locator(".curve").is_visible()
    page.locator("tbody td").first.click()
    assert page.locator("input[type=search]").input_value() == page.locator("tbody td bdi").first.inner_text()


def test_words_over_the_patches_follow_the_state(open_page, scene):
    """The words are text on a canvas: what is tested is which are asked to be drawn, and where."""
    inputs, lens, _ = scene
    page = screen(open_page, mv.view.patches(*scene), 1280)
    page.evaluate("""() => { window.drawn = []; const fill = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
            window.drawn.push([text, x / this.canvas.width, y / this.canvas.height, parseFloat(this.font.split(" ")[1])]);
            return fill.call(this, text, x, y); }; }""")
    for press, state in ((None, 3), ("ArrowRight", 4)):
        page.evaluate("window.drawn = []")
        page.keyboard.press(press) if press else page.locator(".overlay").click()
        drawn, grid = page.evaluate("window.drawn"), inputs.tokens.grids[0]
        assert len(drawn) == grid.rows * grid.cols
        size = {}
        for text, x, y, points in drawn:
            position = inputs.tokens.position(int(y * grid.rows), int(x * grid.cols))
            assert text == lens.pieces()[state][position][0].strip()
            share = float(lens.probs[lens.states.index(state), lens.position.tolist().index(position), 0])
            size.setdefault(text, []).append((share, points))
        for own in size.values():
            points = [points for _, points in sorted(own)]
            assert min(np.diff(points), default=0) > -0.05, "the likelier the larger"
    page.locator(".overlay").click()
    assert page.locator(".over").evaluate("c => c.width") == 1, "gone again"


def test_heads_are_kept_side_by_side_and_follow_the_word(open_page, results):
    page = screen(open_page, mv.view.patches(*results), 1280)
    alpha = """i => { const c = document.querySelectorAll(".kept figure")[i].querySelector("canvas");
        const { data } = c.getContext("2d").getImageData(0, 0, c.width, c.height);
        return Array.from({ length: c.width * c.height }, (_, n) => data[4 * n + 3]); }"""
    page.locator(".heads button").nth(2).click()
    page.locator(".keep").click()
    assert page.locator(".keep").is_disabled(), "once each"
    page.locator(".layers button").nth(9).click()
    page.locator(".heads button").nth(3).click()
    page.locator(".keep").click()
    captions = page.locator(".kept figcaption").all_inner_texts()
    assert [text.split("\n")[0] for text in captions] == ["layer 5, head 1", "layer 9, head 2"]
    shares = page.locator(".heads button").nth(3).get_attribute("aria-label")
    assert captions[1].split("\n")[1].split(" on")[0] == shares.split(": ")[1].split(" on")[0]
    before = page.evaluate(alpha, 0)
    page.locator(".written .chip").nth(1).click()
    assert page.evaluate(alpha, 0) != before
    page.locator(".kept .go").first.click()
    assert page.locator(".layer output b").inner_text() == "5"
    assert page.locator(".controls select").input_value() == "2"
    page.get_by_role("button", name="remove layer 5, head 1").click()
    assert page.locator(".kept figure").count() == 1


def test_small_maps_of_all_layers(open_page, results):
    inputs, _, norms = results
    page = screen(open_page, mv.view.patches(*results), 1280)
    drawn = page.locator(".layers button").evaluate_all(
        """buttons => buttons.map(b => Math.max(...[...b.querySelectorAll("canvas")].flatMap(c =>
        [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3))))"""
    )
    assert drawn == [255] * 11, "each to its own largest"
    cells = (
        page.locator(".layers button")
        .nth(10)
        .locator("canvas")
        .first.evaluate(
            """c => { const { data } = c.getContext("2d").getImageData(0, 0, c.width, c.height);
        const at = (r, i) => data[4 * (Math.floor(r / 2 * c.height) * c.width + Math.floor(i / 3 * c.width)) + 3];
        return [0.5, 1.5].map(r => [0.5, 1.5, 2.5].map(i => at(r, i))); }"""
        )
    )
    row = norms.norm[10, 0, norms.dest[0].tolist().index(20)]
    expected = row[inputs.tokens.images[0]] / row[inputs.tokens.image].max()
    assert np.array(cells).ravel() / 255 == pytest.approx(expected.numpy(), abs=0.02)


@pytest.mark.parametrize("heads", [32, 40])
def test_heads_are_picked_by_finger_on_a_phone(open_page, heads):
    """Each head has a button of its own, as large as WCAG asks, at 32 x 32 and 40 x 40."""
    inputs = large_inputs(answer="a redhead")
    page = screen(open_page, mv.view.patches(inputs, *synthetic(inputs, layers=heads, heads=heads, k=2)), 390)
    buttons = page.locator(".heads button")
    assert buttons.count() == heads + 1
    assert page.evaluate(SMALL) == []
    for head in (1, heads // 2, heads):
        buttons.nth(head).tap()
        assert page.locator(".controls select").input_value() == str(head)
        assert buttons.nth(head).get_attribute("aria-pressed") == "true"
    layers = page.locator(".layers button")
    assert layers.count() == heads
    layers.nth(heads - 1).tap()
    assert page.locator(".layer output b").inner_text() == str(heads - 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_two_views_have_one_cursor(open_page, scene, width, scheme):
    inputs, lens, norms = scene
    vlm = mv.load("tiny-llava")
    other = vlm.inputs(inputs.images[0][0], "Describe the scene.").answered("a brown square")
    second = mv.view.patches(other, *mv.read(vlm, other, mv.LogitLens(), mv.NormAttention(dst="writing")))
    page = open_page(
        mv.view.compare(mv.view.patches(inputs, lens, norms), second),
        viewport={"width": width, "height": 900}, color_scheme=scheme,
    )  # fmt: skip
    page.wait_for_selector(".patch-compare[data-ready]", timeout=60_000)
    sides = page.locator(".patch-view")
    assert page.locator("h1").all_inner_texts() == ["tiny-llava: two answers, side by side"]
    boxes = [sides.nth(i).bounding_box() for i in (0, 1)]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 760)
    assert [sides.nth(i).locator(".written .chip").all_inner_texts()[-1] for i in (0, 1)] == ["heart", "square"]
    stage = sides.nth(0).locator(".stage")
    box = stage.bounding_box()
    stage.hover(position={"x": box["width"] * 0.3, "y": box["height"] * 0.6})
    reads = [sides.nth(i).locator(".read").inner_text().split(":")[0] for i in (0, 1)]
    assert reads[0] == reads[1] == "row 4, column 2"
    stage.click(position={"x": box["width"] * 0.2, "y": box["height"] * 0.9})
    page.mouse.move(1, 1)
    notes = [sides.nth(i).locator(".panel-words h2 small").inner_text() for i in (0, 1)]
    assert notes[0] == notes[1]
    assert "patch r7 c1" in notes[0]
    page.keyboard.press("Shift+ArrowRight")  # without Shift, arrows move the patch on the image
    assert [sides.nth(i).locator(".layer output b").inner_text() for i in (0, 1)] == ["4", "4"]
    sides.nth(1).locator(".layers button").nth(6).click()
    assert [sides.nth(i).locator(".layer output b").inner_text() for i in (0, 1)] == ["6", "6"]
    sides.nth(1).locator('[data-measure="0"]').click()
    assert sides.nth(0).locator('[data-measure="0"]').get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [text for ratio, text in page.evaluate(CONTRAST) if ratio < 4.5] == []


def test_layers_of_unlike_models_move_by_depth(open_page, results, scene):
    """Of 11 layers and of 4: first with first, last with last, output with output."""
    inputs, lens, norms = results
    few = {name: getattr(norms, name)[:4] for name in ("norm", "weight", "value_norm")}
    small = replace(norms, layers=(0, 1, 2, 3), **few)
    short = replace(lens, states=lens.states[:2], ids=lens.ids[:2], probs=lens.probs[:2])
    whole, cut = mv.view.patches(inputs, lens, norms), mv.view.patches(inputs, short, small)
    with pytest.raises(ViewError, match=r"a shows 1 image\(s\) and b 2, and they are not the same"):
        mv.view.compare(mv.view.patches(*scene), whole)
    page = open_page(mv.view.compare(whole, cut))
    page.wait_for_selector(".patch-compare[data-ready]", timeout=60_000)
    left, right = (page.locator(".patch-view").nth(i).locator(".layer input") for i in (0, 1))
    for layer, expected in ((0, 0), (10, 3), (3, 1), (11, 4)):
        left.fill(str(layer))
        assert right.input_value() == str(expected), layer


def test_what_cannot_be_compared():
    inputs, lens, norms = uneven()
    page = mv.view.patches(inputs, lens, norms)
    with pytest.raises(ViewError, match=r"b is a View, not a view of patches: compare\(a, b\) takes two pages"):
        mv.view.compare(page, mv.view.topk(inputs, lens))


def test_several_images_lie_beside_each_other(open_page):
    inputs, lens, norms = uneven()
    page = screen(open_page, mv.view.patches(inputs, lens, norms), 1280)
    first, second = (page.locator(".stage").nth(i).bounding_box() for i in (0, 1))
    assert first["x"] + first["width"] <= second["x"]
    assert abs(first["y"] - second["y"]) < 1


def test_all_by_keyboard(open_page, results):
    """Tab reaches every control, and Enter picks a word, a layer, a head, and what is kept."""
    page = screen(open_page, mv.view.patches(*results), 1280)
    reached = set()
    for _ in range(90):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(FOCUSED))
    assert {
        "word",
        "token",
        "layers",
        "heads",
        "state",
        "stage",
        "map",
        "overlay",
        "keep",
        "search",
        "range",
    } <= reached
    page.locator(".layers button").nth(8).focus()
    page.keyboard.press("Enter")
    assert page.locator(".layer output b").inner_text() == "8"
    page.locator(".heads button").nth(1).focus()
    page.keyboard.press("Space")
    assert page.locator(".controls select").input_value() == "1"
    page.locator(".keep").focus()
    page.keyboard.press("Enter")
    assert page.locator(".kept figure").count() == 1
    page.locator("input[type=search]").focus()
    page.keyboard.type("w1")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".layer output b").inner_text() == "8", "in the field, arrows move its cursor"
