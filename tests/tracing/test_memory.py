"""Batches that do not fit: which parts are tried, in which order, and what is said; by hand."""

from itertools import chain

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.tracing.memory import Failed, in_halves, over_batches


def limited(room: int, tried: list):
    """Work on a part that fits only up to `room` items, and gives them."""

    def work(part: range) -> list[int]:
        tried.append(len(part))
        if len(part) > room:
            raise torch.OutOfMemoryError("out of memory\nand more")
        return list(part)

    return work


@pytest.mark.parametrize(
    ("n", "room", "sizes"),
    [(4, 4, [4]), (5, 2, [5, 2, 3, 1, 2]), (7, 3, [7, 3, 4, 2, 2]), (3, 1, [3, 1, 2, 1, 1])],
)
def test_every_item_is_read_once_and_in_order(n, room, sizes):
    tried: list[int] = []
    parts = list(in_halves(range(n), limited(room, tried)))
    assert tried == sizes == [len(part) for part, _ in parts]
    whole = [outcome for _, outcome in parts if not isinstance(outcome, Failed)]
    assert list(chain(*whole)) == list(range(n))


def test_what_is_tried_again_and_what_is_not():
    def refuses(part: range):
        if 2 in part:
            raise KeyError("two")
        return list(part)

    parts = list(in_halves(range(4), refuses, (KeyError,)))
    failed = Failed("'two'", memory=False)
    assert parts == [
        (range(4), failed), (range(2), [0, 1]), (range(2, 4), failed), (range(2, 3), failed), (range(3, 4), [3]),
    ]  # fmt: skip
    with pytest.raises(KeyError):
        list(in_halves(range(4), refuses))
    assert list(in_halves(range(1), limited(0, []))) == [(range(1), Failed("out of memory", memory=True))]


def other(part: range):
    raise RuntimeError("The size of tensor a must match.")


def test_another_error_is_raised_at_once():
    with pytest.raises(RuntimeError, match="must match"):
        list(in_halves(range(4), other))


PROMPTS = ["a", "what is this", "a", "a", "a", "a", "is this a what", "a", "a", "a"]


@pytest.fixture(scope="module")
def batches(llava_vlm):
    return llava_vlm.inputs([noise_image(i) for i in range(10)], PROMPTS, batch_size=5)


def test_the_size_that_fitted_is_kept_and_said(llava_vlm, batches):
    tried, lengths = [], set()

    def work(inputs: mv.Inputs, numbers: range) -> list[str]:
        tried.append(len(inputs))
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("out of memory")
        assert len(numbers) == len(inputs)
        assert list(inputs.prompts) == [PROMPTS[n] for n in numbers]
        lengths.add((numbers.start >= 5, len(inputs.token_maps[0])))
        return list(numbers)

    with pytest.warns(UserWarning, match="^5 examples at once .* read 2 at a time.*batch_size=2"):
        parts = over_batches(llava_vlm, batches, work, "")
    assert tried == [5, 2, 3, 1, 2, 2, 2, 1]
    assert list(chain(*parts)) == list(range(10))
    assert lengths == {(i > 0, len(batch.token_maps[0])) for i, batch in enumerate(batches)}, "the batch's padding"


def test_an_example_without_room_is_named_by_its_number_among_all(llava_vlm, batches):
    def work(inputs: mv.Inputs, numbers: range) -> int:
        if 6 in numbers:
            raise torch.OutOfMemoryError("out of memory")
        return len(numbers)

    with pytest.raises(torch.OutOfMemoryError, match=r"^Example 6 does not fit .*even alone"):
        over_batches(llava_vlm, batches, work, "")
