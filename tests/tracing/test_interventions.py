"""Interventions: their effect, and parity with Hugging Face's own forward.

That forward has an explicit mask, or a plain hook.
"""

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers.forwards import blocked, decoder_of, forward, states, with_mask
from helpers.images import noise_image
from helpers.models import llava
from mechvlm.tracing.interventions import ablate, knock_out, patch, steer
from mechvlm.tracing.selections import SITES


@pytest.fixture(params=["sdpa", "eager"])
def attention(request, vlm):
    """The model under each attention implementation; set back to SDPA afterwards."""
    vlm.hf.set_attn_implementation(request.param)
    yield request.param
    vlm.hf.set_attn_implementation("sdpa")


# -- knock_out -------------------------------------------------------------------------------------


def test_a_knockout_equals_the_forward_with_that_mask(vlm, single, attention):
    tokens, every = single.tokens, range(vlm.n_heads)
    dst = [p for p in tokens.question.tolist() if p > tokens.last_image]
    got = forward(vlm, single, lambda: knock_out(vlm, tokens.image, dst, range(vlm.n_layers)))
    want = with_mask(vlm, single, blocked(vlm, single, (0, every, dst, tokens.image)))
    assert torch.equal(got[0, tokens.last], want[0, tokens.last])
    assert not torch.allclose(got[0, tokens.last], forward(vlm, single)[0, tokens.last], atol=1e-4)


def test_every_row_carries_its_own_knockout(vlm, batch, attention):
    maps, every = batch.token_maps, range(vlm.n_heads)
    src = [maps[0].image, None, maps[2].last_image]
    dst = [maps[0].last, None, [maps[2].last]]
    got = forward(vlm, batch, lambda: knock_out(vlm, src, dst, range(vlm.n_layers)))
    edges = (0, every, [maps[0].last], maps[0].image), (2, every, [maps[2].last], [maps[2].last_image])
    want, clean = with_mask(vlm, batch, blocked(vlm, batch, *edges)), forward(vlm, batch)
    # Only tokens are compared: padding attends to anything, and no token attends to padding.
    for row, tokens in enumerate(maps):
        torch.testing.assert_close(got[row, tokens.all], want[row, tokens.all], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1, maps[1].all], clean[1, maps[1].all], rtol=1e-5, atol=1e-5)
    assert (got[0, -1] - clean[0, -1]).abs().max() > 1e-4
    assert (got[2, -1] - clean[2, -1]).abs().max() > 1e-5


def test_heads_and_layers_are_those_asked_for(vlm, single, attention):
    tokens = single.tokens
    with torch.no_grad(), vlm.trace(single, logits_to_keep=1):
        patterns = nnsight.save([])
        for layer in range(vlm.n_layers):
            if layer == 1:
                knock_out(vlm, tokens.image, tokens.last, layer, heads=[0, 2])
            patterns.append(vlm.pattern[layer, [tokens.last]])
    share = torch.stack([p[0, :, 0, tokens.image].sum(-1) for p in patterns])  # layer head
    assert (share[1, [0, 2]] == 0).all()
    assert (share[1, [1, 3]] > 0).all()
    assert (share[[0, 2]] > 0).all()
    for p in patterns:
        torch.testing.assert_close(p.sum(-1), torch.ones_like(p.sum(-1)))


def test_every_row_knocks_out_heads_of_its_own(llava_vlm):
    inputs = llava_vlm.inputs([noise_image(3) for _ in range(2)], "what is this")
    last, image = inputs.token_maps[0].last, inputs.token_maps[0].image
    with torch.no_grad(), llava_vlm.trace(inputs, logits_to_keep=1):
        knock_out(llava_vlm, image, last, 0, heads=[[1], [2, 3]])
        pattern = nnsight.save(llava_vlm.pattern[0, [last]])
    gone = (pattern[:, :, 0, image].sum(-1) == 0).tolist()
    assert gone == [[False, True, False, False], [False, False, True, True]]


def test_knockouts_add_up(vlm, single):
    tokens = single.tokens
    first, second = tokens.image[:2], tokens.image[2:]

    def twice():
        for layer in range(vlm.n_layers):
            knock_out(vlm, first, tokens.last, layer)
            knock_out(vlm, second, tokens.last, layer)

    both = forward(vlm, single, lambda: knock_out(vlm, tokens.image, tokens.last, range(vlm.n_layers)))
    torch.testing.assert_close(forward(vlm, single, twice), both)


def test_nothing_leaks_into_the_next_trace(vlm, batch):
    clean = forward(vlm, batch)
    with torch.no_grad():
        plain = vlm.hf(**vlm.encoding(batch)).logits
    maps = batch.token_maps
    forward(vlm, batch, lambda: knock_out(vlm, [m.image for m in maps], maps[0].last, range(vlm.n_layers)))
    forward(vlm, batch, lambda: ablate(vlm, [m.image for m in maps], 0))
    forward(vlm, batch, lambda: steer(vlm, torch.ones(vlm.d_model), [[m.last] for m in maps], 1))
    assert torch.equal(forward(vlm, batch), clean)
    with torch.no_grad():
        assert torch.equal(vlm.hf(**vlm.encoding(batch)).logits, plain)


@pytest.mark.parametrize(
    ("src", "dst", "options", "error", "says"),
    [
        (
            [5],
            [3],
            {},
            ValueError,
            r"src \[5\], dst \[3\] has no effect: a position attends to itself and those before it",
        ),
        ([2], [2], {"layers": 99}, IndexError, r"layers \[99\] were asked for; the decoder has 0 to 2"),
        ([2], [2], {"layers": []}, ValueError, "no layer was given; the decoder has 0 to 2"),
        ([2], [5], {"heads": [4]}, IndexError, r"heads: \[4\] was asked for; there are 0 to 3"),
        ([2], [5], {"heads": []}, ValueError, "heads is empty"),
        ([99], [5], {}, IndexError, r"src: \[99\] was asked for; there are 0 to"),
        ([], [5], {}, ValueError, "src is empty: select at least one"),
        ([3], torch.tensor([], dtype=torch.long), {}, ValueError, "dst is empty"),
        ([3.5], [5], {}, ValueError, "src takes whole numbers, not torch.float32"),
        ("image", [5], {}, ValueError, r"src='image': give numbers, such as inputs.tokens.select\('image'\)"),
        ([[1], [2]], [5], {}, ValueError, "src: 2 selections were given for a batch of 1"),
        ([[1]], [None], {}, ValueError, "dst is empty"),
        (list(range(6)), [4, 5], {}, ValueError, "leaves a destination nothing to attend to"),
    ],
)
def test_bad_knockouts_are_refused(vlm, single, src, dst, options, error, says):
    with pytest.raises(error, match=says):
        forward(vlm, single, lambda: knock_out(vlm, src, dst, **{"layers": 1} | options))


def test_a_knockout_of_padding_or_of_what_is_knocked_out_is_refused(vlm, batch):
    padded = batch.token_maps[2]
    with pytest.raises(ValueError, match=r"example 2: src \[0\], dst .* has no effect"):
        forward(vlm, batch, lambda: knock_out(vlm, [None, None, [0]], padded.last, 1))

    def twice():
        knock_out(vlm, 8, 9, 1)
        knock_out(vlm, 8, 9, 1)

    with pytest.raises(ValueError, match="what was knocked out already"):
        forward(vlm, batch, twice)

    def all_at_last():
        for tokens in batch.token_maps:
            several = [tokens.all if m is tokens else None for m in batch.token_maps]
            knock_out(vlm, several, tokens.last, 1)

    with pytest.raises(ValueError, match="leaves a destination nothing to attend to"):
        forward(vlm, batch, all_at_last)


def test_one_number_per_example_is_not_guessed_at(vlm, batch):
    """The numbers could also be several positions of every example."""
    each = [m.last_image for m in batch.token_maps]
    with pytest.raises(
        ValueError, match=r"could be these positions in every example, or one in each. Write torch.tensor"
    ):
        forward(vlm, batch, lambda: ablate(vlm, each, 1))
    forward(vlm, batch, lambda: ablate(vlm, [[i] for i in each], 1))
    forward(vlm, batch, lambda: ablate(vlm, torch.tensor(each), 1))


def test_attention_without_a_mask_is_refused(single, vlm):
    vlm.config.text_config._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(ValueError, match=r"runs flash_attention_2. Set vlm.hf.set_attn_implementation\('sdpa'\)"):
            knock_out(vlm, 0, 1, 0)
    finally:
        vlm.hf.set_attn_implementation("sdpa")


# -- patch, ablate, steer --------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_a_patch_of_itself_changes_nothing(vlm, batch, site):
    every = [m.all for m in batch.token_maps]
    own = states(vlm, batch, site)
    clean = forward(vlm, batch)
    assert torch.equal(forward(vlm, batch, lambda: patch(vlm, own, every, range(vlm.n_layers), at=site)), clean)


@pytest.mark.parametrize("site", SITES)
def test_a_patch_is_read_back_and_moves_the_logits(vlm, single, site):
    torch.manual_seed(0)
    pos, layer = single.tokens.image[1:3], 1
    value = torch.randn(1, *states(vlm, single, site)[layer].shape[1:])
    with torch.no_grad(), vlm.trace(single):
        patch(vlm, value, pos, layer, at=site)
        after = nnsight.save(getattr(vlm, site)[layer].clone())
        logits = nnsight.save(vlm.logits)
    clean = states(vlm, single, site)[layer]
    others = [p for p in range(clean.shape[1]) if p not in pos.tolist()]
    assert torch.equal(after[:, pos], value[:, pos])
    assert torch.equal(after[:, others], clean[:, others])
    assert not torch.equal(logits[0, -1], forward(vlm, single)[0, -1])
    # The states of the positions alone are taken as well.
    assert torch.equal(forward(vlm, single, lambda: patch(vlm, value[:, pos], pos, layer, at=site)), logits)


def test_a_patch_equals_a_plain_hook(vlm, single):
    torch.manual_seed(1)
    value, pos = torch.randn(1, len(single.tokens), vlm.d_model), single.tokens.image

    def hook(module, args, output):
        output = output.clone()
        output[:, pos] = value[:, pos]
        return output

    handle = decoder_of(vlm).layers[1].register_forward_hook(hook)
    try:
        with torch.no_grad():
            want = vlm.hf(**vlm.encoding(single)).logits
    finally:
        handle.remove()
    assert torch.equal(forward(vlm, single, lambda: patch(vlm, {1: value}, pos, 1)), want)
    assert torch.equal(forward(vlm, single, lambda: patch(vlm, {"blocks.1.hook_resid_post": value}, pos, 1)), want)


def test_every_row_is_patched_on_its_own(vlm, batch):
    torch.manual_seed(2)
    own = states(vlm, batch, "resid_post")
    value = torch.randn_like(own[1])
    maps = batch.token_maps
    with torch.no_grad(), vlm.trace(batch, logits_to_keep=1):
        patch(vlm, value, [maps[0].image[:2], None, maps[2].last], 1)
        after = nnsight.save(vlm.resid_post[1])
    want = own[1].clone()
    want[0, maps[0].image[:2]] = value[0, maps[0].image[:2]]
    want[2, maps[2].last] = value[2, maps[2].last]
    assert torch.equal(after, want)


def test_single_heads_are_patched(vlm, single):
    own = states(vlm, single, "z")
    with torch.no_grad(), vlm.trace(single, logits_to_keep=1):
        patch(vlm, torch.zeros_like(own[1]), single.tokens.last, 1, at="z", heads=2)
        after = nnsight.save(vlm.z[1].clone())
    want = own[1].clone()
    want[:, single.tokens.last, 2] = 0
    assert torch.equal(after, want)


def test_every_kind_of_ablation(vlm, batch):
    own = states(vlm, batch, "resid_pre")
    pos = [m.image for m in batch.token_maps]

    def after(**options):
        with torch.no_grad(), vlm.trace(batch, logits_to_keep=1):
            ablate(vlm, pos, 1, **options)
            resid = nnsight.save(vlm.resid_pre[1].clone())
        for row, tokens in enumerate(batch.token_maps):
            rest = [p for p in range(resid.shape[1]) if p not in tokens.image.tolist()]
            assert torch.equal(resid[row, rest], own[1][row, rest])
        return [resid[row, p] for row, p in enumerate(pos)]

    assert all((x == 0).all() for x in after())
    originals = [own[1][row, p] for row, p in enumerate(pos)]
    for row, x in enumerate(after(how="mean")):
        others = torch.cat([original for other, original in enumerate(originals) if other != row])
        torch.testing.assert_close(x, others.mean(0).expand_as(x))
    for row, x in enumerate(after(how="resample", seed=1)):
        assert sum(torch.equal(x, original) for other, original in enumerate(originals) if other != row) == 1
    source = torch.randn(7, vlm.d_model)
    torch.testing.assert_close(after(how="mean", source=source)[2], source.mean(0).expand_as(originals[2]))
    for x in after(how="resample", source=source)[0]:
        assert (x == source).all(-1).any()


def test_a_token_that_is_zero_at_every_layer_writes_nothing(llava_vlm):
    """It still gets its share of attention, but its values are zero: this model has no bias."""
    vlm, inputs = llava_vlm, llava_vlm.inputs(noise_image(3), "what is this")
    pos = inputs.tokens.image
    with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1):
        values = nnsight.save([])
        for layer in range(vlm.n_layers):
            ablate(vlm, pos, layer)
            values.append(vlm.v[layer])
    assert all((v[:, pos] == 0).all() for v in values)


def test_steering_adds(vlm, batch):
    torch.manual_seed(3)
    own = states(vlm, batch, "resid_post")
    last = [[m.last] for m in batch.token_maps]
    shared, each = torch.randn(vlm.d_model), torch.randn(3, vlm.d_model)
    for direction in (shared, each):
        with torch.no_grad(), vlm.trace(batch, logits_to_keep=1):
            steer(vlm, direction, last, 1, scale=-2.5)
            after = nnsight.save(vlm.resid_post[1])
        want = own[1].clone()
        for row, p in enumerate(last):
            want[row, p] += -2.5 * (direction if direction.ndim == 1 else direction[row])
        torch.testing.assert_close(after, want)
    clean = forward(vlm, batch)
    torch.testing.assert_close(forward(vlm, batch, lambda: steer(vlm, shared, last, range(3), scale=0)), clean)


def test_interventions_use_the_models_own_precision():
    model, processor = llava.__wrapped__()
    vlm = mv.load(model.to(torch.bfloat16), processor)
    inputs = vlm.inputs(noise_image(3), "what is this")
    tokens = inputs.tokens

    def change():
        steer(vlm, torch.ones(vlm.d_model), tokens.image, 0)
        knock_out(vlm, tokens.image, tokens.last, 1)
        patch(vlm, torch.zeros(1, 1, vlm.d_model), tokens.last, 1)

    logits = forward(vlm, inputs, change)
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda v: patch(v, torch.zeros(1, 3, 7), 2, 1), ValueError,
         r"activations are \[1, 3, 7\]; resid_post of layer 1 takes \[1 or 1, \d+ or \[1\], 32\]"),
        (lambda v: patch(v, torch.zeros(1, 3, 32), [2, 3], 1), ValueError, r"activations are \[1, 3, 32\]"),
        (lambda v: patch(v, torch.zeros(1, 1, 32), 2, [1, 2]), ValueError, r"one tensor was given for the layers \[1, 2\]"),
        (lambda v: patch(v, {0: torch.zeros(1, 1, 32)}, 2, 1), ValueError,
         r"neither 1 nor 'blocks.1.hook_resid_post', but \[0\]"),
        (lambda v: patch(v, [torch.zeros(1, 1, 32)], 2, 1), ValueError,
         "layer 1 was asked for; the activations are a list of 1 layers"),
        (lambda v: patch(v, torch.zeros(1, 1, 32), 2, 1, at="nowhere"), ValueError,
         "no site 'nowhere' to change. Sites: resid_pre"),
        (lambda v: patch(v, torch.zeros(1, 1, 32), 2, 1, heads=[0]), ValueError, "only at='z' are there heads"),
        (lambda v: steer(v, torch.zeros(7), 2, 1), ValueError, r"direction is \[7\]; resid_post takes \[32\] or \[1, 32\]"),
        (lambda v: steer(v, torch.zeros(32), 999, 1), IndexError, r"pos: \[999\] was asked for"),
        (lambda v: ablate(v, 2, 1, how="nothing"), ValueError, "knows how='zero', 'mean' and 'resample', not 'nothing'"),
        (lambda v: ablate(v, 2, 1, how="mean"), ValueError, "takes the other examples of the batch"),
        (lambda v: ablate(v, 2, 1, how="mean", source=torch.zeros(4, 3)), ValueError,
         r"source is \[4, 3\]; expected \[n, 32\]"),
        (lambda v: ablate(v, 2, 5), IndexError, r"layers \[5\] were asked for; the decoder has 0 to 2"),
        (lambda v: ablate(v, [], 1), ValueError, "pos is empty"),
        (lambda v: ablate(v, 2, 1, at="z", heads=[0, 4]), IndexError, r"heads: \[4\] was asked for; there are 0 to 3"),
        (lambda v: patch(v, torch.zeros(1, 1, 4, 8), 2, 1, at="z", heads=4), IndexError, r"heads: \[4\] was asked for"),
        (lambda v: ablate(v, 2, 1, heads=[0]), ValueError, "only at='z' are there heads"),
    ],
)  # fmt: skip
def test_bad_changes_are_refused(vlm, single, change, error, says):
    with pytest.raises(error, match=says):
        forward(vlm, single, lambda: change(vlm))


def test_heads_and_positions_of_different_rows_are_refused(vlm, batch):
    pos, heads, own = [[3], None, None], [None, [0], None], states(vlm, batch, "z")
    with pytest.raises(ValueError, match="ablate: no example has both a position and a head"):
        forward(vlm, batch, lambda: ablate(vlm, pos, 1, at="z", heads=heads))
    with pytest.raises(ValueError, match="patch: no example has both a position and a head"):
        forward(vlm, batch, lambda: patch(vlm, own, pos, 1, at="z", heads=heads))
