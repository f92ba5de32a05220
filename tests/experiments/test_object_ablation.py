"""Object ablation: the tokens that it takes, and those of its controls."""

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import instructblip
from mechvlm.experiments import object_ablation as experiment


@pytest.fixture
def ablated(monkeypatch):
    """The positions of every ablated row, in the order of the conditions.

    They count from the first visual token.
    """
    positions = []
    original = experiment.ablate

    def ablate(vlm, pos, *args, **options):
        positions.extend(pos)
        original(vlm, pos, *args, **options)

    monkeypatch.setattr(experiment, "ablate", ablate)
    return positions


def test_the_controls_are_as_many_tokens_from_outside_of_the_object(llava_vlm, ablated):
    inputs = llava_vlm.inputs([noise_image(0, (56, 56))] * 2, "what is this")
    box = (14, 14, 42, 28)  # two of 4 x 4 patches
    result = mv.object_ablation(llava_vlm, inputs, [box, box], "this", margins=(0,), draws=8)
    own, drawn, highest = ablated[0], ablated[1:9], ablated[9]
    assert own == [5, 6]
    assert result.n_tokens.tolist() == [[2, 2]]
    for pos in (*drawn, highest):
        assert len(set(pos)) == 2
        assert set(pos).isdisjoint(own)
    assert len({frozenset(pos) for pos in drawn}) > 4
    assert ablated[10] == own
    assert ablated[11:19] != drawn  # every example draws its own


def test_half_of_the_image_is_compared_with_the_other_half(llava_vlm, ablated):
    inputs = llava_vlm.inputs(noise_image(0, (56, 56)), "what is this")
    result = mv.object_ablation(llava_vlm, inputs, [(0, 0, 56, 28)], "this", margins=(0,), draws=1)
    own, drawn, highest = (sorted(pos) for pos in ablated)
    assert own == list(range(8))
    assert drawn == highest == list(range(8, 16))
    assert not result.p_ablated.isnan().any()


def test_an_object_has_the_quarter_of_the_queries_that_read_most_of_it(ablated):
    vlm = mv.load(*instructblip(queries=8))
    inputs = vlm.inputs(noise_image(0, (56, 56)), "what is this")
    mv.object_ablation(vlm, inputs, [(14, 14, 42, 28)], "this", margins=(0, 1), draws=1)
    reading = mv.query_reading(vlm, inputs).map[0]
    assert sorted(ablated[0]) == sorted(reading[:, 1, 1:3].sum(-1).argsort()[-2:].tolist())
    with_margin = ablated[3]
    assert sorted(with_margin) == sorted(reading[:, 0:3, 0:4].sum((1, 2)).argsort()[-2:].tolist())


def test_the_mean_token_is_that_of_all_batches(llava_vlm):
    images, boxes = [noise_image(i, (56, 56)) for i in range(3)], [(0, 0, 56, 14)] * 3
    want = mv.object_ablation(llava_vlm, llava_vlm.inputs(images, "what is this"), boxes, "this")
    batches = [llava_vlm.inputs(group, "what is this") for group in (images[:2], images[2:])]
    torch.testing.assert_close(
        mv.object_ablation(llava_vlm, batches, boxes, "this").p_ablated,
        want.p_ablated,
        rtol=1e-4,
        atol=0,
        equal_nan=True,
    )


def test_accuracy_is_the_mean_over_draws(llava_vlm, monkeypatch):
    """By hand: two of four draws still name the object, and its own ablation does not."""

    def sweep(vlm, base, edits, change):
        right = torch.zeros(llava_vlm.d_vocab).index_fill(0, torch.tensor(7), 1.0)
        return {edit.key: right if edit.key in {(1, 0, 0), (1, 0, 3)} else -right for edit in edits}

    monkeypatch.setattr(experiment, "sweep", sweep)
    inputs = llava_vlm.inputs(noise_image(0, (56, 56)), "what is this")
    result = mv.object_ablation(llava_vlm, inputs, [(0, 0, 28, 14)], 7, margins=(0,), draws=4)
    assert result.correct_ablated.flatten().tolist() == [0, 0.5, 0]
    one_hot = torch.zeros(llava_vlm.d_vocab).index_fill(0, torch.tensor(7), 1.0)
    low, high = ((sign * one_hot).softmax(-1)[7] for sign in (-1, 1))
    torch.testing.assert_close(result.p_ablated.flatten(), torch.stack([low, (low + high) / 2, low]))
