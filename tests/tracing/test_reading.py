"""read(): the precision in which probes measure, and what it refuses."""

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image


class Products:
    """A user's own probe, which measures in float32."""

    def prepare(self, vlm, inputs):
        return None

    def at_state(self, plan, state):
        return {"gram": state.resid.float() @ state.resid.float().transpose(-1, -2)}

    def result(self, plan, rows, vlm, inputs):
        return rows[0]["gram"]


def test_probes_measure_in_the_precision_they_ask_for(llava_vlm):
    """The forward's autocast does not reach them: a server has one for half precision."""
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gram,) = mv.read(llava_vlm, inputs, Products())
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert gram.dtype == torch.float32


class Idle:
    """A probe without a method that reads."""

    def prepare(self, vlm, inputs):
        return None

    def result(self, plan, rows, vlm, inputs):
        return None


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ((mv.LogitLens,), r"probes, not their classes \['LogitLens'\]: write LogitLens\(\)"),
        (([mv.LogitLens()],), r"takes probes one by one.*got \['list'\]"),
        ((Idle(),), r"read nothing: \['Idle'\]. Give each one or more of the methods at_queries, at_state"),
        ((), "was given no probe"),
    ],
)
def test_what_is_no_probe(llava_vlm, probes, message):
    with pytest.raises(ValueError, match=message):
        mv.read(llava_vlm, llava_vlm.inputs(noise_image(0), "what is this"), *probes)


def test_one_state_by_its_number(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    one, several = mv.logit_lens(llava_vlm, inputs, states=2), mv.logit_lens(llava_vlm, inputs, states=[2])
    assert one.states == several.states == (2,)
    assert torch.equal(one.ids, several.ids)
    with pytest.raises(ValueError, match=r"states \[9\] were asked for"):
        mv.logit_lens(llava_vlm, inputs, states=9)


def test_neurons_need_gradients(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    with torch.inference_mode(), pytest.raises(mv.InputError, match=r"outside of torch\.inference_mode"):
        mv.multimodal_neurons(llava_vlm, inputs)
