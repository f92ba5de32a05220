"""Copies and pickles: of results, inputs and probes they are whole; of a loaded model refused."""

import copy
import dataclasses
import pickle

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def same(a, b) -> bool:
    """Whether two values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.compare
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


PROBES = [mv.LogitLens(k=2), mv.Contextualization(), mv.NormAttention(dst="last"), mv.LogitAttribution("this")]


@pytest.fixture(scope="module")
def inputs(llava_vlm):
    return llava_vlm.inputs(noise_image(0), "what is this")


@pytest.mark.parametrize("method", ["copy", "pickle"])
def test_what_was_made_is_copied_whole(llava_vlm, inputs, method):
    duplicate = copy.deepcopy if method == "copy" else pickled
    for value in (*PROBES, *mv.read(llava_vlm, inputs, *PROBES), inputs.tokens, inputs):
        again = duplicate(value)
        assert again is not value
        assert same(again, value), type(value)
    read_again = mv.read(llava_vlm, duplicate(inputs), *map(duplicate, PROBES))
    assert same(read_again, mv.read(llava_vlm, inputs, *PROBES))


def test_a_copied_result_is_independent(llava_vlm, inputs):
    lens = mv.logit_lens(llava_vlm, inputs)
    again = copy.deepcopy(lens)
    again.probs.zero_()
    assert lens.probs.sum() > 0


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_loaded_model_is_refused_and_stays_whole(inputs, llava_vlm, duplicate):
    before = mv.logit_lens(llava_vlm, inputs)
    with pytest.raises(TypeError, match=r"loaded VLM cannot be copied or pickled.*load it again, mv\.load\("):
        duplicate(llava_vlm)
    assert same(mv.logit_lens(llava_vlm, inputs), before)


def test_a_cache_is_copied_with_the_same_model(llava_vlm, inputs):
    _, cache = llava_vlm.run_with_cache(inputs, ["hook_embed", "blocks.1.hook_resid_post"])
    again = copy.deepcopy(cache)
    assert same(dict(again), dict(cache))
    again["hook_embed"].zero_()
    assert cache["hook_embed"].abs().sum() > 0
    assert again.bridge is cache.bridge
    with pytest.raises(TypeError, match=r"a cache's activations dict\(cache\)"):
        pickle.dumps(cache)
    assert same(pickled(dict(cache)), dict(cache))
