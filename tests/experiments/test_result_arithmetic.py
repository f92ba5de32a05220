"""Results of experiments by hand: uneven values, several margins, an object over two patches."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mechvlm as mv
from helpers.images import noise_image
from helpers.uneven import token_map, uneven
from mechvlm.errors import InputError
from mechvlm.experiments.cases import Example
from mechvlm.experiments.causal_trace import CausalTraceResult
from mechvlm.experiments.information_flow import InformationFlowResult
from mechvlm.experiments.multimodal_neurons import MultimodalNeuronsResult
from mechvlm.experiments.object_ablation import ABLATION_CONDITIONS, ObjectAblationResult, _object_positions
from mechvlm.experiments.winoground_result import PAIR_MEASURES, WinogroundResult, pair_scores
from mechvlm.inputs.grids import PatchGrid
from mechvlm.intervals import mean_interval

ANSWERS = (" a", " b", " c", " d")


def rows_of(frame: pd.DataFrame, *keys: str) -> dict[tuple, pd.Series]:
    return {key: row for key, row in frame.set_index(list(keys)).iterrows()}


# -- object ablation --


@pytest.fixture
def ablation() -> ObjectAblationResult:
    return ObjectAblationResult(
        correct=torch.tensor([True, False, True, True]), correct_ablated=uneven(3, 2, 4), p=uneven(4, seed=1),
        p_ablated=uneven(3, 2, 4, seed=2), n_tokens=torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]]),
        conditions=ABLATION_CONDITIONS, margins=(0, 2), answers=ANSWERS, model="m",
    )  # fmt: skip


def test_the_drop_is_in_percentage_points_before_less_after(ablation):
    assert ablation.drop[2, 1, 0].item() == pytest.approx(100 * (1 - ablation.correct_ablated[2, 1, 0].item()))
    assert ablation.drop[0, 1, 1].item() == pytest.approx(-100 * ablation.correct_ablated[0, 1, 1].item())
    for got, want in zip(ablation.interval, mean_interval(ablation.drop.permute(2, 0, 1)), strict=True):
        torch.testing.assert_close(got, want)
    assert ablation.interval.mean.shape == (3, 2)


def test_each_row_of_the_ablations_table(ablation):
    frame = ablation.to_frame()
    assert len(frame) == 24
    for (condition, margin, example), row in rows_of(frame, "condition", "margin", "example").items():
        c, m = ABLATION_CONDITIONS.index(condition), ablation.margins.index(margin)
        assert row["n_tokens"] == ablation.n_tokens[m, example]
        assert row["correct"] == ablation.correct[example]
        for name in ("correct_ablated", "p_ablated", "drop"):
            assert row[name] == pytest.approx(getattr(ablation, name)[c, m, example].item()), name
        assert row["p"] == pytest.approx(ablation.p[example].item())


GRID = PatchGrid(rows=3, cols=5, patch=14, image_size=(140, 84), resized=(70, 42), crop=(0, 0))
"""Patches of 28 x 28 pixels of the original."""


def object_positions(box, margins, grids=(GRID,)) -> list[list[int]]:
    inputs = SimpleNamespace(tokens=token_map("ss" + "i" * 15 * len(grids) + "t", grids))
    return _object_positions(Example(7, inputs, None), box, margins, None)


def test_a_small_object_is_the_patch_of_which_it_covers_most():
    """It lies over two patches, and covers less than half of both: 0.36 and 0.21."""
    box = (42, 28, 64, 48)  # 14 of 28 pixels in column 1, and 8 in column 2, 20 high
    assert object_positions(box, [0]) == [[2 + 5 + 1]]
    around = [2 + 5 * row + col for row in range(3) for col in range(3)]
    assert object_positions(box, [0, 1]) == [[8], around]
    # Of two patches covered alike both are the object's.
    assert object_positions((46, 28, 66, 48), [0]) == [[8, 9]]
    # A patch of which half is covered sets the measure for the others.
    assert object_positions((28, 28, 70, 48), [0]) == [[8]]
    with pytest.raises(InputError, match=r"Box \(200, 0, 220, 20\) of example 7 is not on the image"):
        object_positions((200, 0, 220, 20), [0])
    with pytest.raises(InputError, match="Example 7 holds 2 images"):
        object_positions(box, [0], (GRID, GRID))


def test_the_number_of_tokens_is_that_of_each_margin(llava_vlm):
    """4 x 4 patches of 14 pixels: a small object in the corner, and one over two patches."""
    inputs = llava_vlm.inputs([noise_image(i, (56, 56)) for i in range(2)], "what is this")
    boxes = [(0, 0, 5, 6), (14, 14, 42, 28)]
    result = mv.object_ablation(llava_vlm, inputs, boxes, "this", margins=(0, 1), draws=1)
    assert result.n_tokens.tolist() == [[1, 2], [4, 12]]
    frame = result.to_frame().query("condition == 'own'").set_index(["margin", "example"])["n_tokens"]
    assert [frame[0, 0], frame[0, 1], frame[1, 0], frame[1, 1]] == [1, 2, 4, 12]


# -- causal trace and flow --


@pytest.fixture
def trace() -> CausalTraceResult:
    return CausalTraceResult(
        p=uneven(4), p_corrupt=uneven(4, seed=1) / 3, p_restored=uneven(5, 3, 4, seed=2), groups=("image", "question", "last"),
        layers=(1, 2, 3, 4, 5), windows=tuple((i, i + 1) for i in range(5)), at="mlp_out", corrupt="noise", answers=ANSWERS,
        model="m",
    )  # fmt: skip


def test_effects_by_hand(trace):
    assert trace.effect[4, 1, 2].item() == pytest.approx((trace.p_restored[4, 1, 2] - trace.p_corrupt[2]).item())
    assert trace.total_effect[3].item() == pytest.approx((trace.p[3] - trace.p_corrupt[3]).item())
    torch.testing.assert_close(trace.interval.mean, trace.effect.mean(-1))
    frame = rows_of(trace.to_frame(), "layer", "group", "example")
    assert len(frame) == 60
    for (layer, group, example), row in frame.items():
        at = layer - 1, trace.groups.index(group), example
        assert row["p_restored"] == pytest.approx(trace.p_restored[at].item())
        assert (row["p"], row["p_corrupt"]) == pytest.approx((trace.p[example].item(), trace.p_corrupt[example].item()))
        assert row["effect"] == pytest.approx(trace.effect[at].item())


def test_changes_by_hand():
    result = InformationFlowResult(
        p=torch.tensor([0.5, 0.0, 0.2]), p_knocked=uneven(2, 4, 3), flows=("image -> last", "question -> last"),
        windows=((0, 2), (0, 3), (1, 4), (2, 4)), answers=ANSWERS[:3], model="m",
    )  # fmt: skip
    knocked = result.p_knocked
    assert result.change[1, 2, 0].item() == pytest.approx(100 * (knocked[1, 2, 0].item() - 0.5) / 0.5, rel=1e-4)
    assert result.change[0, 3, 2].item() == pytest.approx(100 * (knocked[0, 3, 2].item() - 0.2) / 0.2, rel=1e-4)
    assert result.change[..., 1].isnan().all()
    torch.testing.assert_close(result.interval.mean, result.change[..., [0, 2]].mean(-1))
    frame = rows_of(result.to_frame(), "flow", "layer", "example")
    for (flow, layer, example), row in frame.items():
        at = result.flows.index(flow), layer, example
        assert row["p_knocked"] == pytest.approx(knocked[at].item())
        assert row["p"] == pytest.approx(result.p[example].item())
        assert row["change"] == pytest.approx(result.change[at].item(), nan_ok=True)


def test_neurons_by_hand():
    result = MultimodalNeuronsResult(
        layer=torch.tensor([3, 1]), index=torch.tensor([40, 7]), attribution=uneven(4, 2), activation=uneven(4, 2, 15, seed=1),
        sign=torch.tensor([1, -1]), words=((" red", " rot"), (" blue", " blau")), answers=ANSWERS, grid=(3, 5), model="m",
    )  # fmt: skip
    assert result.maps[2, 1, 1, 3] == result.activation[2, 1, 8]
    torch.testing.assert_close(result.interval.mean, result.attribution.mean(0))
    for (rank, example), row in rows_of(result.to_frame(), "rank", "example").items():
        neuron = rank - 1
        assert (row["layer"], row["index"], row["sign"]) == ((3, 40, 1), (1, 7, -1))[neuron]
        assert row["words"] == ("red rot", "blue blau")[neuron]
        assert row["answer"] == ANSWERS[example]
        assert row["attribution"] == pytest.approx(result.attribution[example, neuron].item())
        assert row["mean_activation"] == pytest.approx(result.activation[example, neuron].mean().item())
    assert result.counted_from_0({"layer": result.layer})["layer"].tolist() == [2, 0]
    with pytest.raises(ValueError, match="do not lie on one grid"):
        _ = replace(result, grid=()).maps


# -- Winoground --


@pytest.fixture
def pairs() -> WinogroundResult:
    return WinogroundResult(uneven(5, 4, 6, 2, 2), tuple("abcdef"), (), "what is this", "m")


def test_matched_and_mismatched_by_hand(pairs):
    matched, mismatched = pairs.by_condition
    for image in (0, 1):
        assert torch.equal(matched[..., image], pairs.values[..., image, image])
        assert torch.equal(mismatched[..., image], pairs.values[..., 1 - image, image])
    assert torch.equal(pairs.logprob, pairs.values[4, 3])
    for (measure, layer, pair, image, condition), row in rows_of(
        pairs.to_frame(), "measure", "layer", "pair", "image", "condition"
    ).items():
        caption = image if condition == "matched" else 1 - image
        at = PAIR_MEASURES.index(measure), layer, "abcdef".index(pair), caption, image
        assert row["value"] == pytest.approx(pairs.values[at].item())


def test_a_pair_is_one_value_of_the_bootstrap_and_the_seed_decides(pairs):
    noisy = replace(pairs, values=pairs.values * uneven(5, 4, 6, 2, 2, seed=9).flip(2))
    v = noisy.values
    by_pair = ((v[..., 0, 0] - v[..., 1, 0]) + (v[..., 1, 1] - v[..., 0, 1])) / 2
    for seed in (0, 4):
        for got, want in zip(
            noisy.difference_by(seed), mean_interval(by_pair.permute(2, 0, 1), seed=seed), strict=True
        ):
            torch.testing.assert_close(got, want)
    assert not torch.equal(noisy.difference_by(4).low, noisy.difference_by(0).low)
    torch.testing.assert_close(noisy.difference.low, noisy.difference_by(0).low)


def test_the_scores_intervals_have_the_seed_that_was_given():
    s = torch.randn(9, 2, 2, generator=torch.Generator().manual_seed(0))
    scores = pair_scores(s)
    values = 100 * torch.stack(list(scores), -1).double()
    ends = []
    for seed in (0, 1, 2, 3):
        frame, want = scores.to_frame(seed), mean_interval(values, seed=seed)
        assert frame["low"].tolist() == want.low.tolist()
        assert frame["high"].tolist() == want.high.tolist()
        ends.append((*want.low.tolist(), *want.high.tolist()))
    assert len(set(ends)) > 1


whole = st.integers(-3, 3)  # ties among them


@given(st.lists(st.lists(whole, min_size=4, max_size=4), min_size=1, max_size=5))
def test_scores_stay_when_both_captions_and_both_images_are_swapped(values):
    s = torch.tensor(values).float().reshape(-1, 2, 2)
    scores, both = pair_scores(s), pair_scores(s.flip(1, 2))
    for a, b in zip(scores, both, strict=True):
        assert torch.equal(a, b)
    # Captions for images: text and image scores change places.
    turned = pair_scores(s.transpose(1, 2))
    assert torch.equal(turned.text, scores.image)
    assert torch.equal(turned.image, scores.text)
    wrong = pair_scores(s.flip(1))  # captions swapped alone: no pair can be right both times
    assert not (scores.text & wrong.text).any()
    for i, ((a, b), (c, d)) in enumerate(s.tolist()):
        assert scores.text[i] == (a > c and d > b)
        assert scores.image[i] == (a > b and d > c)
        assert scores.group[i] == (a > max(b, c) and d > max(b, c))
