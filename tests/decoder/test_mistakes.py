"""Mistakes with accessors and traces are told in the words of the one who made them."""

import copy
import inspect
import pickle
import warnings
from unittest import mock

import nnsight
import numpy as np
import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from mechvlm.decoder.mistakes import ORDER
from mechvlm.errors import InputError


@pytest.fixture(scope="module")
def rehearsed():
    return mv.load("tiny-llava", remote="local")


@pytest.mark.parametrize("site", ORDER)
def test_outside_a_trace(llava_vlm, site):
    accessor = getattr(llava_vlm, site)
    words = (
        rf"^vlm\.{site}\[1\] was asked for outside of a trace.*with vlm\.trace\(inputs\): .*save\(vlm\.{site}\[1\]\)"
    )
    with pytest.raises(ValueError, match=words):
        accessor[1]
    with pytest.raises(ValueError, match=words):
        accessor[1] = torch.zeros(1)


def test_logits_outside_a_trace(llava_vlm):
    with pytest.raises(ValueError, match=r"^vlm\.logits was asked for outside.*nnsight\.save\(vlm\.logits\)"):
        _ = llava_vlm.logits
    with pytest.raises(ValueError, match=r"^vlm\.logits was asked for outside"):
        llava_vlm.logits = torch.zeros(1)


def test_outside_a_trace_of_a_model_on_ndif():
    there = mv.load("tiny-llava", remote=True)
    with pytest.raises(ValueError, match=r"^vlm\.z\[2\] was asked for outside of a trace"):
        there.z[2]
    with pytest.raises(ValueError, match=r"^vlm\.logits was asked for outside of a trace"):
        _ = there.logits


@pytest.mark.parametrize(
    "intervene",
    [
        lambda vlm: mv.ablate(vlm, 3, layers=1),
        lambda vlm: mv.ablate(vlm, 3, layers=1, at="z", heads=1),
        lambda vlm: mv.knock_out(vlm, 3, 4, layers=1),
        lambda vlm: mv.steer(vlm, torch.zeros(32), 3, layers=1),
        lambda vlm: mv.patch(vlm, torch.zeros(1, 9, 32), 3, layers=1),
    ],
)
def test_interventions_outside_a_trace(llava_vlm, intervene):
    with pytest.raises(ValueError, match=r"vlm\.\w+\[1\] was asked for outside of a trace"):
        intervene(llava_vlm)


def test_a_trace_of_another_model_is_not_this_ones(llava_vlm):
    """Their modules have the same paths: nnsight would hand over the other's activation."""
    other = mv.load(*llava())
    inputs = llava_vlm.inputs(noise_image(0), "a")
    with pytest.raises(ValueError, match=r"vlm\.resid_post\[1\] was asked for outside of a trace of its model"):  # noqa: SIM117
        with llava_vlm.trace(inputs):
            nnsight.save(other.resid_post[1])
    with pytest.raises(ValueError, match=r"vlm\.logits was asked for outside of a trace of its model"):  # noqa: SIM117
        with llava_vlm.trace(inputs):
            other.logits = torch.zeros(1)


def layers_backwards(vlm):
    nnsight.save(vlm.resid_post[2])
    nnsight.save(vlm.resid_post[1])


def after_logits(vlm):
    nnsight.save(vlm.logits)
    nnsight.save(vlm.pattern[1])


def within_a_layer(vlm):
    nnsight.save(vlm.mlp_out[1])
    nnsight.save(vlm.z[1])


def assigned_too_late(vlm):
    value = vlm.q[2]
    vlm.q[1] = value


def ablated_too_late(vlm):
    nnsight.save(vlm.resid_post[1])
    mv.ablate(vlm, 3, layers=1, at="mlp_out")


@pytest.mark.parametrize(
    ("block", "what"),
    [
        (layers_backwards, "resid_post"), (after_logits, "pattern"), (within_a_layer, "z"), (assigned_too_late, "q"),
        (ablated_too_late, "mlp_out"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("remote", [False, "local"])
def test_out_of_order(llava_vlm, rehearsed, block, what, remote):
    vlm = rehearsed if remote else llava_vlm
    inputs = vlm.inputs(noise_image(0), "what is this")
    words = rf"^vlm\.{what}\[1\] was asked for after.*layer by layer from 0, within a layer resid_pre, q, .*, and logits last"
    with pytest.raises(OutOfOrderError, match=words), vlm.trace(inputs):
        block(vlm)
    with vlm.trace(inputs):  # nothing is left over
        logits = nnsight.save(vlm.logits)
    assert logits.shape[-1] == vlm.d_vocab


def test_the_order_that_is_named_is_the_models(llava_vlm):
    """Each activation of a layer can be read after the one before it."""
    with torch.no_grad(), llava_vlm.trace(llava_vlm.inputs(noise_image(0), "a")):
        read = nnsight.save([])
        for layer in range(llava_vlm.n_layers):
            for site in ORDER:
                getattr(llava_vlm, site)[layer]
                read.append(site)
        logits = nnsight.save(llava_vlm.logits)
    assert read == [*ORDER] * llava_vlm.n_layers
    assert logits.ndim == 3


def test_a_loop_over_generated_tokens_still_ends_by_itself(llava_vlm):
    """nnsight ends it with the same error that an activation read too late raises."""
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was never reached.*")
        with torch.no_grad(), llava_vlm.model.generate(**llava_vlm.encoding(inputs), **options) as tracer:
            ids = nnsight.save([])
            for _ in tracer.iter[:]:
                ids.append(llava_vlm.logits[0, -1].argmax().item())
    with torch.no_grad():
        new = llava_vlm.hf.generate(**llava_vlm.encoding(inputs), **options)[0, len(inputs.tokens) :]
    assert ids == new.tolist()


@pytest.mark.parametrize("layer", [2.0, [1, 2], (1, 2, 0), slice(0, 2), "1", None, torch.tensor([0, 1]), np.float32(1)])
@pytest.mark.parametrize("site", ["resid_post", "pattern", "W_V"])
def test_a_layer_is_one_whole_number(llava_vlm, site, layer):
    with pytest.raises(TypeError, match=rf"(?s){site}\[.*\]: give one layer, a whole number .*layers 0 to 2"):
        getattr(llava_vlm, site)[layer]


def test_several_layers_are_read_one_by_one(llava_vlm):
    with pytest.raises(TypeError, match=r"read several one by one, \[resid_post\[layer\] for layer in"):
        llava_vlm.resid_post[[1, 2]]


@pytest.mark.parametrize("layer", [3, -4, 99])
def test_a_layer_that_is_not_there(llava_vlm, layer):
    for site in ("z", "pattern", "W_O"):
        with pytest.raises(IndexError, match=rf"{site}\[{layer}\]: the decoder has layers 0 to 2\."):
            getattr(llava_vlm, site)[layer]


@pytest.mark.parametrize("layer", [1, -2, np.int64(1), torch.tensor(1)])
def test_whole_numbers_of_any_library_are_layers(llava_vlm, layer):
    inputs = llava_vlm.inputs(noise_image(0), "a")
    with torch.no_grad(), llava_vlm.trace(inputs):
        value = nnsight.save(llava_vlm.resid_post[layer].clone())
    assert torch.equal(value, llava_vlm.hf(**llava_vlm.encoding(inputs), output_hidden_states=True).hidden_states[2])


def test_an_accessor_without_a_layer(llava_vlm):
    with pytest.raises(AttributeError, match=r"resid_post is one activation of every layer.*resid_post\[2\]\.shape"):
        _ = llava_vlm.resid_post.shape
    assert repr(llava_vlm.z) == "<z of layers 0 to 2: z[layer], inside a trace>"
    assert not hasattr(llava_vlm.z, "__array__")


@pytest.mark.parametrize("what", ["what is this", torch.zeros(1, 4), None])
def test_what_is_no_inputs(llava_vlm, what):
    for method in (mv.VLM.trace, mv.VLM.encoding):
        unchecked = inspect.unwrap(method)  # without the tests' own checks of types
        words = rf"A {type(what).__name__} was given where one forward takes one batch.*vlm\.inputs\(image"
        with (
            pytest.raises(InputError, match=words),
            mock.patch.object(mv.VLM, "encoding", inspect.unwrap(mv.VLM.encoding)),
        ):
            unchecked(llava_vlm, what)


# -- names that were not saved ---------------------------------------------------------------------


def unsaved(vlm):
    with torch.no_grad(), vlm.trace(vlm.inputs(noise_image(0), "a")):
        state = vlm.resid_post[1]
        logits = nnsight.save(vlm.logits)
    return state, logits


@pytest.mark.parametrize(
    "use",
    [
        lambda state, logits: state.shape, lambda state, logits: state[0], lambda state, logits: state + 1,
        lambda state, logits: logits - state, lambda state, logits: torch.equal(state, logits),
        lambda state, logits: torch.stack([logits, state]), lambda state, logits: float(state),
        lambda state, logits: list(state), lambda state, logits: state == logits, lambda state, logits: np.asarray(state),
        lambda state, logits: bool(state), lambda state, logits: state(logits),
    ],
)  # fmt: skip
@pytest.mark.parametrize("remote", [False, "local"])
def test_using_what_was_not_saved(llava_vlm, rehearsed, use, remote):
    state, logits = unsaved(rehearsed if remote else llava_vlm)
    with pytest.raises(NameError, match=r"'state' has no value: .*Write state = nnsight\.save\(\.\.\.\) in the block"):
        use(state, logits)


def test_what_was_not_saved_can_be_shown_and_copied(llava_vlm):
    state, _ = unsaved(llava_vlm)
    for same in (state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert repr(same).startswith("'state' has no value")


def test_names_around_a_block_keep_what_they_hold(llava_vlm, rehearsed):
    inputs = llava_vlm.inputs(noise_image(0), "a")
    kept = layer = "before"
    for _ in range(2):
        with torch.no_grad(), llava_vlm.trace(inputs):
            for layer in range(2):  # noqa: B007
                pass
            kept = llava_vlm.resid_post[1]
            state = llava_vlm.resid_post[2]
            inner = [index for index in range(3)]
            max = state.amax()
            mean = nnsight.save(state.mean())
    assert (kept, layer) == ("before", "before")
    assert "index" not in locals()
    assert mean.ndim == 0
    with torch.no_grad(), rehearsed.trace(rehearsed.inputs(noise_image(0), "a")):
        state = rehearsed.resid_post[2]  # what was not saved before does not travel
        mean = nnsight.save(state.mean())
    assert mean.ndim == 0
    with pytest.raises(UnboundLocalError):
        max(1, 2)  # a builtin's name is left to Python


def test_a_block_that_fails_binds_nothing(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "a")
    with pytest.raises(ZeroDivisionError), llava_vlm.trace(inputs):
        state = 1 / 0
    assert "state" not in locals()
