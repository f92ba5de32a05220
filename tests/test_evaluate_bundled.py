"""The figures on the bundled models' cards: each helper on scenes with values worked by hand."""

import functools
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import mechvlm as mv
from mechvlm.datasets.scenes import Scene, SceneObject
from mechvlm.datasets.swaps import SwapPair

sys.path.insert(0, str(Path(mv.__file__).parents[1] / "scripts"))

import bundled_card
import evaluate_bundled as evaluate

pytestmark = pytest.mark.long

ROOT = Path(mv.__file__).parents[1]
HALF = 24 / 0.88
"""Half width of a square of 48 x 48 pixels: exactly four patches of 24 x 24, if it lies on them."""
RED, BLUE = SceneObject("red", "square", 48.0, 48.0, HALF), SceneObject("blue", "square", 144.0, 144.0, HALF)
STAR = SceneObject("green", "star", 96.0, 140.0, 30.0)
ONE, TWO = Scene((RED,), "sand"), Scene((STAR, BLUE), "night")
THREE = Scene((RED, SceneObject("blue", "heart", 150.0, 60.0, 30.0), STAR), "snow")
SCENES = [ONE, TWO, THREE]
IMAGES = [scene.render() for scene in SCENES]
RED_PATCHES, BLUE_PATCHES = (9, 10, 17, 18), (45, 46, 53, 54)


class Says:
    """A model that gives these answers: {(scene's number, text): answer}, and otherwise none."""

    def __init__(self, given: dict):
        self.given = given

    def answers(self, images, texts, n=32):
        numbers = [next(i for i, own in enumerate(IMAGES) if own is image) for image in images]
        return [self.given.get((i, text), "") for i, text in zip(numbers, texts, strict=True)]


def about(value: float, n: int) -> dict:
    return {"n": n, "value": pytest.approx(value, nan_ok=True)}


# --- joining ---


def test_means_leave_out_nan_and_count_the_rest():
    assert evaluate.mean([True, False, True, True]) == about(0.75, 4)
    assert evaluate.mean([1.0, math.nan, 4.0]) == about(2.5, 2)
    assert evaluate.mean([math.nan]) == evaluate.mean([]) == about(math.nan, 0)


def test_figures_of_several_seeds():
    """Mean and sample standard deviation: of 1, 2 and 6 they are 3 and sqrt((4 + 1 + 9) / 2)."""
    seeds = [{"a": {"b": [{"n": n, "value": v, "chance": c}]}} for n, v, c in ((10, 1, 0.2), (20, 2, 0.3), (3, 6, 0.4))]
    (joined,) = evaluate.over_seeds(seeds)["a"]["b"]
    assert joined == {"n": 33, "value": 3, "sd": pytest.approx(7**0.5), "chance": pytest.approx(0.3)}
    one = evaluate.over_seeds(seeds[:1])["a"]["b"][0]
    assert (one["value"], math.isnan(one["sd"])) == (1, True)
    seeds[1]["a"]["b"][0]["value"] = math.nan
    assert math.isnan(evaluate.over_seeds(seeds)["a"]["b"][0]["value"]), "two seeds do not pass for three"
    with pytest.raises(AssertionError):
        evaluate.over_seeds([{"a": about(1, 1)}, {"b": about(1, 1)}])


# --- what a model says ---


def test_captions_are_right_with_every_object_and_nothing_else():
    said = [
        "a red square on sand.",
        "a blue square and a green square on night.",
        "a red square and a green star on sand.",
    ]
    rates = evaluate.captions(Says({(i, evaluate.CAPTION): text for i, text in enumerate(said)}), SCENES, IMAGES)
    # Scene 2 is named with a wrong shape; of scene 3 an object and the ground are wrong.
    assert rates == {
        1: about(1, 1),
        2: about(0, 1),
        3: about(0, 1),
        "1 and 2": about(0.5, 2),
        "ground": about(2 / 3, 3),
    }
    said = [scene.listing() for scene in SCENES]
    rates = evaluate.captions(Says({(i, evaluate.CAPTION): text for i, text in enumerate(said)}), SCENES, IMAGES)
    assert [rate["value"] for rate in rates.values()] == [1] * 5


def test_names_in_captions():
    text = "there is a red circle, an orange heart and a red circle on night."
    assert evaluate.named(text) == {("red", "circle"): 2, ("orange", "heart"): 1}
    assert evaluate.named("a red square left of a blue star on sand.") == {("red", "square"): 1, ("blue", "star"): 1}
    assert evaluate.named("circle red on sand.") == {}


def test_questions_by_kind_with_the_chance_of_the_commonest_answer():
    posed = {(i, q.text): q.answer for i, s in enumerate(SCENES) for q in evaluate.one_of_each_kind(s)}
    rates = evaluate.questions(Says(posed), SCENES, IMAGES)
    assert {k: (rate["value"], rate["n"]) for k, rate in rates.items()} == {
        "color": (1, 3), "shape": (1, 3), "count": (1, 3), "exists": (1, 3), "where": (1, 2), "relation": (1, 2),
        "color, shape and count": (1, 9),
    }  # fmt: skip
    assert rates["count"]["chance"] == pytest.approx(1 / 3), "one, two and three are as common"
    more = evaluate.questions(Says(posed), [*SCENES, TWO], [*IMAGES, IMAGES[1]])
    assert more["count"]["chance"] == 1 / 2, "two is the commonest of four"
    # Wrong in the second scene's count alone, and silent about where things are.
    posed[1, "How many objects are there?"] = "three"
    mute = {key: answer for key, answer in posed.items() if not key[1].startswith("Where is") or " from " in key[1]}
    rates = evaluate.questions(Says(mute), SCENES, IMAGES)
    assert rates["count"] == about(2 / 3, 3) | {"chance": pytest.approx(1 / 3)}
    assert rates["color, shape and count"] == about(8 / 9, 9)
    assert (rates["where"]["value"], rates["relation"]["value"]) == (0, 1)
    nothing = evaluate.questions(Says({}), [], [])
    assert nothing["where"] == about(math.nan, 0) | {"chance": pytest.approx(math.nan, nan_ok=True)}


def test_swaps_tell_captions_from_images():
    """The first pair's text score alone is right; of the second, the image score."""
    pairs = [
        SwapPair("p", "attribute", (ONE, TWO), ("c0", "c1")),
        SwapPair("q", "attribute", (TWO, THREE), ("d0", "d1")),
    ]
    table = {
        ("c0", ONE): -1, ("c1", ONE): -2, ("c0", TWO): -4, ("c1", TWO): -3,
        ("d0", TWO): -1, ("d1", TWO): -4, ("d0", THREE): -2, ("d1", THREE): -3,
    }  # fmt: skip

    def scores(images, text, captions):
        assert text == "about"
        scene_of = {scene.render().tobytes(): scene for scene in SCENES}
        return [table[c, scene_of[i.tobytes()]] for i, c in zip(images, captions, strict=True)]

    def shares(pairs):
        return [
            evaluate.swaps(SimpleNamespace(scores=scores), pairs, "about")[k]["value"]
            for k in ("text", "image", "group")
        ]

    assert shares(pairs[:1]) == [1, 0, 0], "both captions are likelier of ONE"
    assert shares(pairs[1:]) == [0, 1, 0], "d0 is the likelier caption of both"
    assert shares(pairs) == [0.5, 0.5, 0]


@pytest.fixture(scope="module", params=mv.bundled.NAMES)
def model(request):
    return evaluate.Model(request.param, evaluate.BUNDLED / request.param)


def test_log_probabilities_are_those_of_a_loop_over_tokens(model):
    """Captions of three lengths, out of order; the model is asked for one next token at a time."""
    captions = ["a red square on sand.", "a blue star.", "a green star and a blue square on night."]
    tokenizer = model.processor.tokenizer
    for image, caption, score in zip(IMAGES, captions, model.scores(IMAGES, evaluate.CAPTION, captions), strict=True):
        batch, total = model.encode([image], [evaluate.prompt(model.name, evaluate.CAPTION)]), 0.0
        for token in [*tokenizer(caption, add_special_tokens=False).input_ids, tokenizer.eos_token_id]:
            with torch.no_grad():
                total += model.model(**batch).logits[0, -1].log_softmax(-1)[token].item()
            batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([[token]])], 1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        assert score == pytest.approx(total, abs=1e-3)


def test_answers_are_those_of_one_prompt_at_a_time(model):
    texts = ["What color is the square?", "How many objects are there?", evaluate.CAPTION]
    answers = model.answers(IMAGES, texts)
    assert answers[:2] == ["red", "two"]
    for image, text, answer in zip(IMAGES, texts, answers, strict=True):
        prompt = evaluate.prompt(model.name, text)
        alone = model.model.generate(**model.encode([image], [prompt]), max_new_tokens=32, do_sample=False)
        whole = model.processor.tokenizer.decode(alone[0], skip_special_tokens=True)
        assert whole.removeprefix(prompt.replace("<image>", "")).strip() == answer


# --- what the lens reads ---


def test_lens_figures_by_hand(monkeypatch):
    """28 scenes, so that the last ones stand in a second batch; state 1 decodes no word."""
    scenes = [Scene((RED,), "sand"), Scene((BLUE,), "snow")] * 14
    decoded = {"sand": [" red", " sand", " blue", " red"], "snow": [" square", " red", " of", "."]}

    def read(vlm, inputs, k):
        assert k == 1
        at = [[[[text] for text in decoded[scene.ground]], [["."], ["\n"]]] for scene in inputs]
        return SimpleNamespace(pieces=lambda j: {s: dict(enumerate(points)) for s, points in enumerate(at[j])})

    monkeypatch.setattr(evaluate.mv, "logit_lens", read)
    vlm = SimpleNamespace(n_layers=1, inputs=lambda images, text: images)
    figures = evaluate.lens(vlm, scenes, scenes)
    # sand: its captions say red, square, sand; red, sand, blue are decoded, red twice.
    # snow: its captions say blue, square, snow; square and red are decoded.
    assert figures["word"]["precision"] == [about((2 / 3 + 1 / 2) / 2, 28), about(math.nan, 0)]
    assert figures["word"]["recall"] == [about((2 / 3 + 1 / 3) / 2, 28), about(0, 28)]
    assert figures["token"]["precision"][0] == about((3 / 4 + 1 / 2) / 2, 28)
    assert figures["token"]["recall"][0] == about((2 / 3 + 1 / 3) / 2, 28), "each caption says each word once"
    assert figures["objects"][0] == about((1 / 2 + 1 / 2) / 2, 28), "without sand: of red and blue, red"
    assert figures["other"][0] == about((1 / 3 + 1) / 2, 28), "blue of three words, and both square and red"


# --- what a patch writes ---


@pytest.mark.parametrize("answering", [True, False])
def test_attention_by_hand(monkeypatch, answering):
    """Own patches write 4, the other object's 2 in layer 0 and 1 in layer 1, and the ground 0."""
    scenes = [Scene((RED, SceneObject("blue", "heart", 144.0, 144.0, HALF)), "sand"), ONE, Scene((RED, BLUE), "sand")]
    vlm, names = mv.load("tiny-llava"), []
    other = next(i for i, o in enumerate(scenes[0].objects) if o.shape == "heart")
    covered = vlm.inputs(IMAGES[0], "a").tokens.grids[0].covered(scenes[0].objects[other].box()).flatten() >= 0.5
    heart = covered.nonzero().flatten().tolist()
    assert 2 <= len(heart) <= 4

    def read(vlm, inputs, norms, lens):
        says = "blue" if "heart?" in inputs.prompts[0] else "red"
        names.append(says)
        alone = len(names) == (3 if answering else 2)
        norm = torch.zeros(8, 1, 1, len(inputs.tokens))
        norm[:, 0, 0, [inputs.tokens.image[i] for i in RED_PATCHES]] = 4.0 if says == "red" else 1.0
        if not alone:
            norm[:, 0, 0, [inputs.tokens.image[i] for i in heart]] = 2.0 if says == "red" else 4.0
        norm[1] *= 3  # a ratio does not see a factor

        def words(state, position):
            assert (state, position) == (8, -1)
            return pd.Series([1.0], index=[says])

        return SimpleNamespace(norm=norm), SimpleNamespace(words=words)

    monkeypatch.setattr(evaluate.mv, "read", read)
    figures = evaluate.attention(vlm, scenes, [s.render() for s in scenes], answering)
    n = len(heart)
    red = (4 * 64 / (16 + 2 * n), 2 * 64 / (16 + 2 * n))
    blue = (4 * 64 / (4 + 4 * n), 1 * 64 / (4 + 4 * n))
    alone = 64 / 4
    # The two squares of the third scene cannot be told apart by a question: it is left out.
    if answering:
        assert figures["ratio"] == [about((red[0] + blue[0] + alone) / 3, 3)] * 8
        assert figures["several"] == [about((red[0] + blue[0]) / 2, 2)] * 8
        assert figures["other"] == [about((red[1] + blue[1]) / 2, 2)] * 8
        image, name, patches = figures["example"]
        assert (image.size, name, patches.shape) == ((192, 192), "red square", (8, 64))
    else:
        assert figures == {
            "ratio": [about((red[0] + alone) / 2, 2)] * 8, "several": [about(red[0], 1)] * 8,
            "other": [about(red[1], 1)] * 8,
        }  # fmt: skip


# --- cards ---


def test_rows_of_a_card():
    figure = {"n": 500, "value": 0.97456, "sd": 0.0123, "chance": 0.25}
    assert bundled_card.row("x", figure) == "| x | 97.5 ± 1.2 % | 500 | 25.0 % |"
    assert bundled_card.row("x", figure, 1 / 6) == "| x | 97.5 ± 1.2 % | 500 | 16.7 % |"
    del figure["chance"]
    assert bundled_card.row("x", figure) == "| x | 97.5 ± 1.2 % | 500 | - |"
    assert bundled_card.plus_minus(figure) == "0.975 ± 0.012"
    assert bundled_card.plus_minus(figure | {"sd": math.nan}) == "0.975"
    assert bundled_card.row("x", {"n": 0, "value": math.nan, "sd": math.nan, "chance": math.nan}) == "| x | - | 0 | - |"


def test_a_card_from_a_tiny_run(tmp_path, monkeypatch, capsys):
    """The whole command, on three scenes and one pair of each of two seeds."""
    shutil.copytree(evaluate.BUNDLED / "tiny-llava", tmp_path / "tiny-llava")
    by_seed, measure = {}, evaluate.measure

    def watched(model, vlm, seed, *counts):
        by_seed[seed] = measure(model, vlm, seed, *counts)
        return by_seed[seed]

    monkeypatch.setattr(evaluate, "measure", watched)
    evaluate.main(["tiny-llava", "--folder", str(tmp_path), "--scenes", "3", "--pairs", "1", "--seeds", "5", "6"])
    card = (tmp_path / "tiny-llava" / "README.md").read_text(encoding="utf-8")
    assert card in capsys.readouterr().out
    assert "2 draws of 3 scenes and 1 pairs of each kind, by the seeds 5, 6." in card
    assert "nothing was chosen" not in card
    assert list(by_seed) == [5, 6]
    assert by_seed[5]["lens"] != by_seed[6]["lens"], "each seed draws its own scenes"

    def joined(*path):
        a, b = (functools.reduce(lambda part, key: part[key], path, by_seed[seed])["value"] for seed in (5, 6))
        return (a + b) / 2, abs(a - b) / 2**0.5

    recall, spread = joined("lens", "word", "recall", 3)
    assert re.search(rf"^\| 3 \| [^|]* \| {recall:.3f} ± {spread:.3f} \|", card, re.MULTILINE)
    count, spread = joined("questions", "count")
    assert f"| count | {100 * count:.1f} ± {100 * spread:.1f} % | 6 |" in card
    own, spread = joined("attention", "ratio", 0)
    assert re.search(rf"^\| 0 \| {own:.2f} ± {spread:.2f} \|", card.split("Norm-based")[1], re.MULTILINE)
    with pytest.raises(SystemExit):
        evaluate.main(["--seeds", "5", "5"])
    assert "a seed is given twice: 5 5" in capsys.readouterr().err


def test_the_page_of_bundled_models_says_what_the_cards_say():
    page = (ROOT / "docs" / "bundled.md").read_text(encoding="utf-8")
    table = re.search(r"\| \| `tiny-llava` \| `tiny-instructblip` \|\n\|[-|]*\n((?:\|.*\n)+)", page)[1]
    rows = {cells[1].strip(): cells[2:4] for line in table.splitlines() if (cells := line.split("|"))}
    assert len(rows) == 5
    for at, name in enumerate(("tiny-llava", "tiny-instructblip")):
        card = (ROOT / "mechvlm" / "bundled" / name / "README.md").read_text(encoding="utf-8")
        assert ", ".join(map(str, evaluate.SEEDS)) in card
        for label, of_card in {
            "captions of 1": "1 and 2 objects", "one-word": "color, shape and count",
            "attribute-swap": "attribute swap, group score", "relation-swap": "relation swap, group score",
        }.items():  # fmt: skip
            (cells,) = (cells for row, cells in rows.items() if row.startswith(label))
            assert f"| {of_card} | {cells[at].strip()} % |" in card
        (cells,) = (cells for row, cells in rows.items() if row.startswith("lens precision"))
        best = {"tiny-llava": 8, "tiny-instructblip": 3}[name]
        for state, figure in zip((0, best), cells[at].split(","), strict=True):
            precision = re.search(
                rf"^\| {state} \| ([\d.]+) ± ([\d.]+) \|", card.split("The logit lens")[1], re.MULTILINE
            )
            assert figure.strip() == " ± ".join(f"{100 * float(x):.1f}" for x in precision.groups())


def test_figures_that_are_kept_are_not_measured_again(tmp_path):
    figures = {"captions": {1: about(1, 3), "1 and 2": about(0.5, 4)}, "lens": [{"n": 2, "value": math.nan}]}
    plain = {"captions": {1: {"n": 3, "value": 1.0}, "1 and 2": {"n": 4, "value": 0.5}}, "lens": figures["lens"]}
    first = evaluate.measured_once(tmp_path / "kept" / "a.json", lambda: plain)
    again = evaluate.measured_once(tmp_path / "kept" / "a.json", lambda: pytest.fail("measured again"))
    for kept in (first, again):
        assert kept["captions"] == figures["captions"]
        assert math.isnan(kept["lens"][0]["value"])
    assert evaluate.measured_once(None, lambda: plain) is plain
