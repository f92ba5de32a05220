"""Phases on a real decoder: what is no image shows none, and phases on top of its own curve do.

The lane `-m smollm2` runs it: it needs the extra and the package that carries the decoder.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers.forwards import first_states, naive_curve
from mechvlm.datasets.scenes import sample_scenes
from mechvlm.experiments.contextualization_controls import control_curves, control_tokens
from mechvlm.inputs.tokens import image_mask

pytestmark = pytest.mark.smollm2

SCENES = list(sample_scenes(12, 2001, "test", (1, 2)))
PROMPT = "Describe the scene."
OTHER_TEXT = (
    "Bread is made from flour, water, salt and yeast. The dough rests until it has doubled, which takes an hour in a warm "
    "kitchen and a whole night in a cold one. Bakers fold it twice, shape it into loaves and cut the top, so that steam can "
    "leave while the crust turns brown. A good loaf sounds hollow when you knock on its bottom."
)
"""Plain English that is no part of the control's."""


@pytest.fixture(scope="module")
def vlm():
    return mv.load("smol-llava")


@pytest.fixture(scope="module")
def inputs(vlm):
    return vlm.inputs([scene.render() for scene in SCENES], PROMPT)


@pytest.fixture(scope="module")
def controls(vlm, inputs):
    return mv.contextualization_controls(vlm, inputs)


@pytest.fixture(scope="module")
def others(vlm, inputs):
    """Curves of other noise, other words and other text, by kind."""
    kinds = ("noise", "words", "text")
    curves = control_curves(vlm, inputs, control_tokens(vlm, kinds, OTHER_TEXT), seed=1)
    return dict(zip(kinds, (curve.inter for curve in curves), strict=True))


@pytest.fixture(scope="module")
def shuffled(vlm, inputs, controls):
    """The curve of the images with their visual tokens in another order."""
    states, generator = first_states(vlm, inputs).clone(), torch.Generator().manual_seed(0)
    assert naive_curve(vlm, inputs, states) == pytest.approx(controls.inter, abs=1e-4)
    for row, positions in enumerate(image_mask(inputs.token_maps)):
        own = positions.nonzero()[:, 0]
        states[row, own] = states[row, own[torch.randperm(len(own), generator=generator)]]
    return naive_curve(vlm, inputs, states)


@pytest.mark.parametrize("kind", ["noise", "words", "text"])
def test_what_is_no_image_shows_no_phases(controls, others, kind):
    """Its own curve turns, and may turn as the paper's: other draws of its kind do the same."""
    result = replace(controls, inter=others[kind])
    assert result.phases.n_segments > 0
    assert not result.shows_pattern
    assert not any(result.exceeding), result.verdict
    assert result.verdict.startswith("The curve is the decoder's own")


def test_a_shuffled_image_shows_no_phases(controls, shuffled):
    """Held to the controls; and held to it, the image in its own order shows none either."""
    assert (shuffled - controls.inter).abs().max() > 0.01, "the decoder does see the order"
    result = replace(controls, inter=shuffled)
    assert not result.shows_pattern
    assert not any(result.exceeding), result.verdict
    assert not replace(controls, controls=shuffled[None], kinds=("noise",)).shows_pattern


def test_another_scenes_caption_shows_no_phases(vlm, controls):
    """Images with their own captions, beside the same images with those of other scenes."""
    images, captions = [scene.render() for scene in SCENES], [scene.captions()[0] for scene in SCENES]
    own, other = (
        mv.contextualization(vlm, vlm.inputs(images, texts)).inter for texts in (captions, captions[1:] + captions[:1])
    )
    assert not replace(controls, inter=other).shows_pattern
    beside = replace(controls, inter=own, controls=other[None], kinds=("noise",))
    assert not beside.shows_pattern
    assert not any(beside.exceeding), beside.verdict


def test_phases_on_top_of_the_decoders_own_curve_are_found(controls, others):
    """Of 0.8 of its range, up, down, up and down, added to the curve of other noise."""
    curve = others["noise"]
    size = 0.8 * float(curve.mean(1).max() - curve.mean(1).min())
    added = size * np.interp(np.arange(31), [0, 4, 13, 26, 30], [0, 1, -1, 1, -1])
    result = replace(controls, inter=curve + torch.from_numpy(added).float()[:, None])
    assert result.shows_pattern, result.verdict
    assert not replace(controls, inter=curve).shows_pattern
