"""What always holds of parts of a batch, and of results that are joined: however it is cut."""

from dataclasses import fields
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mechvlm as mv
from helpers.images import noise_image
from helpers.uneven import image_groups, uneven
from mechvlm.results import concat

WORDS = ["what is this", "a", "describe the scene . a what is this"]
NAMES = ["cat", "dog", "eel"]


# -- parts of a batch --


@pytest.fixture(scope="module", params=["llava_vlm", "blip_vlm"])
def three(request):
    """Three examples of different lengths; LLaVA's have 2, 1 and 3 images."""
    vlm = request.getfixturevalue(request.param)
    images = image_groups() if request.param == "llava_vlm" else [noise_image(i) for i in range(3)]
    return vlm.inputs(images, WORDS, ids=NAMES)


def same(a: mv.Inputs, b: mv.Inputs) -> None:
    assert a.encoding.keys() == b.encoding.keys()
    for key, value in a.encoding.items():
        assert torch.equal(value, b.encoding[key]), key
    assert (a.prompts, a.texts, a.images, a.ids) == (b.prompts, b.texts, b.images, b.ids)
    for here, there in zip(a.token_maps, b.token_maps, strict=True):
        assert torch.equal(here.ids, there.ids)
        assert torch.equal(here.modality, there.modality)


rows = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@given(rows=rows, data=st.data())
def test_a_part_of_a_part_is_a_part(three, rows, data):
    """Whatever order and repetitions: examples keep what is theirs."""
    again = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
    same(three[rows][again], three[[rows[i] for i in again]])
    assert three[rows].ids == tuple(NAMES[row] for row in rows)


@given(start=st.integers(-4, 4), stop=st.integers(-4, 4), step=st.sampled_from([-2, -1, 1, 2]))
def test_a_slice_means_what_it_means_for_a_list(three, start, stop, step):
    chosen = list(range(3))[start:stop:step]
    if not chosen:
        with pytest.raises(mv.InputError, match="holds no example"):
            three[start:stop:step]
        return
    same(three[start:stop:step], three[chosen])


@given(rows=rows)
def test_untrimmed_parts_keep_the_positions_of_the_whole(three, rows):
    part, whole = three.take(rows, trim=False), three.token_maps
    assert [tokens.image.tolist() for tokens in part.token_maps] == [whole[row].image.tolist() for row in rows]
    trimmed = three[rows]
    cut = len(whole[0]) - len(trimmed.token_maps[0])
    assert min(int(tokens.all[0]) for tokens in trimmed.token_maps) == 0, "no more padding than they need"
    assert [(tokens.image + cut).tolist() for tokens in trimmed.token_maps] == [
        whole[row].image.tolist() for row in rows
    ]


# -- joined results --

LENGTHS = [9, 6, 8, 11]
"""Positions of four examples; shorter ones stand behind padding."""


def flows(numbers: list[int]) -> mv.InformationFlowResult:
    """Of these examples: values by their numbers."""
    p_knocked = uneven(2, 3, 4, seed=1)[..., numbers]
    return mv.InformationFlowResult(
        p=uneven(4)[numbers], p_knocked=p_knocked, flows=("image -> last", "last -> last"),
        windows=((0, 1), (0, 2), (1, 3)), answers=tuple(f" w{i}" for i in numbers), model="m",
        example_ids=tuple(f"e{i}" for i in numbers),
    )  # fmt: skip


def norms(numbers: list[int]) -> mv.NormAttentionResult:
    """Of these examples, padded on the left to the longest of them."""
    longest = max(LENGTHS[i] for i in numbers)
    norm, value_norm = torch.zeros(2, len(numbers), 1, longest), torch.zeros(2, len(numbers), 3, longest)
    weight = torch.zeros(2, len(numbers), 3, 1, longest)
    for row, i in enumerate(numbers):
        n = LENGTHS[i]
        norm[:, row, 0, -n:] = 1 + uneven(2, n, seed=i)
        weight[:, row, :, 0, -n:] = 1 + uneven(2, 3, n, seed=i)
        value_norm[:, row, :, -n:] = 2 + uneven(2, 3, n, seed=i)
    # Each example has a destination of its own, counted from the end.
    dest = torch.tensor([[longest - 1 - i] for i in numbers])
    return mv.NormAttentionResult(norm, weight, value_norm, (0, 1), dest, ("word",), "m")


def equal(a, b) -> None:
    for field in fields(b):
        got, want = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want, field.name


@pytest.mark.parametrize("result_of", [flows, norms])
@given(order=st.permutations(range(4)), cuts=st.sets(st.integers(1, 3)), data=st.data())
def test_joined_parts_are_the_whole_however_it_is_cut(result_of, order, cuts, data):
    ends = [0, *sorted(cuts), 4]
    parts = [result_of(order[a:b]) for a, b in pairwise(ends)]
    whole = result_of(order)
    equal(concat(parts), whole)
    # Joined in two steps it is the same.
    at = data.draw(st.integers(1, len(parts)))
    first, rest = parts[:at], parts[at:]
    equal(concat([concat(first), *rest]), whole)
    assert list(accumulate(part.count_examples() for part in parts)) == ends[1:]
