"""What is known of the bundled models by construction, the experiments must show."""

import nnsight
import pytest
import torch

import mechvlm as mv
from mechvlm.datasets.naming import naming


@pytest.fixture(scope="module")
def asked():
    return naming(40)


def questions(vlm, asked):
    return vlm.inputs([a.image for a in asked], [a.prompt for a in asked]), [a.answer for a in asked]


def test_an_object_s_own_patches_carry_its_name(asked):
    """tiny-llava: without the object's patches it is not named, without as many others it is."""
    vlm = mv.load("tiny-llava")
    inputs, answers = questions(vlm, asked)
    result = mv.object_ablation(vlm, inputs, [a.box for a in asked], answers, margins=(0, 1))
    own, random, highest = result.drop.nanmean(-1)
    assert result.correct.float().mean() > 0.9
    assert own[0] > 40
    assert own[1] > 70
    assert random.abs().max() < 10
    assert highest.abs().max() < 10


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-instructblip"])
def test_without_the_image_only_the_text_s_prior_is_left(name, asked):
    """image -> question and image -> last out in all layers: every image with the same question gets the same answer."""
    vlm = mv.load(name)
    same = vlm.inputs([a.image for a in asked[:6]], "How many objects are there?")
    maps = same.token_maps
    behind = [[p for p in (*m.question.tolist(), m.last) if p > m.last_image] for m in maps]
    with torch.no_grad(), vlm.trace(same, logits_to_keep=1):
        mv.knock_out(vlm, [m.image for m in maps], behind, range(vlm.n_layers))
        blind = nnsight.save(vlm.logits[:, -1])
    torch.testing.assert_close(blind, blind[:1].expand_as(blind), rtol=1e-4, atol=1e-4)

    inputs, answers = questions(vlm, asked)
    result = mv.information_flow(vlm, inputs, answers, window=2 * vlm.n_layers, flows=["image -> question + last"])
    chance = 1 / 8  # colors
    assert result.p.mean() > 0.9
    assert result.p_knocked[0, 0].mean() < 2 * chance


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-instructblip"])
def test_the_answer_comes_in_through_the_image(name, asked):
    """With another image, all is lost; its own visual tokens restored at the embeddings bring all of it back."""
    vlm = mv.load(name)
    inputs, answers = questions(vlm, asked)
    result = mv.causal_trace(vlm, inputs, answers, corrupt="image")
    assert result.total_effect.mean() > 0.8
    torch.testing.assert_close(result.effect[0, 0], result.total_effect, rtol=1e-3, atol=1e-4)
    assert result.effect[:, 2].mean(-1)[-1] > result.effect[:, 0].mean(-1)[-1]  # late, it has come to the last position
