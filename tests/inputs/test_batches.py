"""Several examples of a batch, and several batches: what they hold, and that they run the same."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers.forwards import forward
from helpers.images import noise_image
from helpers.unchecked import unchecked
from mechvlm.inputs import build as batch_module
from mechvlm.inputs.batches import Batches, by_batch

PROMPTS = ["what is this", "describe the scene . a what is this", "a", "is this a what"]
NAMES = ["cat", "dog", "eel", "fox"]


@pytest.fixture(scope="module")
def four(vlm):
    """Four examples of different lengths, with ids."""
    return vlm.inputs([noise_image(i) for i in range(4)], PROMPTS, ids=NAMES)


def same(a: mv.Inputs, b: mv.Inputs) -> None:
    """Two batches hold the same, in tensors, maps and images."""
    assert list(a.encoding) == list(b.encoding)
    assert all(torch.equal(a.encoding[key], b.encoding[key]) for key in a.encoding)
    assert (a.prompts, a.texts, a.images, a.model, a.ids) == (b.prompts, b.texts, b.images, b.model, b.ids)
    for here, there in zip(a.token_maps, b.token_maps, strict=True):
        assert torch.equal(here.ids, there.ids)
        assert torch.equal(here.modality, there.modality)
        assert (here.strings, here.grids, here.patches) == (there.strings, there.grids, there.patches)


SELECTIONS = [
    (slice(None, 2), [0, 1]), (slice(-1, None), [3]), (slice(None, None, -1), [3, 2, 1, 0]), ([2, 0], [2, 0]), ([-1], [3]),
    (-2, [2]), (np.int64(1), [1]), (np.array([3, 2]), [3, 2]), (torch.tensor([0, 2]), [0, 2]), (torch.tensor(3), [3]),
    ([True, False, False, True], [0, 3]), (np.array([False, True, False, False]), [1]),
    (torch.tensor([False, False, True, True]), [2, 3]), (range(1, 3), [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("index", "rows"), SELECTIONS)
def test_a_selection_is_the_batch_that_would_be_made_of_these_examples(vlm, four, index, rows):
    alone = vlm.inputs([noise_image(i) for i in rows], [PROMPTS[i] for i in rows], ids=[NAMES[i] for i in rows])
    same(four[index], alone)


@pytest.mark.parametrize("rows", [[0, 2], [3], [2, 1, 0]])
def test_a_selection_runs_as_rows_of_the_whole(vlm, four, rows):
    whole, part = forward(vlm, four), forward(vlm, four[rows])
    for i, row in enumerate(rows):
        here, there = part[i, four[rows].token_maps[i].all], whole[row, four.token_maps[row].all]
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)


def test_taken_with_its_padding_positions_stay(vlm, four):
    part = four.take([2], trim=False)
    assert len(part.tokens) == len(four.token_maps[2])
    assert torch.equal(part.tokens.image, four.token_maps[2].image)
    assert len(four[2].tokens) < len(part.tokens)


def test_groups_of_images_go_with_their_examples(llava_vlm):
    pictures = [noise_image(i) for i in range(6)]
    groups = [pictures[:2], pictures[2:3], pictures[3:]]
    inputs = llava_vlm.inputs(groups, ["what", "a", "is this"])
    same(inputs[2], llava_vlm.inputs([pictures[3:]], "is this"))
    same(inputs[[2, 0]], llava_vlm.inputs([pictures[3:], pictures[:2]], ["is this", "what"]))
    whole, alone = forward(llava_vlm, inputs), forward(llava_vlm, inputs[2])
    torch.testing.assert_close(alone[0, -1], whole[2, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (4, IndexError, r"Example 4 was asked for; these inputs hold 0 to 3"),
        (-5, IndexError, r"Example -5 was asked for"),
        ([0, 4, 9], IndexError, r"Examples \[4, 9\] were asked for"),
        ([True, False], IndexError, r"A mask of 2 examples was given; these inputs hold 0 to 3"),
        ([], mv.InputError, r"The selection \[\] holds no example"),
        (slice(2, 2), mv.InputError, r"holds no example"),
        ([False] * 4, mv.InputError, r"holds no example"),
        ("last", mv.InputError, r"by number, slice, list of numbers or mask, not by 'last'"),
        (1.0, mv.InputError, r"not by 1\.0"),
        ([0, True], mv.InputError, r"not by \[0, True\]"),
        (None, mv.InputError, r"not by None"),
    ],
)
def test_what_is_no_selection_is_refused(llava_vlm, index, error, message):
    inputs = llava_vlm.inputs([noise_image(i) for i in range(4)], "a")
    with pytest.raises(error, match=message):
        inputs[index]


def test_examples_are_iterated(four):
    assert [example.prompts[0] for example in four] == PROMPTS


# -- several batches -------------------------------------------------------------------------------


def test_batches_are_those_that_would_be_made_one_by_one(vlm):
    pictures = [noise_image(i) for i in range(4)]
    batches = vlm.inputs(pictures, PROMPTS, batch_size=3, ids=NAMES)
    assert isinstance(batches, mv.Batches)
    assert (len(batches), batches.n_examples, batches.sizes, batches.ids) == (2, 4, (3, 1), tuple(NAMES))
    assert repr(batches) == "Batches(4 examples in batches of 1, 3)"
    same(batches[0], vlm.inputs(pictures[:3], PROMPTS[:3], ids=NAMES[:3]))
    same(batches[-1], vlm.inputs(pictures[3:], PROMPTS[3:], ids=NAMES[3:]))
    assert [len(batch) for batch in batches] == [3, 1]
    assert (batches[1:].ids, len(batches[1:])) == (("fox",), 1)
    assert vlm.inputs(pictures, PROMPTS, batch_size=9).sizes == (4,)
    one_image = vlm.inputs(pictures[0], ["a", "what", "is"], batch_size=2)
    assert one_image[1].prompts == ("is",)
    with pytest.raises(IndexError, match="Batch 2 was asked for; there are 0 to 1"):
        batches[2]


def test_images_are_opened_when_their_batch_is_reached(llava_vlm, tmp_path):
    noise_image(0).save(tmp_path / "a.png")
    batches = llava_vlm.inputs([tmp_path / "a.png", tmp_path / "missing.png"], "a", batch_size=1)
    assert len(batches[0]) == 1
    with pytest.raises(mv.InputError, match=r"No image at .*missing\.png"):
        batches[1]


def test_wrong_numbers_and_types_are_refused_at_once(llava_vlm):
    pictures = [noise_image(0), noise_image(1)]
    for wrong, message in [
        (lambda: llava_vlm.inputs(pictures, ["a"] * 3, batch_size=2), "2 images and 3 prompts"),
        (lambda: llava_vlm.inputs(pictures, [1, 2], batch_size=2), "A prompt is a string"),
        (lambda: llava_vlm.inputs(pictures, "a", batch_size=0), "batch_size=0 was asked for"),
        (lambda: llava_vlm.inputs(pictures, "a", ids=["x"]), "1 ids were given for 2 examples"),
        (lambda: llava_vlm.inputs(pictures, "a", ids="ab"), "one name per example, not 'ab'"),
        (lambda: llava_vlm.inputs(pictures, "a", ids=[None, 1.5]), "one name per example"),
        (lambda: llava_vlm.inputs(pictures, "a", ids=5), "one name per example, not 5"),
        (lambda: llava_vlm.inputs([], "a", batch_size=2), "nothing to run"),
    ]:
        with pytest.raises(mv.InputError, match=message):
            wrong()
    assert llava_vlm.inputs(pictures, "a", ids=[7, 8]).ids == ("7", "8")


def test_errors_name_an_example_by_its_number_among_all(llava_vlm):
    batches = llava_vlm.inputs([noise_image(i) for i in range(3)], ["a", "a", "<image> <image> a"], batch_size=2)
    with pytest.raises(mv.InputError, match=r"Example 2: The prompt .* but the example has 1 images"):
        batches[1]


def test_a_trace_takes_one_batch(llava_vlm):
    batches = llava_vlm.inputs([noise_image(0), noise_image(1)], "a", batch_size=1)
    with unchecked(), pytest.raises(mv.InputError, match="A Batches was given where one forward takes one batch"):
        llava_vlm.next_tokens(batches)


def test_one_batch_is_in_memory_at_a_time(llava_vlm, monkeypatch):
    alive: list[weakref.ref] = []
    collate = batch_module._collate

    def watched(*args):
        gc.collect()
        assert sum(ref() is not None for ref in alive) == 0, "an earlier batch is still held"
        made = collate(*args)
        alive.append(weakref.ref(made[0]["pixel_values"]))
        return made

    monkeypatch.setattr(batch_module, "_collate", watched)
    batches = llava_vlm.inputs([noise_image(i) for i in range(4)], "a", batch_size=1)
    mv.read(llava_vlm, batches, mv.LogitLens(k=1), mv.Contextualization(), mv.NormAttention(dst="last"))
    assert len(alive) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_and_pickles_hold_the_same(vlm, four, copied):
    _ = four.token_maps[0].image  # cached on the map
    same(copied(four), four)
    same(copied(four)[1:3], four[1:3])
    batches = vlm.inputs([noise_image(i) for i in range(4)], PROMPTS, batch_size=3, ids=NAMES)
    again = copied(batches)
    assert (again.ids, again.sizes) == (batches.ids, batches.sizes)
    for a, b in zip(again, batches, strict=True):
        same(a, b)


def test_an_answered_batch_keeps_ids_and_is_sliced(vlm, four):
    answered, lengths = vlm.answered(four, ["a", "what is", "this", "scene ."])
    assert answered.ids == four.ids
    alone, (length,) = vlm.answered(four[1], ["what is"])
    same(answered[1], alone)
    assert length == lengths[1]


def test_answers_go_to_the_batch_of_their_example(llava_vlm):
    pictures = [noise_image(i) for i in range(4)]
    uneven = Batches([llava_vlm.inputs(pictures[a:b], "a") for a, b in ((0, 1), (1, 3), (3, 4))])
    assert by_batch(uneven, ["p", "q", "r", "s"]) == [["p"], ["q", "r"], ["s"]]
    assert by_batch(uneven, torch.tensor([4, 5, 6, 7])) == [[4], [5, 6], [7]]
    assert by_batch(uneven, "p") == ["p"] * 3
    assert by_batch(uneven, None) == [None] * 3
    for wrong in (["p", "q", "r"], ["p"] * 5):
        with pytest.raises(mv.InputError, match=f"{len(wrong)} answers were given for 4 examples"):
            by_batch(uneven, wrong)
