"""The words of a state at a position or a patch, and the states and positions that are read."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.unchecked import unchecked


@pytest.fixture(scope="module")
def padded(llava_vlm):
    """Two examples, the second of them padded."""
    return llava_vlm.inputs([noise_image(0), noise_image(1)], ["describe the scene . what is this", "what"])


@pytest.fixture(scope="module")
def lens(llava_vlm, padded):
    return mv.logit_lens(llava_vlm, padded, k=3, positions="all", states=[1, 3])


def by_hand(vlm, inputs, example: int, state: int, position: int) -> tuple[list[str], torch.Tensor]:
    """The likeliest tokens from Hugging Face's hidden states, as its tokenizer decodes them."""
    with torch.no_grad():
        out = vlm.hf(**vlm.encoding(inputs), output_hidden_states=True)
        x = out.hidden_states[state][example, position]
        logits = out.logits[example, position] if state == vlm.n_layers else vlm.hf.lm_head(
            vlm.hf.model.language_model.norm(x)
        )  # fmt: skip
    best = logits.softmax(-1).topk(3)
    return [vlm.tokenizer.decode([i]).strip() for i in best.indices], best.values


@pytest.mark.parametrize(("example", "position"), [(0, 7), (0, -1), (1, -2)])
@pytest.mark.parametrize("state", [1, 3])
def test_words_of_a_position(llava_vlm, padded, lens, state, example, position):
    words = lens.words(state=state, position=position, example=example)
    expected, probs = by_hand(llava_vlm, padded, example, state, position)
    assert [word.strip() for word in words.index] == expected
    np.testing.assert_allclose(words.to_numpy(), probs.numpy(), atol=1e-6)
    at = position % len(padded.token_maps[0])
    assert [text.strip() for text in lens.pieces(example)[state][at]] == expected


@pytest.mark.parametrize("example", [0, 1])
def test_words_of_a_patch(llava_vlm, padded, lens, example):
    position = padded.token_maps[example].position(2, 1)
    words = lens.words(state=3, row=2, col=1, example=example)
    assert words.equals(lens.words(state=3, position=position, example=example))
    expected, _ = by_hand(llava_vlm, padded, example, 3, position)
    assert [word.strip() for word in words.index] == expected
    own = lens.of(example)
    assert own.words(state=3, row=2, col=1, example=example).equals(words)
    assert own.pieces() == lens.pieces(example)


def test_words_of_the_second_image(llava_vlm):
    prompt = "USER: <image> and <image>\nwhat is this ASSISTANT:"
    inputs = llava_vlm.inputs([[noise_image(0), noise_image(1)]], [prompt])
    lens = mv.logit_lens(llava_vlm, inputs, k=2)
    second = inputs.tokens.position(0, 3, image=1)
    assert lens.words(2, row=0, col=3, image=1).equals(lens.words(2, position=second))
    with pytest.raises(IndexError, match="row 0, col 3 of image 2 was not read"):
        lens.words(2, row=0, col=3, image=2)


@pytest.mark.parametrize(
    ("place", "error", "says"),
    [
        ({"state": 2, "position": 7}, IndexError, r"State 2 was not read; the lens holds the states \[1, 3\]"),
        ({"state": -1, "position": 7}, IndexError, "State -1 was not read"),
        ({"state": 3, "position": 99}, IndexError, r"Position 99 was not read; of example 0 the lens holds the positions \[0, 1"),
        # Position 0 is padding.
        ({"state": 3, "position": 0, "example": 1}, IndexError, "Position 0 was not read; of example 1"),
        ({"state": 3, "position": 7, "example": 2}, IndexError, r"Example \[2\] was asked for; this result holds \[0, 1\]"),
        ({"state": 3, "row": 4, "col": 0}, IndexError, r"row 4, col 0 of image 0 was not read.*\(image, row, col\)"),
        ({"state": 3, "row": -1, "col": 0}, IndexError, "row -1, col 0 of image 0 was not read"),
        ({"state": 3}, ValueError, "takes a position, or the row and col"),
        ({"state": 3, "row": 1}, ValueError, "takes a position, or the row and col"),
        ({"state": 3, "position": 7, "row": 1, "col": 1}, ValueError, "takes a position, or the row and col"),
    ],
)  # fmt: skip
def test_what_was_not_read_is_refused(lens, place, error, says):
    with pytest.raises(error, match=says):
        lens.words(**{"example": 0, **place})


def test_a_result_of_several_examples_is_asked_for_one(lens):
    with pytest.raises(ValueError, match=r"holds the examples \[0, 1\]: choose one"):
        lens.pieces()
    with pytest.raises(ValueError, match=r"holds the examples \[0, 1\]: choose one"):
        lens.words(3, 7)
    assert lens.of(1).words(3, -1).equals(lens.words(3, -1, example=1)), "one alone needs no choice"


def test_text_alone_has_no_patches(llava_vlm, padded):
    lens = mv.logit_lens(llava_vlm, padded, positions="text")
    with pytest.raises(IndexError, match="of example 0 the lens holds no \\(image, row, col\\)"):
        lens.words(3, row=0, col=0, example=0)


def test_queries_have_no_place(blip_vlm):
    inputs = blip_vlm.inputs(noise_image(0), "what is this")
    lens = mv.logit_lens(blip_vlm, inputs, k=2)
    with pytest.raises(ValueError, match=r"queries: each reads the whole image.*query_reading"):
        lens.words(1, row=0, col=0)
    assert len(lens.words(1, position=0)) == 2


def test_words_of_a_saved_lens(lens, tmp_path):
    lens.save(tmp_path / "lens.safetensors")
    loaded = mv.LogitLensResult.load(tmp_path / "lens.safetensors")
    assert loaded.words(3, row=2, col=1, example=0).equals(lens.words(3, row=2, col=1, example=0))
    assert loaded.words(3, -1, example=1).equals(lens.words(3, -1, example=1))
    older = replace(loaded, n_positions=None, cells=None)
    assert older.words(3, 7, example=0).equals(lens.words(3, 7, example=0))
    for place in ({"position": -1}, {"row": 2, "col": 1}):
        with pytest.raises(ValueError, match=r"(by|from) an earlier version"):
            older.words(3, **place, example=0)


def test_examples_and_positions_in_every_form(lens):
    both = lens.at([7, 9])
    assert set(both.position.tolist()) == {7, 9}
    for positions in (range(7, 10, 2), torch.tensor([9, 7]), np.array([7, 9])):
        assert torch.equal(lens.at(positions).ids, both.ids)
    assert torch.equal(lens.at(7).ids, lens.at([7]).ids)
    last = int(lens.position.max())
    assert torch.equal(lens.at(-1).ids, lens.at(last).ids)
    assert torch.equal(lens.of([1]).ids, lens.of(torch.tensor(1)).ids)
    assert torch.equal(lens.of(range(2)).ids, lens.ids)
    with pytest.raises(IndexError, match=r"Positions \[99\] were not read"):
        lens.at([7, 99])
    with pytest.raises(IndexError, match=r"Example \[2\] was asked for; this result holds \[0, 1\]"):
        lens.of([0, 2])


# -- the options -----------------------------------------------------------------------------------


def test_every_form_of_states_means_the_same(llava_vlm, padded):
    want = mv.logit_lens(llava_vlm, padded, states=[0, 3], positions="last")
    for states in ((3, 0), range(0, 4, 3), torch.tensor([3, 0]), np.array([0, -1]), [-1, -4], {0, 3}):
        lens = mv.logit_lens(llava_vlm, padded, states=states, positions="last")
        assert lens.states == (0, 3)
        assert torch.equal(lens.ids, want.ids)
    for state in (3, -1, np.int64(3), torch.tensor(-1)):
        assert mv.logit_lens(llava_vlm, padded, states=state, positions="last").states == (3,)


def test_the_earlier_name_of_states_is_refused(llava_vlm, padded):
    for call in (lambda: mv.LogitLens(layers=3), lambda: mv.logit_lens(llava_vlm, padded, layers=[3])):
        with unchecked(), pytest.raises(TypeError, match=r"takes states=, not layers=\."):
            call()


def test_every_form_of_positions_means_the_same(llava_vlm, padded):
    last = [tokens.last for tokens in padded.token_maps]
    want = mv.logit_lens(llava_vlm, padded, positions="last")
    per_example = [[p] for p in last]
    for positions in (
        -1,
        last[0],
        [[-1], [-1]],
        per_example,
        torch.tensor(per_example),
        np.array([-1]),
        ["last"],
        range(-1, 0),
    ):
        lens = mv.logit_lens(llava_vlm, padded, positions=positions)
        assert torch.equal(lens.ids, want.ids), positions
        assert lens.position.tolist() == last
    image = mv.logit_lens(llava_vlm, padded, positions=[m.image for m in padded.token_maps])
    assert torch.equal(image.ids, mv.logit_lens(llava_vlm, padded, positions="image").ids)


def test_a_word_is_a_position(llava_vlm, padded):
    lens = mv.logit_lens(llava_vlm, padded, positions=[["scene", "last"], ["what"]])
    scene, what = padded.token_maps[0].pos_of("scene"), padded.token_maps[1].pos_of("what")
    assert lens.of(0).position.tolist() == [*scene.tolist(), padded.token_maps[0].last]
    assert lens.of(1).position.tolist() == what.tolist()
    norms = mv.norm_attention(llava_vlm, padded, dst="what")
    assert norms.names == ("what",)
    assert norms.dest[:, 0].tolist() == [int(m.pos_of("what")[0]) for m in padded.token_maps]
    own = mv.norm_attention(llava_vlm, padded, dst=[["last", "this"], ["last", "what"]])
    assert own.names == ("last", "destination 1")
    assert own.dest[1].tolist() == [padded.token_maps[1].last, int(what[0])]
    several = mv.norm_attention(llava_vlm, padded, dst=range(-2, 0))
    assert several.dest[0].tolist() == [len(padded.token_maps[0]) - 2, len(padded.token_maps[0]) - 1]


@pytest.mark.parametrize(
    ("positions", "says"),
    [
        ([], "{} is empty"),
        (range(0), "{} is empty"),
        ([[], [1]], "{} is empty"),
        ([10, 11], r"could be these positions in every example, or one in each.*\[\[10\], \[11\]\]"),
        ([[1], [2], [3]], "3 selections were given for a batch of 2"),
        ([[5], [0]], r"{}, example 1: Positions \[0\] are not tokens of this example"),
        (99, r"Positions \[99\] are not tokens"),
        ("scene", "{}, example 1: There are no positions called 'scene'.*no such word.*It reads"),
        (torch.ones(20, dtype=torch.bool), "mask"),
        (None, "{} takes whole numbers, not None"),
    ],
)
def test_bad_positions_are_refused(llava_vlm, padded, positions, says):
    for name, probe in (("positions", mv.LogitLens(positions=positions)), ("dst", mv.NormAttention(dst=positions))):
        with pytest.raises(ValueError, match=says.format(name)):
            mv.read(llava_vlm, padded, probe)
