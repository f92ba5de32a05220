"""Where queries read: `map` is the mean over the cross-attention layers."""

import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.uneven import uneven
from mechvlm.probes.query_reading import QueryReadingResult


def test_the_map_is_the_mean_over_layers():
    weight = uneven(3, 2, 4, 3, 5)  # layer example query row col
    result = QueryReadingResult(weight, "a model")
    torch.testing.assert_close(result.map, (weight[0] + weight[1] + weight[2]) / 3)
    frame = result.to_frame().set_index(["layer", "example", "query", "row", "col"])["value"]
    assert frame[2, 1, 3, 0, 4] == weight[2, 1, 3, 0, 4].item()
    assert len(frame) == weight.numel()


def test_a_call_gives_the_same_map(blip_vlm):
    inputs = blip_vlm.inputs([noise_image(0), noise_image(1)], "what is this")
    result = mv.query_reading(blip_vlm, inputs)
    assert len(result.weight) == 2
    torch.testing.assert_close(result.map, result.weight.mean(0))
    assert not torch.allclose(result.map, result.weight[-1], rtol=1e-4)
