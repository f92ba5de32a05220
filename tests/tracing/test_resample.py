"""Ablation by resampling: what is drawn from a source, by which seed, and at which layers."""

import nnsight
import pytest
import torch

from helpers.forwards import forward
from helpers.images import noise_image
from helpers.uneven import layered_vlm, uneven
from mechvlm.tracing.interventions import ablate

LAYERS = (0, 2)


@pytest.fixture(scope="module")
def source(llava_vlm):
    """More states than the image has tokens, all different."""
    return uneven(40, llava_vlm.d_model)


def drawn(vlm, inputs, pos, source, seed: int) -> list[list[int]]:
    """Which entries of the source stand at `pos`, at each of the layers."""
    with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1):
        states = nnsight.save([])
        for layer in LAYERS:
            ablate(vlm, pos, layer, how="resample", source=source, seed=seed)
            states.append(vlm.resid_pre[layer][0, pos].clone())
    return [[int((source == state).all(-1).nonzero()) for state in layer] for layer in states]


@pytest.fixture(scope="module")
def inputs(llava_vlm):
    return llava_vlm.inputs(noise_image(0), "what is this")


def test_entries_are_drawn_from_the_whole_source(llava_vlm, inputs, source):
    pos = inputs.tokens.image
    (first, again), (other, _) = (drawn(llava_vlm, inputs, pos, source, seed) for seed in (0, 1))
    assert first == again, "every layer draws the same ones"
    assert first != other, "the seed decides"
    for numbers in (first, other):
        assert numbers != list(range(len(pos)))
        assert max(numbers) > len(pos)
        assert min(numbers) < len(pos)
    assert len(set(first + other)) > len(pos)


def test_a_source_as_long_as_the_selection_is_taken_in_order(llava_vlm, inputs, source):
    pos = inputs.tokens.image
    assert drawn(llava_vlm, inputs, pos, source[: len(pos)], 3) == [list(range(len(pos)))] * 2


def test_several_layers_in_one_call_are_these_layers(llava_vlm, inputs, source):
    pos, options = inputs.tokens.image, {"how": "resample", "source": source, "seed": 1}
    together = forward(llava_vlm, inputs, lambda: ablate(llava_vlm, pos, LAYERS, **options))
    apart = forward(llava_vlm, inputs, lambda: [ablate(llava_vlm, pos, layer, **options) for layer in LAYERS])
    torch.testing.assert_close(together, apart)


def test_layers_of_a_deep_model_are_those_of_their_number():
    """Layer 10 of 12 is no layer 1, and -1 is the last."""
    vlm = layered_vlm(12)
    inputs = vlm.inputs(noise_image(0), "a")
    pos, value = inputs.tokens.last, uneven(1, vlm.d_model)

    def states(layer):
        with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1):
            resid = nnsight.save([])
            for at in range(vlm.n_layers):
                if at == layer % vlm.n_layers:  # a forward goes by once, in its order
                    ablate(vlm, pos, layer, how="mean", source=value)
                resid.append(vlm.resid_pre[at][0, pos].clone())
        return [at for at, state in enumerate(resid) if torch.equal(state, value[0])]

    assert states(10) == [10]
    assert states(-1) == [11]
