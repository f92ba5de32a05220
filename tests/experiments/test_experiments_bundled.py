"""Experiments on the bundled models show what is known of them by construction."""

import nnsight
import pytest
import torch

import mechvlm as mv
from mechvlm.datasets.naming import naming

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def questions():
    return naming(40)


def inputs_of(vlm, questions):
    return vlm.inputs([q.image for q in questions], [q.prompt for q in questions]), [q.answer for q in questions]


def test_an_objects_own_patches_carry_its_name(questions):
    """tiny-llava names no object without its patches, but does without as many others."""
    vlm = mv.load("tiny-llava")
    inputs, answers = inputs_of(vlm, questions)
    result = mv.object_ablation(vlm, inputs, [q.box for q in questions], answers, margins=(0, 1))
    own, random, highest = result.drop.nanmean(-1)
    assert result.correct.float().mean() > 0.9
    assert own[0] > 40
    assert own[1] > 70
    assert random.abs().max() < 10
    assert highest.abs().max() < 10


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-instructblip"])
def test_without_the_image_only_the_texts_prior_is_left(name, questions):
    """With image -> question and image -> last out in all layers, the image changes no answer."""
    vlm = mv.load(name)
    same_question = vlm.inputs([q.image for q in questions[:6]], "How many objects are there?")
    maps = same_question.token_maps
    after_image = [[p for p in (*m.question.tolist(), m.last) if p > m.last_image] for m in maps]
    with torch.no_grad(), vlm.trace(same_question, logits_to_keep=1):
        mv.knock_out(vlm, [m.image for m in maps], after_image, range(vlm.n_layers))
        blind = nnsight.save(vlm.logits[:, -1])
    torch.testing.assert_close(blind, blind[:1].expand_as(blind), rtol=1e-4, atol=1e-4)

    inputs, answers = inputs_of(vlm, questions)
    result = mv.information_flow(vlm, inputs, answers, window=2 * vlm.n_layers, flows=["image -> question + last"])
    chance = 1 / 8  # colors
    assert result.p.mean() > 0.9
    assert result.p_knocked[0, 0].mean() < 2 * chance


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-instructblip"])
def test_the_answer_comes_in_through_the_image(name, questions):
    """Another image loses the answer; the own visual tokens at the embeddings bring it back."""
    vlm = mv.load(name)
    inputs, answers = inputs_of(vlm, questions)
    result = mv.causal_trace(vlm, inputs, answers, corrupt="image")
    assert result.total_effect.mean() > 0.95
    torch.testing.assert_close(result.effect[0, 0], result.total_effect, rtol=1e-3, atol=1e-4)
    # In late layers the answer has come to the last position.
    assert result.effect[:, 2].mean(-1)[-1] > result.effect[:, 0].mean(-1)[-1]


def test_another_image_has_another_answer_than_the_models_own(questions):
    """Without given answers, those of the model decide which image is another one."""
    vlm = mv.load("tiny-llava")
    inputs, _ = inputs_of(vlm, questions[:8])
    own = vlm.next_tokens(inputs)
    assert len(own.unique()) < 8, "two examples have the same answer"
    result, given = (mv.causal_trace(vlm, inputs, a, corrupt="image", groups=["last"]) for a in (None, own))
    assert torch.equal(result.p_restored, given.p_restored)
    assert result.p_corrupt.max() < 0.5
