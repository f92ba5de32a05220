"""The models whose decoder is SmolLM2: as they are read, as their cards say, what moves answers.

The lane `-m smollm2` runs it: it needs the extra and the package that carries the decoder.
"""

import math
import re
import sys
from pathlib import Path

import pytest

import mechvlm as mv
from helpers.forwards import forward
from mechvlm import bundled
from mechvlm.datasets.scenes import sample_scenes
from mechvlm.datasets.swaps import attribute_swaps

sys.path.insert(0, str(Path(mv.__file__).parents[1] / "scripts"))

import evaluate_bundled
import evaluate_smol

pytestmark = pytest.mark.smollm2

ONE_MORE_SEED = 2001
SCENES = list(sample_scenes(60, ONE_MORE_SEED, "test", (1, 2)))


@pytest.fixture(scope="module", params=bundled.WITH_SMOLLM2)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def vlm(name):
    return mv.load(name)


@pytest.fixture(scope="module")
def reader(name):
    return evaluate_smol.Reader(name, bundled.path(name))


# -- the card --------------------------------------------------------------------------------------


def _on_card(name: str, label: str) -> tuple[float, float]:
    """Mean and standard deviation between seeds of a figure on the card, as shares."""
    card = (bundled.shipped(name) / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {label} \| ([\d.]+) ± ([\d.]+) % \|", card, re.MULTILINE)
    return float(row[0]) / 100, float(row[1]) / 100


def _fits(name: str, label: str, figure: dict) -> bool:
    """Whether one more seed's figure is within three standard errors of the card's mean."""
    mean, sd = _on_card(name, label)
    share = min(max(mean, 1 / figure["n"]), 1 - 1 / figure["n"])
    spread = math.sqrt(sd**2 + share * (1 - share) / figure["n"])
    return abs(figure["value"] - mean) <= 3 * spread


def test_one_more_seed_says_what_the_card_says(reader):
    images = [scene.render() for scene in SCENES]
    captions = evaluate_bundled.captions(reader, SCENES, images)
    answers = evaluate_bundled.questions(reader, SCENES, images)
    swaps = evaluate_bundled.swaps(reader, attribute_swaps(20, ONE_MORE_SEED), "Describe the scene.")
    figures = {
        "1 and 2 objects": captions["1 and 2"],
        "color, shape and count": answers["color, shape and count"],
        "attribute swap, group score": swaps["group"],
    }
    assert {label: figure for label, figure in figures.items() if not _fits(reader.name, label, figure)} == {}


def test_what_is_packed_is_what_one_prompt_gives(vlm, reader):
    """The card's figures come from packed rows: the answers are those of `vlm.generate`."""
    scenes, text = SCENES[:4], "Describe the scene."
    images = [scene.render() for scene in scenes]
    said = reader.answers(images, [text] * 4, 24)
    assert [str(answer).strip() for answer in vlm.generate(vlm.inputs(images, text), 24)] == said


# -- what moves its answers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colors(vlm):
    """Scenes of one object, asked for its color."""
    scenes = list(sample_scenes(6, ONE_MORE_SEED, "test", (1,)))
    prompts = [f"What color is the {scene.objects[0].shape}?" for scene in scenes]
    inputs = vlm.inputs([scene.render() for scene in scenes], prompts)
    return scenes, inputs, [scene.objects[0].color for scene in scenes]


def test_the_image_reaches_the_question_early_and_the_last_position_late(vlm, colors):
    _, inputs, answers = colors
    flow = mv.information_flow(vlm, inputs, answers, window=5, flows=["image -> question", "image -> last"])
    assert flow.p.mean() > 0.8
    to_question, to_last = flow.change.mean(-1)
    # A window of the first three layers may hold the sink, where the image stands first (below).
    early, late = slice(3, vlm.n_layers // 3), slice(vlm.n_layers // 2, None)
    assert to_question[early].min() < -30
    assert to_question[early].min() < to_question[late].min() - 20
    assert to_last[late].min() < -30
    assert to_last[late].min() < to_last[early].min() - 20


def test_where_the_image_stands_first_the_first_layers_rest_on_it(vlm, colors):
    """The last position of smol-instructblip needs some query there; the first one is enough.

    With all of them closed the answer is lost. smol-llava has its template's opening for that.
    """
    _, inputs, _ = colors
    for i in range(3):
        own = inputs[i : i + 1]
        image, last = own.token_maps[0].image.tolist(), own.token_maps[0].last

        def logits(closed=(), own=own, last=last):
            return forward(vlm, own, lambda: closed and mv.knock_out(vlm, src=closed, dst=last, layers=range(3)))[0, -1]

        answer = int(logits().argmax())
        kept, lost = (logits(closed).softmax(-1)[answer] for closed in (image[1:], image))
        assert kept > 0.8
        assert lost > 0.8 if image[0] else lost < 0.2


def test_what_carries_an_object(vlm, colors):
    """Its own patches, against random ones.

    Of queries, which have no place, those of the highest norm: not those that read most of it.
    """
    scenes, inputs, answers = colors
    ablation = mv.object_ablation(vlm, inputs, [s.objects[0].box() for s in scenes], answers, margins=(1,), draws=3)
    assert ablation.correct.float().mean() > 0.8
    carrier = "own" if vlm.name == "smol-llava" else "highest norm"
    without, random = (ablation.p_ablated[ablation.conditions.index(name), 0].mean() for name in (carrier, "random"))
    assert without < 0.5
    assert random > without + 0.3
