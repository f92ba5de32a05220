"""Selections of interventions: positions, layers and heads, for all rows or row by row."""

import nnsight
import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from helpers.forwards import LOWEST, blocked, decoder_of, forward, states, with_mask
from helpers.images import noise_image
from mechvlm.families.record import part
from mechvlm.tracing.interventions import ablate, knock_out, patch, steer


def test_every_form_of_a_selection_means_the_same(vlm, single):
    image = single.tokens.image
    want = forward(vlm, single, lambda: ablate(vlm, image, [0, 2]))
    last = len(single.tokens)
    assert not torch.equal(want, forward(vlm, single))
    for pos in (image.tolist(), tuple(image.tolist()), image.numpy(), image - last, [image], [(image - last).tolist()]):
        assert torch.equal(forward(vlm, single, lambda pos=pos: ablate(vlm, pos, [0, 2])), want)
    for layers in ([2, 0], [-1, 0], [0, 2, -1], torch.tensor([0, 2]), np.array([0, -1]), range(0, 3, 2), {0, 2}):
        assert torch.equal(forward(vlm, single, lambda layers=layers: ablate(vlm, image, layers)), want)
    want = forward(vlm, single, lambda: ablate(vlm, image, 1))
    for layer in (np.int64(1), torch.tensor(1), -2):
        assert torch.equal(forward(vlm, single, lambda layer=layer: ablate(vlm, image, layer)), want)


def test_an_edge_is_the_same_counted_from_the_end(vlm, single):
    image, n = single.tokens.image, len(single.tokens)
    want = forward(vlm, single, lambda: knock_out(vlm, image, n - 1, 1, heads=[3]))
    assert torch.equal(forward(vlm, single, lambda: knock_out(vlm, image - n, [-1, n - 1], -2, heads=-1)), want)


def test_rows_may_be_arrays(vlm, batch):
    rows = [m.image[:1] for m in batch.token_maps]
    want = forward(vlm, batch, lambda: ablate(vlm, rows, 0))
    assert torch.equal(forward(vlm, batch, lambda: ablate(vlm, [row.numpy() for row in rows], 0)), want)
    assert torch.equal(forward(vlm, batch, lambda: ablate(vlm, torch.stack(rows), 0)), want)


def test_every_row_changes_heads_of_its_own(llava_vlm):
    inputs = llava_vlm.inputs([noise_image(i) for i in range(3)], "what is this")
    last, own = inputs.token_maps[0].last, states(llava_vlm, inputs, "z")[1]
    with torch.no_grad(), llava_vlm.trace(inputs, logits_to_keep=1):
        ablate(llava_vlm, last, 1, at="z", heads=[[0], None, [1, -1]])
        after = nnsight.save(llava_vlm.z[1].clone())
    want = own.clone()
    want[0, last, 0] = want[2, last, 1] = want[2, last, 3] = 0
    assert torch.equal(after, want)


def test_a_head_is_steered(vlm, batch):
    own = states(vlm, batch, "z")[1]
    torch.manual_seed(4)
    shared, each = torch.randn(own.shape[2:]), torch.randn(3, *own.shape[2:])
    for direction in (shared, each):
        with torch.no_grad(), vlm.trace(batch, logits_to_keep=1):
            steer(vlm, direction, -1, 1, at="z")
            after = nnsight.save(vlm.z[1].clone())
        want = own.clone()
        want[:, -1] += direction
        torch.testing.assert_close(after, want)


def test_the_seed_decides_which_example_is_drawn(vlm):
    """Any other example may be drawn. Every layer draws the same one, in one call or in several."""
    inputs = vlm.inputs([noise_image(i) for i in range(4)], "what is this")
    pos, own = inputs.token_maps[0].image, states(vlm, inputs, "mlp_out")
    drawn = set()
    for seed in range(8):
        by_layer = forward(
            vlm, inputs, lambda seed=seed: [ablate(vlm, pos, layer, "resample", seed=seed) for layer in range(3)]
        )
        at_once = forward(vlm, inputs, lambda seed=seed: ablate(vlm, pos, range(3), "resample", seed=seed))
        assert torch.equal(by_layer, at_once)
        with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1):
            ablate(vlm, pos, 0, "resample", at="mlp_out", seed=seed)
            first = nnsight.save(vlm.mlp_out[0].clone())
        drawn |= {i for i in range(4) if torch.equal(first[0, pos], own[0][i, pos])}
    assert drawn == {1, 2, 3}


def test_the_image_may_stand_in_the_middle_and_more_than_once(llava_vlm):
    prompts = [
        "USER: look at <image> and at <image>\nwhat is this ASSISTANT:",
        "USER: is <image> the same scene as what <image> is ASSISTANT:",
        "USER: <image> <image> what ASSISTANT:",
    ]
    inputs = llava_vlm.inputs([[noise_image(2 * i), noise_image(2 * i + 1)] for i in range(3)], prompts)
    maps, heads = inputs.token_maps, [[0], [1, 3], [2]]
    src = [m.images[0] for m in maps]
    dst = [[p for p in m.all.tolist() if p > int(m.images[0][-1])] for m in maps]
    edges = [(row, heads[row], dst[row], src[row]) for row in range(3)]
    got = forward(llava_vlm, inputs, lambda: knock_out(llava_vlm, src, dst, range(3), heads=heads))
    want, clean = with_mask(llava_vlm, inputs, blocked(llava_vlm, inputs, *edges)), forward(llava_vlm, inputs)
    for row, tokens in enumerate(maps):
        torch.testing.assert_close(got[row, tokens.all], want[row, tokens.all], rtol=1e-5, atol=1e-5)
        assert (got[row, -1] - clean[row, -1]).abs().max() > 1e-4


def test_gradients_go_through_interventions(vlm, single):
    """A logit's slope in the patched states: autograd against the difference of two forwards."""
    tokens = single.tokens
    torch.manual_seed(5)
    value, step = torch.randn(1, len(tokens.image), vlm.d_model), torch.randn(1, len(tokens.image), vlm.d_model)

    def change(x):
        knock_out(vlm, tokens.image[:2], tokens.last, 0)
        patch(vlm, x, tokens.image, 0, at="resid_mid")
        knock_out(vlm, tokens.image, tokens.last, 1, heads=[1])

    leaf = value.clone().requires_grad_()
    with vlm.trace(single):
        change(leaf)
        logit = nnsight.save(vlm.logits[0, -1, 77])
    (grad,) = torch.autograd.grad(logit, leaf)
    up, down = (forward(vlm, single, lambda s=s: change(value + s * 1e-2 * step))[0, -1, 77] for s in (1, -1))
    assert float((grad * step).sum()) == pytest.approx(float(up - down) / 2e-2, rel=1e-2)


def test_a_forward_behind_a_cache_has_later_destinations_only(llava_vlm):
    decoder = part(llava_vlm.model, llava_vlm.record.decoder)
    torch.manual_seed(6)
    states = torch.randn(1, 9, llava_vlm.d_model)
    with torch.no_grad():
        past = decoder_of(llava_vlm)(inputs_embeds=states[:, :6], past_key_values=DynamicCache()).past_key_values
    with (
        pytest.raises(ValueError, match="this forward computes positions 6 to 8 only"),
        torch.no_grad(),
        decoder.trace(inputs_embeds=states[:, 6:], past_key_values=past),
    ):
        knock_out(llava_vlm, 0, [2, 8], 0)


def test_destinations_behind_a_cache_are_counted_from_its_start(llava_vlm):
    """Position 7 of 9 is the second of the three that are computed, as in HF's whole forward."""
    decoder, plain = part(llava_vlm.model, llava_vlm.record.decoder), decoder_of(llava_vlm)
    torch.manual_seed(7)
    states = torch.randn(1, 9, llava_vlm.d_model)
    mask = torch.zeros(1, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), LOWEST)
    with torch.no_grad():
        past = plain(inputs_embeds=states[:, :6], past_key_values=DynamicCache()).past_key_values
        unchanged = plain(inputs_embeds=states, attention_mask=mask).last_hidden_state
        mask[..., 7, [0, 4]] = LOWEST
        expected = plain(inputs_embeds=states, attention_mask=mask).last_hidden_state[:, 6:]
    with torch.no_grad(), decoder.trace(inputs_embeds=states[:, 6:], past_key_values=past):
        knock_out(llava_vlm, [0, 4], 7, range(llava_vlm.n_layers))
        last = nnsight.save(decoder.output.last_hidden_state)
    torch.testing.assert_close(last, expected)
    assert not torch.allclose(expected, unchanged[:, 6:], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda v: ablate(v, None, 1), ValueError, "pos takes whole numbers, not None"),
        (lambda v: ablate(v, 2, None), ValueError, "ablate: layers takes whole numbers, not None"),
        (lambda v: ablate(v, 2, "1"), ValueError, "ablate: layers takes whole numbers, not '1'"),
        (lambda v: ablate(v, 2, [1.7]), ValueError, "ablate: layers takes whole numbers, not torch.float32"),
        (lambda v: ablate(v, 2, [True]), ValueError, "ablate: layers takes whole numbers, not torch.bool"),
        (lambda v: ablate(v, ["image"] * 3, 1), ValueError, "pos='image': give numbers"),
        (lambda v: knock_out(v, torch.arange(3), [9, 1], 1), ValueError, "leaves a destination nothing to attend to"),
        (lambda v: knock_out(v, [[8], None, None], [None, [9], None], 1), ValueError, "no example has a source, a dest"),
        (lambda v: knock_out(v, [[8], None, None], 9, 1, heads=[None, [0], None]), ValueError, "no example has a source"),
    ],
)  # fmt: skip
def test_bad_selections_are_refused(llava_vlm, change, error, says):
    inputs = llava_vlm.inputs([noise_image(i) for i in range(3)], "what is this")
    with pytest.raises(error, match=says):
        forward(llava_vlm, inputs, lambda: change(llava_vlm))
