"""read(): the precision in which probes measure."""

import torch

import mechvlm as mv
from helpers.images import noise_image


class Products:
    """A user's own probe, which measures in float32."""

    reads = frozenset({"states"})

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
