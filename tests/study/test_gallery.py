"""The report's gallery: the patch view of each example is a page that the report links to.

In a real browser, too.
"""

import json
import re
from html import unescape

import numpy as np
import pytest
from PIL import Image

import mechvlm as mv
from helpers.images import noise_image
from helpers.page_rules import CONTRAST, CUT, SCREENS, SMALL
from mechvlm.datasets import Dataset, Example, fingerprint
from mechvlm.study import run
from mechvlm.study.report import gallery

pytestmark = pytest.mark.long

SCRIPT = "<script>window.ran=1</script>"
IDS = [
    "../../etc/passwd",
    f"</title>{SCRIPT}",
    "a\u2028b \u202eright to left 👩‍👩‍👧 \"quotes\" 'and' <!--",
    "a/b",
    "a b",
]
PROMPT = f"what is {SCRIPT} </script> this"


@pytest.fixture(scope="module")
def study(llava_vlm, blip_vlm, tmp_path_factory):
    examples = [
        Example(name, noise_image(i, (90, 60)), (f"a dog </style> {SCRIPT} & <img src=x onerror='window.ran=1'>",))
        for i, name in enumerate(IDS)
    ]
    data = Dataset("made", tuple(examples), (), fingerprint(examples))
    return run([llava_vlm, blip_vlm], data, prompt=PROMPT, out=tmp_path_factory.mktemp("study") / "out")


@pytest.fixture
def views(study) -> list[dict]:
    return json.loads((study.out / "run.json").read_text())["views"]


def page_of(vlm, image) -> str:
    """The patch view of all text after the image, and of the answer, by the public functions."""
    (answer,) = vlm.generate(vlm.inputs(image, PROMPT))
    inputs = answer.inputs
    held = set(inputs.tokens.answer.tolist())
    text = [p for p in inputs.tokens.text.tolist() if p > inputs.tokens.image[0] and p not in held]
    text = sorted({*text, *inputs.tokens.writing.tolist(), int(inputs.tokens.prompt[-1])})
    reading = [] if inputs.tokens.patches else [mv.QueryReading()]
    return mv.view.patches(inputs, *mv.read(vlm, inputs, mv.LogitLens(), mv.NormAttention(dst=text), *reading)).html()


def test_each_card_leads_to_its_examples_views(study, views, llava_vlm, blip_vlm):
    names = [llava_vlm.name, blip_vlm.name]
    assert [(v["model"], v["example"]) for v in views] == [(name, i) for name in names for i in IDS]
    cards = (study.out / "report.html").read_text(encoding="utf-8").split('<div class="card">')[1:]
    for card, (example, _) in zip(cards, study.gallery, strict=True):
        assert unescape(card).count(example.id) == 3, "beside the picture, and in the name of each link"
        files = [v["file"] for v in views if v["example"] == example.id]
        assert re.findall(r'href="([^"]*)"', card) == [file for file in files for _ in range(2)], "picture and words"


def test_the_views_are_what_direct_calls_give(study, views, llava_vlm, blip_vlm):
    images = {example.id: example.image for example, _ in study.gallery}
    for view in (views[0], views[3], views[6]):
        vlm = llava_vlm if view["model"] == llava_vlm.name else blip_vlm
        assert (study.out / view["file"]).read_text(encoding="utf-8") == page_of(vlm, images[view["example"]])


def test_the_small_picture_shows_the_heat_where_it_is(llava_vlm):
    """On a wide image, whose middle the model sees: what is read most has the fullest frame.

    The patches' middles stay as they are, and the parts beside the middle are paler.
    """
    inputs = llava_vlm.inputs(Image.new("RGB", (300, 100), (128, 128, 128)), "what is this")
    view = gallery.read_view(llava_vlm, inputs)
    assert view.heat.size == (256, 85)
    assert (view.token, view.layer) == (inputs.tokens.strings[-1], 1)
    norms = mv.norm_attention(llava_vlm, inputs, dst="last").norm[1, 0, 0, inputs.tokens.image]
    colors = np.asarray(view.heat.convert("RGB")).astype(int)
    pixels = colors[..., 0]
    grid = inputs.tokens.grids[0]
    x, y = 256 / 300, 85 / 100
    boxes = grid.boxes().reshape(-1, 4).tolist()
    centers = [colors[round((b[1] + b[3]) / 2 * y), round((b[0] + b[2]) / 2 * x)] for b in boxes]
    assert (np.array(centers) == 128).all()
    cells = [[round(b[i] * (x, y)[i % 2]) for i in range(4)] for b in boxes]
    # Grey and the white line beside a frame have no color: what has is the frame.
    hues = np.abs(colors[..., 0] - colors[..., 2])
    frames = [hues[top:bottom, left:right].max() for left, top, right, bottom in cells]
    assert int(np.argmax(frames)) == int(norms.argmax())
    assert np.corrcoef(frames, norms)[0, 1] > 0.8
    left, _, right, _ = (round(edge * x) for edge in grid.crop_box)
    assert (pixels[:, : left - 1] == round(128 * 0.24 + 255 * 0.76)).all()
    assert (pixels[:, right + 1 :] == pixels[0, 0]).all()


def test_a_page_holds_the_answer_that_the_card_shows(study, views):
    answers = study.tables["answers"].set_index(["model", "example"])["answer"]
    assert any(answers)
    for view in views:
        page = (study.out / view["file"]).read_text(encoding="utf-8")
        data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])
        answer = answers[view["model"], view["example"]]
        assert "".join(word["text"] for word in data["answer"]).strip() == answer.strip()


def test_file_names_are_unique_for_any_ids():
    ids = ["../../etc/passwd", "a b", "a-b", "a/b\\c", "", "图像", "x" * 400, "<script>", "CON", ".", "..", "a\0b"]
    keys = [(model, example) for model in ("org/model", "org-model", "/home/..") for example in ids]
    names = gallery.file_names(keys)
    assert list(names) == keys
    assert len({name.lower() for name in names.values()}) == len(keys), "also on disks that ignore case"
    for name in names.values():
        assert re.fullmatch(r"views/\d\d[A-Za-z0-9-]*\.html", name)
        assert len(name) < 110


def test_without_a_folder_no_view_is_read(llava_vlm, study, monkeypatch):
    monkeypatch.setattr(gallery, "read_view", lambda *_: pytest.fail("a view was read"))
    examples = tuple(example for example, _ in study.gallery[:2])
    assert run([llava_vlm], Dataset("made", examples, (), fingerprint(examples)), prompt="what is this").views == {}


# --- in a real browser ---


@pytest.mark.browser
def test_the_report_opens_offline_and_its_links_open_views_that_draw(open_page, study, views):
    page = open_page(study.out / "report.html")
    assert page.locator("figure img").count() == 4
    broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 20)).length"
    assert page.evaluate(broken) == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    links = page.locator("a.open")
    names = links.all_inner_texts()
    assert len(set(names)) == len(names) == len(views), "each says what it opens"
    assert all(name.startswith("Patch view of ") and PROMPT in name for name in names)
    for number in range(links.count()):
        links.nth(number).click()
        page.wait_for_selector(".patch-view[data-ready]", timeout=20_000)
        n_colors = "n => { const c = document.querySelector('.stage canvas'), d = c.getContext('2d');"
        n_colors += " return new Set(d.getImageData(0, 0, c.width, c.height).data).size; }"
        assert page.evaluate(n_colors) > 10
        assert page.evaluate("window.ran") is None
        assert PROMPT in page.title()
        page.go_back()
        assert page.evaluate("window.ran") is None


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_the_report_is_read_on_every_screen(open_page, study, width, scheme):
    phone = {"has_touch": True, "is_mobile": True} if width < 500 else {}
    page = open_page(study.out / "report.html", viewport={"width": width, "height": 900}, color_scheme=scheme, **phone)
    assert [text for ratio, text in page.evaluate(CONTRAST) if ratio < 4.5] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page does not scroll sideways"
    assert page.locator("main").count() == page.locator("h1").count() == 1
    assert page.evaluate(SMALL.replace("button, input", "nav a, .files a, .open, button, input")) == []
    assert page.evaluate(CUT, "h1, h2, p, li, dd, figcaption, .card") == [], "no word is cut"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 28)")
    for figure in page.locator("figure").all():
        # Type of 9 points is 9 pixels high or more, and what is wider than the window scrolls.
        natural, drawn, room = figure.evaluate(
            """f => { const i = f.querySelector("img");
            return [i.naturalWidth, i.clientWidth, f.querySelector(".scroll").clientWidth]; }"""
        )
        assert drawn >= natural * 0.74
        assert drawn <= room or width < 500, "on a screen the whole of it is seen"
    for at, link in enumerate(page.locator("nav a").all()):
        link.click()
        tops = page.locator("h2").evaluate_all("all => all.map(h => h.getBoundingClientRect().top)")
        at_the_end = page.evaluate("scrollY + innerHeight >= document.documentElement.scrollHeight - 2")
        assert abs(tops[at]) < 5 or at_the_end
    if width == 1280:
        page.locator("figure a").first.click()
        assert page.url.endswith("figures/phases.png")
    files = page.locator(".files a").evaluate_all("all => all.map(a => a.getAttribute('href'))") if width > 1280 else []
    assert all((study.out / file).stat().st_size > 3_000 for file in files)


@pytest.mark.browser
def test_the_picture_of_a_card_opens_its_view_too(open_page, study, views):
    page = open_page(study.out / "report.html")
    page.locator(".card").nth(1).locator("a img").nth(1).click()
    page.wait_for_selector(".patch-view[data-ready]", timeout=20_000)
    assert page.url.endswith(views[len(IDS) + 1]["file"]), "the second example's view, of the second model"


@pytest.mark.browser
def test_hostile_names_are_text(open_page, study):
    page = open_page(study.out / "report.html")
    for card, (example, _) in zip(page.locator(".card").all(), study.gallery, strict=True):
        text = card.evaluate("node => node.textContent")
        assert example.id in text
        assert example.captions[0] in text
    assert PROMPT in page.locator("main").evaluate("node => node.textContent")
    assert page.locator("script").count() == 0
    assert page.evaluate("window.ran") is None


@pytest.mark.browser
def test_the_commands_page_opens_and_draws(open_page, tmp_path):
    from mechvlm import cli

    noise_image(3).save(tmp_path / "a.png")
    for model in ("tiny-llava", "tiny-instructblip"):
        out = tmp_path / f"{model}.html"
        assert cli.main(["view", model, str(tmp_path / "a.png"), "--prompt", PROMPT, "--out", str(out)]) == 0
        page = open_page(out)
        page.wait_for_selector(".patch-view[data-ready]", timeout=20_000)
        assert page.locator("tbody tr").count() == 9, "a row for each state"
        page.locator("button.chip").last.click()
        assert page.evaluate("window.ran") is None
