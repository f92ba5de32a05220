"""Readings where shape and order could deceive.

Groups of 2, 1 and 3 images, prompts that end in a special token, and twelve layers, whose names
sort otherwise as text than as numbers.
"""

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers.forwards import blocked, forward, with_mask
from helpers.images import noise_image
from helpers.uneven import GROUPS, N_LAYERS, ending_vlm, image_groups, layered_vlm
from mechvlm.experiments.sweep import Edit, run, sweep
from mechvlm.families.derive import derive
from mechvlm.families.known import known_record
from mechvlm.vlm.hook_cache import BLOCK_HOOKS
from mechvlm.vlm.inspection import Inspection
from mechvlm.vlm.records import example_arguments
from mechvlm.vlm.verify import check_claims, own_forward

PROMPTS = ["what is this", "a", "describe the scene"]
PROBES = mv.LogitLens(k=2, positions="image", states=[2]), mv.Contextualization(), mv.NormAttention(dst="last")


# -- groups of 2, 1 and 3 images --


@pytest.fixture(scope="module")
def groups(llava_vlm):
    return llava_vlm.inputs(image_groups(), PROMPTS)


@pytest.fixture(scope="module", params=[3, 2])
def results(llava_vlm, groups, request):
    """In one batch of three examples, and in batches of two and one."""
    inputs = groups if request.param == 3 else llava_vlm.inputs(image_groups(), PROMPTS, batch_size=2)
    return mv.read(llava_vlm, inputs, *PROBES)


@pytest.mark.parametrize("row", range(3))
def test_each_example_reads_its_own_images(llava_vlm, groups, results, row):
    lens, cosines, norms = results
    alone = llava_vlm.inputs([image_groups()[row]], PROMPTS[row])
    own_lens, own_cosines, own_norms = mv.read(llava_vlm, alone, *PROBES)
    points, n = lens.example == row, 16 * len(GROUPS[row])
    assert points.sum() == len(own_lens.position) == n
    moved = lens.position[points] - own_lens.position  # by the padding before it
    assert moved.unique().numel() == 1
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(lens.probs[:, points], own_lens.probs, **close)
    torch.testing.assert_close(cosines.inter[:, row], own_cosines.inter[:, 0], **close)
    torch.testing.assert_close(cosines.image[:, row], own_cosines.image[:, 0], **close)
    weight = norms.weight[:, row, :, 0]
    torch.testing.assert_close(
        weight[..., lens.position[points]], own_norms.weight[:, 0, :, 0, alone.tokens.image], **close
    )


def test_a_knockout_of_the_third_prompts_second_image_is_that_alone(llava_vlm, groups):
    src = [None, None, groups.token_maps[2].images[1]]
    last = groups.token_maps[2].last
    got = forward(llava_vlm, groups, lambda: mv.knock_out(llava_vlm, src, last, range(llava_vlm.n_layers)))
    heads = range(llava_vlm.n_heads)
    want = with_mask(llava_vlm, groups, blocked(llava_vlm, groups, (2, heads, torch.tensor([last]), src[2])))
    torch.testing.assert_close(got[:, -1], want[:, -1], rtol=1e-4, atol=1e-5)
    plain = forward(llava_vlm, groups)
    assert torch.equal(got[:2, -1], plain[:2, -1])
    assert (got[2, -1] - plain[2, -1]).abs().max() > 1e-4


# -- prompts that end in a special token --


@pytest.fixture(scope="module")
def ending():
    vlm = ending_vlm()
    return vlm, vlm.inputs(noise_image(0), "what is this")


def test_last_and_last_text_are_rows_of_their_own(ending):
    vlm, inputs = ending
    norms = mv.norm_attention(vlm, inputs, dst=["last", "last_text"])
    n = len(inputs.tokens)
    assert norms.dest.tolist() == [[n - 1, n - 2]]
    with torch.no_grad(), vlm.trace(inputs):
        patterns = nnsight.save([vlm.pattern[layer] for layer in range(vlm.n_layers)])
    for layer, pattern in enumerate(patterns):
        torch.testing.assert_close(norms.weight[layer, 0], pattern[0][:, [n - 1, n - 2]], rtol=1e-4, atol=1e-6)


def test_flows_to_the_last_position_come_from_all_text_before_it(ending):
    vlm, inputs = ending
    tokens, token = inputs.tokens, int(vlm.next_tokens(inputs))
    assert tokens.last_text in tokens.question
    flows = {
        "question -> last": tokens.question,
        "image -> last": tokens.image,
        "last -> last": torch.tensor([tokens.last]),
    }
    result = mv.information_flow(vlm, inputs, window=2 * vlm.n_layers, flows=tuple(flows))
    for flow, src in enumerate(flows.values()):
        edges = blocked(vlm, inputs, (0, range(vlm.n_heads), torch.tensor([tokens.last]), src))
        want = float(with_mask(vlm, inputs, edges)[0, -1].softmax(-1)[token])
        assert result.p_knocked[flow, 1, 0].item() == pytest.approx(want, rel=1e-4)
        assert result.p_knocked[flow, 1, 0].item() != pytest.approx(result.p[0].item(), rel=1e-4)


# -- three layers and twelve --


@pytest.fixture(scope="module", params=N_LAYERS)
def layered(request):
    vlm = layered_vlm(request.param)
    return vlm, vlm.inputs(noise_image(0), "what is this")


def test_layer_10_comes_after_layer_9_and_layer_1_is_not_10(layered):
    vlm, inputs = layered
    _, cache = vlm.run_with_cache(inputs)
    expected = [f"blocks.{layer}.{hook}" for layer in range(vlm.n_layers) for hook in BLOCK_HOOKS]
    assert list(cache) == ["hook_embed", *expected, "ln_final.hook_scale"]
    with torch.no_grad():
        hidden = vlm.hf(**vlm.encoding(inputs), output_hidden_states=True).hidden_states
    for layer in range(vlm.n_layers):
        torch.testing.assert_close(cache["resid_pre", layer], hidden[layer], rtol=0, atol=0)
    name = "blocks.1.hook_resid_post"
    assert list(vlm.run_with_cache(inputs, name)[1]) == [name]


def test_layers_of_two_digits_are_patched_by_their_names(layered):
    vlm, inputs = layered
    other = vlm.inputs(noise_image(1), "what is this")
    layers = [1, vlm.n_layers - 1]
    names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    _, cache = vlm.run_with_cache(other, names)
    with torch.no_grad(), vlm.trace(inputs):
        last = nnsight.save([])
        for layer in layers:
            mv.patch(vlm, cache, inputs.tokens.last, layer)
            last.append(vlm.resid_post[layer][0, -1].clone())
    for name, state in zip(names, last, strict=True):
        assert torch.equal(state, cache[name][0, -1])
    assert not torch.allclose(last[0], last[1])


def test_a_record_is_derived_and_checked_at_any_depth(layered):
    vlm, inputs = layered
    known = known_record(vlm.hf)
    derived = derive(vlm.hf, example_arguments(vlm.hf, vlm.processor, known), known)
    assert derived.layers == known.layers
    assert derived.kind(vlm.n_layers - 1) == known.kind(0)
    n = vlm.n_layers
    text = Inspection(vlm, derived, check_claims(vlm, inputs, own_forward(vlm, inputs)), "none").text()
    handed_on = f"resid_pre[l] = resid_post[l - 1] ({n - 1} layers)"
    assert handed_on in text
    assert text.endswith("Every identity holds.")


def test_edits_of_layers_of_two_digits_keep_their_rows(layered):
    """Each steers in one layer; rows of a forward are sorted by it."""
    vlm, inputs = layered
    direction = torch.randn(vlm.d_model, generator=torch.Generator().manual_seed(0))
    starts = sorted({0, 1, 2, vlm.n_layers - 2, vlm.n_layers - 1}, key=str)
    edits = [Edit((start,), range(start, start + 1), inputs.tokens.last) for start in starts]

    def change(layer, rows):
        pos = [[0] if layer in edit.layers else None for edit in rows]
        if any(pos):
            mv.steer(vlm, direction, pos, layer, at="mlp_out")

    got = sweep(vlm, run(vlm, inputs), edits, change)
    for start in starts:
        want = forward(
            vlm, inputs, lambda start=start: mv.steer(vlm, direction, inputs.tokens.last, start, at="mlp_out")
        )
        torch.testing.assert_close(got[start,], want[0, -1], rtol=1e-5, atol=2e-6)
