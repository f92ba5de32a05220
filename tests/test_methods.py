"""Methods as functions: their options are those of the probe, and an editor completes them."""

import dataclasses
import inspect

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image

PROBES = {
    mv.logit_lens: mv.LogitLens,
    mv.contextualization: mv.Contextualization,
    mv.norm_attention: mv.NormAttention,
    mv.query_reading: mv.QueryReading,
    mv.logit_attribution: mv.LogitAttribution,
}


@pytest.mark.parametrize("method", PROBES)
def test_a_method_has_the_options_of_its_probe(method):
    vlm, inputs, *options = inspect.signature(method).parameters.values()
    assert (vlm.name, inputs.name) == ("vlm", "inputs")
    fields = dataclasses.fields(PROBES[method])
    assert {o.name: o.default for o in options} == {f.name: f.default for f in fields}
    assert all(o.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for o in options), "an editor completes them"


def test_a_method_hands_each_option_on(llava_vlm, one_batch):
    lens = mv.logit_lens(llava_vlm, one_batch, k=2, positions="text", states=[1, 3], final_norm=False)
    (probed,) = mv.read(llava_vlm, one_batch, mv.LogitLens(k=2, positions="text", states=[1, 3], final_norm=False))
    assert torch.equal(lens.ids, probed.ids)
    assert (lens.states, lens.final_norm, lens.ids.shape[2]) == ((1, 3), False, 2)
    cosines = mv.contextualization(llava_vlm, one_batch, self_pairs=False, special=True, subtract_baseline=True)
    assert (cosines.self_pairs, cosines.special, cosines.adjusted) == (False, True, True)
    assert mv.norm_attention(llava_vlm, one_batch, dst="last").names == ("last",)


@pytest.mark.parametrize("method", PROBES)
def test_an_unknown_option_is_told_the_known_ones(llava_vlm, one_batch, method):
    options = [field.name for field in dataclasses.fields(PROBES[method])]
    there = f"its options are {', '.join(options)}" if options else "it has none"
    with pytest.raises(TypeError, match=rf"^{method.__name__} has no option position; {there}\.$"):
        method(llava_vlm, one_batch, position="text")


def test_completion_offers_public_names():
    """Modules among them are those that a user writes after `mv.`."""
    modules = {name for name in dir(mv) if inspect.ismodule(getattr(mv, name))}
    assert modules == {"bundled", "datasets", "figures", "study", "view"}
    assert mv.bundled.NAMES
    assert mv.datasets.load_dataset
    assert mv.figures.grid
    assert mv.study.run


@pytest.fixture(scope="module")
def one_batch(llava_vlm):
    return llava_vlm.inputs([noise_image(0), noise_image(1)], "what is this")
