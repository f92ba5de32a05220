"""Localization heads: the two criteria on real rows, and the ranking on planted numbers."""

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.measures.heads import elbow, spatial_entropy
from mechvlm.probes.localization import LocalizationHeadsResult


def test_criteria_are_those_of_the_attention_rows(llava_vlm):
    vlm = llava_vlm
    inputs = vlm.inputs([noise_image(0), noise_image(1)], ["what is this", "a"])
    (result, norms) = mv.read(vlm, inputs, mv.LocalizationHeads(), mv.NormAttention("last_text"))
    for row, tokens in enumerate(inputs.token_maps):
        maps = norms.weight[:, row, :, 0][..., tokens.views[0][0].positions]  # [layer head row col]
        assert torch.allclose(result.image[:, row], maps.sum((-2, -1)), atol=1e-5)
        assert torch.allclose(result.entropy[:, row], spatial_entropy(maps), atol=1e-5)
    (parts,) = mv.read(
        vlm, vlm.inputs([noise_image(0), noise_image(1)], ["what is this", "a"], batch_size=1), mv.LocalizationHeads()
    )
    assert torch.allclose(parts.image, result.image, atol=1e-5)
    frame = result.to_frame()
    assert len(frame) == result.image.numel()
    assert frame["entropy"].iloc[-1] == pytest.approx(float(result.entropy[-1, -1, -1]))


def planted():
    """4 layers, 6 examples, 5 heads: heads (2, 1) and (3, 4) look at the image and at one place."""
    generator = torch.Generator().manual_seed(0)
    image = 0.01 + 0.01 * torch.rand(4, 6, 5, generator=generator)
    entropy = 1 + torch.rand(4, 6, 5, generator=generator)
    image[0] = 0.9  # a layer that is skipped
    entropy[0] = 0
    for layer, head in ((2, 1), (2, 3), (3, 4)):
        image[layer, :, head] = 0.6
    entropy[2, :, 1] = 0.1
    entropy[3, :4, 4], entropy[3, 4:, 4] = 0.2, 3.0
    entropy[2, :4, 3], entropy[2, 4:, 3] = 3.0, 0.2
    return LocalizationHeadsResult(image, entropy, "last_text", "m")


def test_heads_are_ranked_by_how_often_they_are_selected():
    result = planted()
    assert result.tau() == pytest.approx(elbow(result.image[2:].mean(1).flatten()))
    assert 0.01 < result.tau() <= 0.02
    table = result.heads(top=3, per_example=2)
    assert table[["layer", "head"]].to_numpy().tolist() == [[2, 1], [3, 4], [2, 3]]
    assert table["frequency"].tolist() == pytest.approx([1, 4 / 6, 2 / 6])
    assert result.selected(2).sum((1, 2)).tolist() == [2] * 6
    assert not result.selected(2)[:, :2].any(), "the first layers are left out"
    assert result.selected(1, skip_layers=0)[:, 0, 0].tolist() == [1] * 6, "of equal heads the first layer and head"


def test_ties_go_to_the_head_that_looks_more_at_the_image():
    image = torch.full((1, 1, 4), 0.5)
    image[0, 0, 2] = 0.6
    result = LocalizationHeadsResult(image, torch.zeros(1, 1, 4), "last", "m")
    order = [result.selected(n, skip_layers=0)[0, 0].nonzero()[:, 0].tolist() for n in (1,)]
    assert order == [[2]]
    constant = LocalizationHeadsResult(image, torch.full((1, 1, 4), torch.inf), "last", "m")
    assert not constant.selected(4, skip_layers=0).any(), "a constant map is never selected"


def test_the_figure_shows_the_frequencies():
    result = planted()
    ax = result.plot()
    drawn = torch.tensor(ax.collections[0].get_array().reshape(4, 5).data)
    assert torch.allclose(drawn, result.selected().mean(0), atol=1e-6)


def test_bad_localization_is_refused(llava_vlm, blip_vlm):
    inputs = llava_vlm.inputs([noise_image(0)], "what is this")
    with pytest.raises(ValueError, match="means 2 positions; localization heads are those of one"):
        mv.read(llava_vlm, inputs, mv.LocalizationHeads(["last", "last_image"]))
    several = llava_vlm.inputs([[noise_image(0), noise_image(1)]], "what is this")
    with pytest.raises(mv.InputError, match="Example 0 has 2 images"):
        mv.read(llava_vlm, several, mv.LocalizationHeads())
    with pytest.raises(ValueError, match="quer"):
        mv.read(blip_vlm, blip_vlm.inputs(noise_image(0), "a"), mv.LocalizationHeads())
    result = planted()
    for arguments, message in (({"skip_layers": 4}, "leave at least one"), ({"per_example": 0}, "at least 1 head")):
        with pytest.raises(ValueError, match=message):
            result.heads(**arguments)
