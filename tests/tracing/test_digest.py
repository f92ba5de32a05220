"""The digest that a job carries: of its model, of every byte of its inputs, and of its probes."""

from dataclasses import replace

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.tracing.reading import _question


@pytest.fixture(scope="module")
def inputs(llava_vlm):
    return llava_vlm.inputs([noise_image(0), noise_image(1)], "what is this")


def test_the_same_question_has_the_same_digest(llava_vlm, inputs):
    again = llava_vlm.inputs([noise_image(0), noise_image(1)], "what is this")
    assert _question(inputs, (mv.LogitLens(),)) == _question(again, (mv.LogitLens(),))


def changed(inputs, key, index, value):
    tensor = inputs.encoding[key].clone()
    tensor[index] = value
    return replace(inputs, encoding=inputs.encoding | {key: tensor})


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: changed(inputs, "pixel_values", (0, 0, 0, 0), 9.0),
        lambda inputs: changed(inputs, "pixel_values", (1, 2, 55, 55), 9.0),  # the last pixel
        lambda inputs: changed(inputs, "input_ids", (1, -1), 5),
        lambda inputs: changed(inputs, "attention_mask", (1, -1), 0),
        lambda inputs: replace(inputs, model="another"),
        lambda inputs: replace(inputs, encoding={k: v[:1] for k, v in inputs.encoding.items()}),
        lambda inputs: replace(
            inputs, encoding=inputs.encoding | {"attention_mask": inputs.encoding["attention_mask"].to(torch.int32)}
        ),
        # The same bytes in the same shape, but other numbers; and the same bytes in another shape.
        lambda inputs: replace(
            inputs, encoding=inputs.encoding | {"attention_mask": inputs.encoding["attention_mask"].view(torch.float64)}
        ),
        lambda inputs: replace(
            inputs, encoding=inputs.encoding | {"pixel_values": inputs.encoding["pixel_values"].reshape(1, 6, 56, 56)}
        ),
    ],
)
def test_other_inputs_have_another_digest(inputs, change):
    assert _question(change(inputs), (mv.LogitLens(),)) != _question(inputs, (mv.LogitLens(),))


def test_other_probes_have_another_digest(inputs):
    probes = [(mv.LogitLens(),), (mv.LogitLens(k=2),), (mv.NormAttention(),), (mv.LogitLens(), mv.NormAttention())]
    assert len({_question(inputs, several) for several in probes}) == 4


class Directed:
    """A probe of one's own, whose repr is its address."""

    def __init__(self, direction: torch.Tensor):
        self.direction = direction


def test_a_probe_is_known_by_what_it_holds_and_not_by_its_address(inputs):
    direction = torch.zeros(5000)  # long: its repr leaves out the middle
    other = direction.clone()
    other[2500] = 1
    probes = [Directed(direction), Directed(direction.clone()), Directed(other)]
    first, second, third = (_question(inputs, (probe,)) for probe in probes)
    assert first == second != third
