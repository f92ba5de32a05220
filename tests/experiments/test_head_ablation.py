"""Heads ablated: against Hugging Face's forward with hooks, and a head made to copy one patch."""

from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers.copying import HEAD, LAYER, copying, picture
from helpers.forwards import decoder_of
from helpers.images import noise_image
from helpers.models import llava
from helpers.unchecked import unchecked
from mechvlm.experiments import head_ablation as module

ANSWERS = ["this", "scene", 1234]
WIDTH = 8
"""Of a head, in the tiny models."""


def close(got, want, rtol=2e-5):
    # Probabilities of a random model over 32064 words are around 3e-5: compared to five digits.
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=rtol, atol=1e-12)


@contextmanager
def replaced(vlm, heads, pos, value_of):
    """Plain hooks: z of (layer, head) at `pos` becomes value_of(layer, head)."""

    def hook(layer, head):
        def change(_, args):
            z = args[0].clone()
            z[:, pos, head * WIDTH : (head + 1) * WIDTH] = value_of(layer, head)
            return (z,)

        return change

    with ExitStack() as stack:
        for layer, head in heads:
            o_proj = decoder_of(vlm).layers[layer].self_attn.o_proj
            stack.callback(o_proj.register_forward_pre_hook(hook(layer, head)).remove)
        yield


@torch.no_grad()
def last_logits(vlm, example):
    return vlm.hf(**vlm.encoding(example)).logits[0, -1]


@torch.no_grad()
def outputs(vlm, example):
    """What enters each layer's output projection in Hugging Face's forward, [pos head * d_head]."""
    given = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: given.append(args[0][0].clone()))
        for layer in decoder_of(vlm).layers
    ]
    vlm.hf(**vlm.encoding(example))
    for handle in handles:
        handle.remove()
    return given


def test_every_head_equals_a_whole_forward_with_a_hook(vlm, batch):
    """All heads of one example, and three of the others'."""
    result = mv.head_ablation(vlm, batch, ANSWERS)
    last = mv.head_ablation(vlm, batch, ANSWERS, positions="last")
    for i, answer in enumerate(ANSWERS):
        example = batch[i]
        token = int(vlm.answer_tokens(example, answer))
        clean = last_logits(vlm, example)
        close(result.p[i], clean.softmax(-1)[token])
        close(result.logit[i], clean[token])
        some = [(0, 1), (1, 3), (2, 0)]
        for got, pos, heads in (
            (result, slice(None), list(np.ndindex(3, 4)) if i == 1 else some), (last, slice(-1, None), some),
        ):  # fmt: skip
            for layer, head in heads:
                with replaced(vlm, [(layer, head)], pos, lambda *_: 0):
                    logits = last_logits(vlm, example)
                close(got.p_ablated[layer, head, i], logits.softmax(-1)[token])
                close(got.logit_ablated[layer, head, i], logits[token], 1e-4)
    torch.testing.assert_close(result.effect, result.p_ablated - result.p)
    torch.testing.assert_close(result.logit_effect, result.logit_ablated - result.logit)
    assert result.logit_effect.abs().min(-1).values.min() > 0, "every head does something"
    assert (result.how, result.positions, last.positions) == ("zero", "all", "last")


def test_the_mean_is_that_of_all_examples_positions(vlm, batch):
    """Each position counts once, so that longer examples count more."""
    heads = [(0, 1), (1, 3), (2, 0)]
    result = mv.head_ablation(vlm, batch, ANSWERS, how="mean", sets={"three": heads}, draws=1)
    mean = [torch.cat(zs).mean(0) for zs in zip(*(outputs(vlm, batch[i]) for i in range(3)), strict=True)]
    for i, answer in enumerate(ANSWERS):
        token = int(vlm.answer_tokens(batch[i], answer))
        with replaced(vlm, heads, slice(None), lambda at, h: mean[at][h * WIDTH : (h + 1) * WIDTH]):
            close(result.logit_ablated[0, i], last_logits(vlm, batch[i])[token], 1e-4)


@pytest.mark.parametrize("positions", ["image", "last"])
def test_a_resampled_head_writes_what_it_wrote_in_another_example(vlm, batch, positions):
    """Each example takes the place of exactly one other."""
    zs = [outputs(vlm, batch[i]) for i in range(3)]
    where = [batch[i].tokens.select(positions) for i in range(3)]
    layer, head = 1, 3
    own = slice(head * WIDTH, (head + 1) * WIDTH)
    logits = torch.zeros(3, 3)  # [example, the one that it takes from]
    for i, answer in enumerate(ANSWERS):
        token = int(vlm.answer_tokens(batch[i], answer))
        for other in range(3):
            value = zs[other][layer][where[other]][:, own]
            with replaced(vlm, [(layer, head)], where[i], lambda *_, value=value: value):
                logits[i, other] = last_logits(vlm, batch[i])[token]
    partners = set()
    for seed in (0, 1, 2):
        result = mv.head_ablation(
            vlm, batch, ANSWERS, how="resample", positions=positions, seed=seed, sets={"head": [(layer, head)]}, draws=1
        )
        off, taken = (logits - result.logit_ablated[0][:, None]).abs().min(1)
        assert off.max() < 1e-5
        assert sorted(taken.tolist()) == [0, 1, 2]
        assert all(taken != torch.arange(3))
        partners.add(tuple(taken.tolist()))
    assert len(partners) == 2, "the seed decides"


def test_positions_of_a_longer_example_are_drawn(llava_vlm):
    inputs = llava_vlm.inputs([noise_image(i) for i in range(2)], ["a", "describe the scene . a what is this"])
    sets = {"head": [(0, 1)]}
    results = [mv.head_ablation(llava_vlm, inputs, 7, "resample", sets=sets, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(results[0].p_ablated, results[1].p_ablated)
    assert not torch.equal(results[0].p_ablated, results[2].p_ablated)
    examples = module.Examples(llava_vlm, inputs)
    other, taken = module._other_example(examples, examples[0], 1, "question", 0)
    assert len(taken) == len(inputs[0].tokens.question) < len(inputs[1].tokens.question)
    assert other.prompts == inputs[1].prompts
    assert set(taken) <= set(inputs[1].tokens.question.tolist())


# -- sets of heads --


def test_sets_and_their_random_sets_equal_forwards_with_hooks(vlm, batch):
    sets = {"one": [(1, 2)], "over layers": [(2, 3), (0, 1), (2, 0), (0, 1)]}
    result = mv.head_ablation(vlm, batch, ANSWERS, sets=sets, draws=3, seed=5)
    assert result.sets == ("one", "over layers")
    assert result.members == (((1, 2),), ((0, 1), (2, 3), (2, 0)))
    for members, drawn in zip(result.members, result.drawn, strict=True):
        assert len(drawn) == 3
        for heads in drawn:
            assert sorted(layer for layer, _ in heads) == sorted(layer for layer, _ in members)
            assert not set(heads) & set(members)
            assert len(set(heads)) == len(members)
    for i, answer in enumerate(ANSWERS):
        token = int(vlm.answer_tokens(batch[i], answer))
        for s, members in enumerate(result.members):
            for draw, heads in enumerate((members, *result.drawn[s])):
                with replaced(vlm, heads, slice(None), lambda *_: 0):
                    logits = last_logits(vlm, batch[i])
                got = (
                    (result.p_ablated[s, i], result.logit_ablated[s, i])
                    if draw == 0
                    else (result.p_control[s, draw - 1, i], result.logit_control[s, draw - 1, i])
                )
                close(got[0], logits.softmax(-1)[token])
                close(got[1], logits[token], 1e-4)
    control = result.p_control.numpy() - result.p.numpy()
    np.testing.assert_allclose(result.control_interval.mean, control.mean((1, 2)), rtol=1e-3)
    np.testing.assert_allclose(result.spread, control.mean(2).std(1, ddof=1), rtol=1e-3)
    difference = (result.p_ablated.numpy() - result.p_control.numpy().mean(1)).mean(1)
    np.testing.assert_allclose(result.difference.mean, difference, rtol=1e-3)
    other = mv.head_ablation(vlm, batch, ANSWERS, sets=sets, draws=3, seed=6)
    assert other.drawn != result.drawn


def test_a_set_of_most_heads_has_no_random_sets(llava_vlm):
    inputs = llava_vlm.inputs([noise_image(0), noise_image(1)], "what is this")
    sets = {"layer": [(1, head) for head in range(3)], "head": [(1, 0)]}
    result = mv.head_ablation(llava_vlm, inputs, "this", sets=sets, draws=2)
    assert result.p_control[0].isnan().all()
    assert not result.p_control[1].isnan().any()
    assert [len(drawn) for drawn in result.drawn] == [0, 2]
    assert torch.isnan(result.difference.mean[0])
    assert result.to_frame().query("set == 'layer' and draw >= 0")["effect"].isna().all()


# -- by construction --


@pytest.fixture(scope="module")
def copier():
    return copying()


def test_the_head_that_copies_is_first_and_its_ablation_removes_the_answer(copier):
    red = copier.inputs([picture("red"), picture("red", "yellow")], "what is this")
    result = mv.head_ablation(copier, red, "red")
    assert result.p.min() > 0.999
    best = result.heads(top=12)
    assert (best.layer[0], best["head"][0]) == (LAYER, HEAD)
    assert best.effect[0] < -0.99
    assert (best.effect[1:] == 0).all(), "no other head has any effect"
    # Heads without effect are tied: they follow by layer and head.
    rest = [(layer, head) for layer in range(3) for head in range(4) if (layer, head) != (LAYER, HEAD)]
    assert list(zip(best.layer[1:], best["head"][1:], strict=True)) == rest
    sets = mv.head_ablation(copier, red, "red", sets={"copies": [(LAYER, HEAD)], "others": [(0, 0), (2, 3)]})
    torch.testing.assert_close(sets.effect[0], result.effect[LAYER, HEAD])
    assert (sets.effect[1] == 0).all()
    assert (sets.control == 0).all(), "random heads of layer 1 without the one that copies, and of layers 0 and 2"


def test_the_other_examples_color_is_copied(copier):
    """Resampled from a blue patch, the answer is blue."""
    both = copier.inputs([picture("red"), picture("blue")], "what is this")
    for answer, sign in ((["red", "blue"], -1), (["blue", "red"], 1)):
        effect = mv.head_ablation(copier, both, answer, how="resample").effect
        assert (sign * effect[LAYER, HEAD] > 0.99).all()
        effect[LAYER, HEAD] = 0
        assert effect.abs().max() == 0


# -- cost, results and refusals --


def test_all_heads_cost_half_of_a_forward_each():
    """Counted in layers and positions computed, which no clock can blur."""
    vlm = mv.load(*llava(layers=16))
    inputs = vlm.inputs(noise_image(0), "what is this")
    computed = []
    handles = [
        layer.mlp.register_forward_hook(lambda _, args, out: computed.append(args[0].shape[0] * args[0].shape[1]))
        for layer in decoder_of(vlm).layers
    ]
    for positions, most in (("all", 0.6), ("last", 0.1)):
        computed.clear()
        mv.head_ablation(vlm, inputs, "this", positions=positions)
        whole = 16 * len(inputs.tokens)
        assert sum(computed) <= most * whole * 16 * vlm.n_heads
    for handle in handles:
        handle.remove()


def test_tables_intervals_and_files(llava_vlm, tmp_path):
    inputs = llava_vlm.inputs([noise_image(i) for i in range(3)], "what is this", ids=["a", "b", "c"])
    result = mv.head_ablation(llava_vlm, inputs, "this")
    frame = result.to_frame().set_index(["layer", "head", "id"])
    row = frame.loc[(2, 1, "c")]
    assert row.p_ablated == pytest.approx(float(result.p_ablated[2, 1, 2]))
    assert row.effect == pytest.approx(float(result.p_ablated[2, 1, 2] - result.p[2]), abs=1e-9)
    assert row.logit_effect == pytest.approx(float(result.logit_ablated[2, 1, 2] - result.logit[2]), abs=1e-6)
    by = result.heads(top=3, by="logit")
    mean = result.logit_effect.mean(-1)
    order = sorted((-abs(float(mean[at])), at) for at in np.ndindex(3, 4))[:3]
    assert list(zip(by.layer, by["head"], strict=True)) == [at for _, at in order]
    layer, head = order[0][1]
    others = [float(mean[layer, h]) for h in range(4) if h != head]
    assert by.others[0] == pytest.approx(sum(others) / 3, rel=1e-3)
    assert (by.low <= by.effect).all()
    assert (by.effect <= by.high).all()
    sets = mv.head_ablation(llava_vlm, inputs, "this", sets={"x": [(0, 1)], "y": [(1, 1), (2, 0)]}, draws=2)
    table = sets.to_frame().set_index(["set", "draw", "id"])
    assert table.loc[("y", -1, "b")].p_ablated == pytest.approx(float(sets.p_ablated[1, 1]))
    assert table.loc[("y", 1, "b")].p_ablated == pytest.approx(float(sets.p_control[1, 1, 1]))
    assert table.loc[("y", 1, "b")].n_heads == 2
    for each in (result, sets):
        each.save(tmp_path / "r.safetensors")
        again = type(each).load(tmp_path / "r.safetensors")
        assert again.to_frame().equals(each.to_frame())
        assert again.answers == each.answers == (" this",) * 3
    assert again.members == sets.members
    assert again.drawn == sets.drawn
    parts = [mv.head_ablation(llava_vlm, part, "this") for part in (inputs[:1], inputs[1:])]
    torch.testing.assert_close(mv.concat(parts).p_ablated, result.p_ablated, rtol=1e-5, atol=1e-9)
    means = [mv.head_ablation(llava_vlm, part, "this", how="mean") for part in (inputs[:1], inputs[1:])]
    with pytest.raises(mv.InputError, match="with how='mean' are not joined: each call replaces by what its"):
        mv.concat(means)


def test_plots_show_the_means(llava_vlm):
    from matplotlib import pyplot as plt

    inputs = llava_vlm.inputs([noise_image(i) for i in range(3)], "what is this")
    result = mv.head_ablation(llava_vlm, inputs, "this")
    for by, effect in (("probability", result.effect), ("logit", result.logit_effect)):
        ax = result.plot(by=by)
        drawn = np.asarray(ax.collections[0].get_array()).reshape(3, 4)
        np.testing.assert_allclose(drawn, effect.mean(-1), rtol=1e-4)
        sure = {(int(x), int(y)) for x, y in ax.collections[1].get_offsets()}
        interval = result.interval if by == "probability" else result.logit_interval
        assert sure == {(h, la) for la, h in np.ndindex(3, 4) if interval.low[la, h] > 0 or interval.high[la, h] < 0}
        assert ax.get_title().endswith(": this")
    sets = mv.head_ablation(llava_vlm, inputs, "this", sets={"x": [(0, 1)], "y": [(1, 1), (2, 0)]}, draws=2)
    ax = sets.plot()
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(heights, [*sets.effect.mean(-1), *sets.control.mean((1, 2))], rtol=1e-3)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x\n1 head", "y\n2 heads"]
    plt.close("all")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"how": "noise"}, ValueError, "knows how='zero', 'mean' and 'resample', not 'noise'"),
        ({"sets": {"a": [(1, 4)]}}, IndexError, "'a' holds head 4 of layer 1; .* layers 0 to 2 with heads 0 to 3"),
        ({"sets": {"a": [(3, 0)]}}, IndexError, "'a' holds head 0 of layer 3"),
        ({"sets": {"a": [(-1, 0)]}}, IndexError, "'a' holds head 0 of layer -1"),
        ({"sets": {"a": []}}, ValueError, "The set 'a' is empty"),
        ({"sets": {}}, ValueError, "takes sets={name:"),
        ({"sets": [(1, 2)]}, ValueError, "takes sets={name:"),
        ({"sets": {"a": [3]}}, ValueError, "holds 3; a head is"),
        ({"sets": {"a": [(1, 2, 3)]}}, ValueError, r"holds \(1, 2, 3\); a head is"),
        ({"sets": {"a": [(0, 0)]}, "draws": 0}, ValueError, "draws=0 was asked for"),
        ({"positions": "sky"}, ValueError, "no positions called 'sky'"),
        ({"answers": ["a", "b"]}, mv.InputError, "2 answers were given for 1 examples"),
        ({"answers": 99999}, mv.InputError, "no token id"),
        ({"how": "resample"}, mv.InputError, "one example was given"),
    ],
)
def test_bad_ablations_are_refused(llava_vlm, options, error, says):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    with pytest.raises(error, match=says), unchecked():
        mv.head_ablation(llava_vlm, inputs, **options)
    with pytest.raises(ValueError, match="by='size'"):
        mv.head_ablation(llava_vlm, inputs, 7, positions="last").heads(by="size")
