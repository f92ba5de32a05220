"""Patch grids: against Hugging Face's forward with hooks, and a head made to copy one patch."""

import warnings

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers.artists import note_of
from helpers.copying import HEAD, LAYER, PATCH, copying, picture
from helpers.forwards import decoder_of
from helpers.images import noise_image
from helpers.unchecked import unchecked
from mechvlm.experiments.patch_grid import _joined_labels

WIDTH = 8
"""Of a head, in the tiny models."""
PROMPTS = ["what is this", "describe the scene . a what is this"]


@pytest.fixture(scope="module")
def pair(vlm):
    """Two examples clean, and the same questions of other pictures."""
    return vlm.inputs([noise_image(0), noise_image(1)], PROMPTS), vlm.inputs([noise_image(5), noise_image(6)], PROMPTS)


def module_of(vlm, layer, at):
    """The module of Hugging Face's layer, and whether the site is what enters it."""
    block = decoder_of(vlm).layers[layer]
    return {
        "resid_pre": (block, True), "attn_out": (block.self_attn, False), "mlp_out": (block.mlp, False),
        "z": (block.self_attn.o_proj, True),
    }[at]  # fmt: skip


def hooked(module, entering, work):
    """A plain hook: `work` on what enters or leaves a module. It may return None to leave it."""

    def enter(_, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        new = work(x)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def leave(_, args, out):
        new = work(out[0] if isinstance(out, tuple) else out)
        return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

    if entering:
        return module.register_forward_pre_hook(enter, with_kwargs=True)
    return module.register_forward_hook(leave)


@torch.no_grad()
def logits_of(vlm, example, layer, at, work=lambda x: None):
    handle = hooked(*module_of(vlm, layer, at), work)
    try:
        return vlm.hf(**vlm.encoding(example)).logits[0, -1]
    finally:
        handle.remove()


def patched(vlm, clean, corrupted, layer, at, pos, channels=slice(None)):
    """The corrupted example's logits with the clean activation at `pos`, by two forwards."""
    kept = []
    logits_of(vlm, clean, layer, at, lambda x: kept.append(x.clone()))

    def put(x):
        x = x.clone()
        x[:, pos, channels] = kept[0][:, pos, channels]
        return x

    return logits_of(vlm, corrupted, layer, at, put)


@pytest.mark.parametrize("at", ["resid_pre", "attn_out", "mlp_out"])
def test_a_grid_of_positions_equals_forwards_with_hooks(vlm, pair, at):
    clean, corrupted = pair
    grid = mv.patch_grid(
        vlm, clean, corrupted, 7, versus=9, at=at, positions=["image", "what", "question + last", "last"]
    )
    assert grid.columns == ("image", "what", "question + last", "last")
    for i in range(2):
        tokens = clean[i].tokens
        columns = [tokens.image, tokens.pos_of("what"), torch.cat([tokens.question, tokens.all[-1:]]), tokens.all[-1:]]
        ends = [logits_of(vlm, inputs[i], 0, at) for inputs in pair]
        assert float(grid.m_clean[i]) == pytest.approx(float(ends[0][7] - ends[0][9]), abs=1e-5)
        assert float(grid.m_corrupted[i]) == pytest.approx(float(ends[1][7] - ends[1][9]), abs=1e-5)
        layer = (0, 2)[i]
        for column, pos in enumerate(columns):
            logits = patched(vlm, clean[i], corrupted[i], layer, at, pos)
            assert float(grid.m_patched[layer, column, i]) == pytest.approx(float(logits[7] - logits[9]), abs=1e-5)


def test_a_grid_of_heads_equals_forwards_with_hooks_by_every_metric(vlm, pair):
    clean, corrupted = pair

    def second(logits):
        return float(logits.topk(2).values[1])

    def kl(logits, ends):
        p, q = (x.double().softmax(-1) for x in (ends[0], logits))
        return float((p * (p / q).log()).sum())

    naive = {
        "logit_diff": lambda logits, _: float(logits[7] - logits[9]),
        "probability": lambda logits, _: float(logits.softmax(-1)[7]),
        "kl": kl,
        second: lambda logits, _: float(logits.sort().values[-2]),
    }
    options = {"logit_diff": {"answers": 7, "versus": 9}, "probability": {"answers": 7}}
    ends = [logits_of(vlm, inputs[1], 0, "z") for inputs in pair]
    some = {(0, 1): None, (1, 3): None, (2, 0): None}
    for layer, head in some:
        own = slice(head * WIDTH, (head + 1) * WIDTH)
        some[layer, head] = patched(vlm, clean[1], corrupted[1], layer, "z", slice(None), own)
    for metric, measure in naive.items():
        grid = mv.patch_grid(vlm, clean[1], corrupted[1], at="z", metric=metric, **options.get(metric, {}))
        assert grid.columns == ("0", "1", "2", "3")
        m_clean, m_corrupted = (measure(logits, ends) for logits in ends)
        scale = abs(m_clean - m_corrupted)
        assert float(grid.m_clean[0]) == pytest.approx(m_clean, abs=1e-2 * scale)
        assert float(grid.m_corrupted[0]) == pytest.approx(m_corrupted, abs=1e-2 * scale)
        for (layer, head), logits in some.items():
            share = (measure(logits, ends) - m_corrupted) / (m_clean - m_corrupted)
            assert float(grid.restored[layer, head, 0]) == pytest.approx(share, abs=1e-2), metric
    assert grid.metric == "second"
    assert mv.patch_grid(vlm, clean[1], corrupted[1], at="z", metric="kl").m_clean == 0


def test_heads_are_patched_at_the_positions_asked_for(vlm, pair):
    clean, corrupted = pair[0][1], pair[1][1]
    grid = mv.patch_grid(vlm, clean, corrupted, 7, versus=9, at="z", positions="last")
    assert grid.positions == "last"
    logits = patched(vlm, clean, corrupted, 1, "z", slice(-1, None), slice(2 * WIDTH, 3 * WIDTH))
    assert float(grid.m_patched[1, 2, 0]) == pytest.approx(float(logits[7] - logits[9]), abs=1e-5)


# -- by construction --


@pytest.fixture(scope="module")
def copier():
    return copying()


@pytest.fixture(scope="module")
def colors(copier):
    return [
        copier.inputs([picture(color), picture(color, "yellow")], "what is this", ids=["grey", "yellow"])
        for color in ("red", "blue")
    ]


@pytest.mark.parametrize("metric", ["logit_diff", "probability", "kl"])
def test_the_head_that_copies_brings_the_answer_back(copier, colors, metric):
    grid = mv.patch_grid(copier, *colors, at="z", metric=metric)
    assert (grid.answers, grid.versus) == ((" red",) * 2, (" blue",) * 2)
    want = torch.zeros(3, 4, 2)
    want[LAYER, HEAD] = 1
    torch.testing.assert_close(grid.restored, want, rtol=0, atol=1e-5)
    assert grid.strongest(top=1)[["layer", "column"]].to_numpy().tolist() == [[LAYER, str(HEAD)]]


def test_the_divergence_is_that_of_the_clean_distribution_from_the_other(copier):
    """The clean one is sure of "red": what is left is -log of the other's probability of it."""
    red, grey = (copier.inputs(picture(color), "what is this") for color in ("red", "grey"))
    grid = mv.patch_grid(copier, red, grey, at="z", metric="kl", positions="last")
    token = int(copier.answer_tokens(red, "red"))
    surprise = -float(logits_of(copier, grey, 0, "z").log_softmax(-1)[token])
    assert float(grid.m_corrupted[0]) == pytest.approx(surprise, abs=1e-4)
    assert float(grid.m_patched[LAYER, HEAD, 0]) == pytest.approx(0, abs=1e-5)


def test_the_answer_is_at_the_patch_below_the_head_and_at_the_end_above_it(copier, colors):
    tokens = colors[0][0].tokens
    patch = int(tokens.image[PATCH])
    grid = mv.patch_grid(copier, *colors, positions=[patch, "image", int(tokens.image[0]), "what", "last"])
    assert grid.columns == (str(patch), "image", str(int(tokens.image[0])), "what", "last")
    want = torch.zeros(3, 5)
    want[: LAYER + 1, :2] = 1  # state l is what layer l reads
    want[LAYER + 1 :, 4] = 1
    torch.testing.assert_close(grid.restored, want[..., None].expand(-1, -1, 2), rtol=0, atol=1e-5)
    written = mv.patch_grid(copier, *colors, at="attn_out", positions=["image", "last"]).restored
    want = torch.zeros(3, 2)
    want[LAYER, 1] = 1
    torch.testing.assert_close(written, want[..., None].expand(-1, -1, 2), rtol=0, atol=1e-5)
    assert mv.patch_grid(copier, *colors, at="mlp_out", positions=["image", "last"]).restored.abs().max() == 0


def test_every_token_is_a_column_and_the_image_is_one(copier, colors):
    grid = mv.patch_grid(copier, *colors)
    tokens = colors[0][0].tokens
    before = int(tokens.image[0])
    assert len(grid.columns) == len(tokens) - len(tokens.image) + 1
    assert grid.columns.index("image") == before
    assert len(set(grid.columns)) == len(grid.columns)
    words = [column.strip() for column in grid.columns]
    assert [word for word in words if word in ("what", "is", "this")] == ["what", "is", "this"]
    brought = {(layer, grid.columns[c]) for layer, c in (grid.restored[..., 0] > 0.5).nonzero().tolist()}
    assert brought == {(0, "image"), (1, "image"), (2, grid.columns[-1])}
    best = grid.strongest(top=4)
    assert list(zip(best.layer, best.column, strict=True))[:3] == [(0, "image"), (1, "image"), (2, grid.columns[-1])]
    assert best.restored.tolist() == pytest.approx([1, 1, 1, 0], abs=1e-5)


def test_noising_is_denoising_with_both_exchanged(copier, colors):
    """The head is all that the answer needs: without it, the metric is the other one's."""
    red, blue = colors
    noised = mv.patch_grid(copier, blue, red, "red", versus="blue", at="z")
    torch.testing.assert_close(noised.m_corrupted, mv.patch_grid(copier, red, blue, at="z").m_clean)
    assert noised.restored[LAYER, HEAD].tolist() == pytest.approx([1, 1], abs=1e-5)


def test_examples_that_agree_have_nothing_to_bring_back(copier):
    """Another background, the same color: inputs differ, and the metric does not."""
    clean = copier.inputs([picture("red"), picture("red")], "what is this")
    other = copier.inputs([picture("red", "yellow"), picture("blue")], "what is this")
    with pytest.warns(UserWarning, match=r"the same logit difference in the examples \[0\]"):
        grid = mv.patch_grid(copier, clean, other, "red", versus="blue", at="z")
    assert grid.alike.tolist() == [True, False]
    assert grid.restored[..., 0].isnan().all()
    assert grid.interval.mean[LAYER, HEAD] == pytest.approx(1, abs=1e-5)
    ax = grid.plot()
    assert "n = 1 of 2 examples" in note_of(ax)


# -- results and refusals --


def test_tables_files_and_joined_results(copier, colors, tmp_path):
    red, blue = colors
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid = mv.patch_grid(copier, red, blue, at="z")
    row = grid.to_frame().set_index(["layer", "column", "id"]).loc[(LAYER, str(HEAD), "yellow")]
    assert row.m_patched == pytest.approx(float(grid.m_patched[LAYER, HEAD, 1]))
    assert (row.m_clean, row.m_corrupted) == pytest.approx((float(grid.m_clean[1]), float(grid.m_corrupted[1])))
    assert row.restored == pytest.approx(1)
    grid.save(tmp_path / "g.safetensors")
    assert mv.PatchGridResult.load(tmp_path / "g.safetensors").to_frame().equals(grid.to_frame())
    joined = mv.concat([mv.patch_grid(copier, red[i], blue[i], at="z") for i in range(2)])
    torch.testing.assert_close(joined.m_patched, grid.m_patched, rtol=1e-5, atol=1e-5)
    assert joined.answers == grid.answers
    assert joined.example_ids == ("grey", "yellow")


def test_the_plot_shows_the_means(copier, colors):
    for at in ("z", "resid_pre"):
        grid = mv.patch_grid(copier, *colors, at=at)
        ax = grid.plot()
        drawn = np.asarray(ax.collections[0].get_array()).reshape(grid.m_patched.shape[:2])
        np.testing.assert_allclose(drawn, grid.restored.mean(-1), atol=1e-5)
        assert "red less blue" in ax.get_title()
    assert [label.get_text() for label in ax.get_xticklabels()][-1] == ": (2)"


def test_labels_of_columns():
    assert _joined_labels([[" a", " b", " a"], [" a", " c", " a"]]) == (" a", " b/ c", " a (2)")
    assert _joined_labels([["x", "x", "x"]]) == ("x", "x (2)", "x (3)")
    assert _joined_labels([["x (2)", "x", "x"]]) == ("x (2)", "x", "x (3)")
    assert len(set(_joined_labels([[str(i % 3) for i in range(9)]]))) == 9


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"at": "q"}, ValueError, "no site 'q' to patch. Sites: resid_pre, attn_out, mlp_out, z"),
        ({"metric": "loss"}, ValueError, "no metric 'loss': logit_diff, probability, kl, or a function"),
        ({"metric": "kl", "answers": 7}, ValueError, "`answers` was given, and metric='kl' does not look at it"),
        ({"metric": "probability", "versus": 7}, ValueError, "`versus` was given"),
        ({"answers": 7, "versus": 7}, mv.InputError, r"the same answer clean and corrupted \(token 7\)"),
        ({"answers": ["a", "b", "c"]}, mv.InputError, "3 answers were given for 2 examples"),
        ({"answers": 10**6}, mv.InputError, "is no token id"),
        ({"positions": ["sky"]}, ValueError, "no positions called 'sky'"),
        ({"positions": []}, ValueError, "was given no positions"),
        ({"positions": ["last"], "at": "z"}, ValueError, "the columns are the heads, and `positions` is one name"),
        ({"positions": [999]}, ValueError, r"Positions \[999\] are not tokens of this example"),
        ({}, mv.InputError, r"Example 1 has \d+ columns of positions and example 0 has \d+: give `positions` by names"),
    ],
)
def test_bad_grids_are_refused(llava_vlm, options, error, says):
    clean, corrupted = (llava_vlm.inputs([noise_image(i), noise_image(i + 1)], PROMPTS) for i in (0, 2))
    options = {"answers": 7, "versus": 9} | options if "metric" not in options else options
    with pytest.raises(error, match=says), unchecked():
        mv.patch_grid(llava_vlm, clean, corrupted, **options)


def test_examples_that_do_not_match_are_refused(llava_vlm):
    short, long = (llava_vlm.inputs(noise_image(0), prompt) for prompt in PROMPTS)
    with pytest.raises(mv.InputError, match=rf"Example 0 has {len(short.tokens)} tokens clean and {len(long.tokens)}"):
        mv.patch_grid(llava_vlm, short, long)
    with pytest.raises(mv.InputError, match="Example 0 is the same clean and corrupted: there is nothing to patch"):
        mv.patch_grid(llava_vlm, short, short, 7, versus=9)
    with pytest.raises(mv.InputError, match="1 clean examples and 2 corrupted ones were given"):
        mv.patch_grid(llava_vlm, short, [short, short])
    moved = llava_vlm.inputs(noise_image(1), "USER: a <image>\nwhat is ASSISTANT:")
    first = llava_vlm.inputs(noise_image(0), "USER: <image>\na what is ASSISTANT:")
    assert len(moved.tokens) == len(first.tokens)
    with pytest.raises(mv.InputError, match="images in other places clean and corrupted"):
        mv.patch_grid(llava_vlm, first, moved)
