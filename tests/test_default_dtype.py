"""torch.set_default_dtype(torch.bfloat16), which scripts set to load models, rounds no result."""

import dataclasses

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.datasets.winoground import Pair
from mechvlm.view.pooling import token_groups

BOX = (120, 60, 380, 290)


@pytest.fixture(scope="module")
def inputs(llava_vlm):
    return llava_vlm.inputs([noise_image(i, (640, 480)) for i in range(2)], ["what is this", "a"])


READ = {
    "inputs": lambda vlm, inputs: vlm.inputs(noise_image(0, (640, 480)), "a").encoding,
    "boxes": lambda vlm, inputs: inputs.token_maps[0].grids[0].boxes(),
    "covered": lambda vlm, inputs: inputs.token_maps[0].grids[0].covered(BOX),
    "pooling": lambda vlm, inputs: token_groups(inputs.token_maps[0], 2)[1],
    "logit lens": mv.logit_lens,
    "contextualization": mv.contextualization,
    "norm attention": mv.norm_attention,
    "logit attribution": lambda vlm, inputs: mv.logit_attribution(vlm, inputs, "red", versus="blue"),
    "neurons": lambda vlm, inputs: mv.multimodal_neurons(vlm, inputs, "red", k=1),
    "information flow": lambda vlm, inputs: mv.information_flow(vlm, inputs, "red", window=1, flows=["image -> last"]),
    "causal trace": lambda vlm, inputs: mv.causal_trace(vlm, inputs, "red", groups=["image"]),
    "object ablation": lambda vlm, inputs: mv.object_ablation(vlm, inputs, [BOX] * 2, "red", margins=(0,), draws=1),
    "head ablation": lambda vlm, inputs: mv.head_ablation(vlm, inputs, "red", "mean", sets={"a": [(0, 1)]}, draws=2),
    "patch grid": lambda vlm, inputs: mv.patch_grid(
        vlm, inputs[0], vlm.inputs(noise_image(7, (640, 480)), "what is this"), 7, 9, positions=["image", "last"]
    ),
    "winoground": lambda vlm, inputs: mv.winoground(
        vlm, [Pair("one", (noise_image(0), noise_image(1)), ("a red cat", "a cat red"))]
    ),
}


def tensors(result):
    if isinstance(result, torch.Tensor):
        return {"": result}
    values = result if isinstance(result, dict) else vars(result)
    assert dataclasses.is_dataclass(result) or isinstance(result, dict)
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", list(READ))
def test_the_default_dtype_changes_nothing(llava_vlm, inputs, name):
    expected = tensors(READ[name](llava_vlm, inputs))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = tensors(READ[name](llava_vlm, inputs))
    finally:
        torch.set_default_dtype(before)
    assert expected
    for field, value in expected.items():
        assert got[field].dtype == value.dtype, field
        torch.testing.assert_close(got[field], value, rtol=1e-5, atol=1e-6, equal_nan=True, msg=field)
