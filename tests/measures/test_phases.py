"""Phases: the fit against every set of boundaries, and simulated curves with known segments."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy.optimize import isotonic_regression

from mechvlm.measures import phase_fit
from mechvlm.measures.phase_fit import fit_phases
from mechvlm.measures.phases import Phases
from mechvlm.measures.segments import fit_segments, interval_errors, n_large_segments

FOUR = ("I alignment", "II intra-modal encoding", "III inter-modal encoding", "IV output preparation")
ORDER = {"rise": ("rise", "fall") * 6, "fall": ("fall", "rise") * 6}


def piecewise(turns: dict[int, float]) -> np.ndarray:
    """Straight lines between {layer: value}."""
    return np.interp(np.arange(max(turns) + 1), list(turns), list(turns.values()))


# I to IV over 0-3, 3-8, 8-14, 14-16.
TURNS = {0: 0.1, 3: 0.3, 8: 0.1, 14: 0.4, 16: 0.2}


def examples(truth: np.ndarray, n: int = 60, noise: float = 0.05, seed: int = 0) -> np.ndarray:
    """Curves around a truth: each example has an offset of its own, and each layer has noise."""
    rng = np.random.default_rng(seed)
    return truth + 0.1 * rng.normal(size=(n, 1)) + noise * rng.normal(size=(n, len(truth)))


def monotone_error(values: np.ndarray, direction: str) -> float:
    fit = isotonic_regression(values, increasing=direction == "rise").x
    return float(((values - fit) ** 2).sum())


def brute_force(curve: np.ndarray, n_segments: int, first: str) -> float:
    """The least error over every way to cut the layers into `n_segments` runs."""
    return min(
        sum(
            monotone_error(curve[start:stop], direction)
            for start, stop, direction in zip((0, *cuts), (*cuts, len(curve)), ORDER[first], strict=False)
        )
        for cuts in combinations(range(1, len(curve)), n_segments - 1)
    )


# --- the fit ---


def test_worked_values():
    # Rise to 3 and fall. Only the fall has a violation, 1 then 2: they pool to 1.5 each, at an
    # error of 2 x 0.5².
    segments = fit_segments(np.array([0.0, 3.0, 1.0, 2.0, 0.0]), 2, "rise")
    assert segments.turning_layers == (1,)
    assert segments.directions == ("rise", "fall")
    assert segments.fit.tolist() == [0, 3, 1.5, 1.5, 0]
    assert segments.error == pytest.approx(0.5)


def test_segments_share_their_turning_layer():
    assert fit_segments(piecewise(TURNS), 4, "rise").turning_layers == (3, 8, 14)
    assert fit_segments(-piecewise(TURNS), 4, "fall").turning_layers == (3, 8, 14)
    assert fit_segments(np.array([0.0, 1.0, 0.0, 1.0]), 3, "rise").turning_layers == (1, 2)


def test_one_segment_is_isotonic_regression():
    curve = np.random.default_rng(0).normal(size=20)
    assert fit_segments(curve, 1, "rise").fit == pytest.approx(isotonic_regression(curve).x)
    assert fit_segments(curve, 1, "fall").fit == pytest.approx(isotonic_regression(curve, increasing=False).x)


def test_a_segment_that_the_curve_does_not_have_gets_no_step():
    segments = fit_segments(np.arange(6.0), 3, "rise")
    assert segments.error == 0
    assert segments.turning_layers[0] == segments.turning_layers[1]


def test_every_interval_equals_isotonic_regression():
    curve = np.random.default_rng(1).normal(size=9)
    for direction, errors in interval_errors(curve[None]).items():
        for start in range(9):
            for end in range(start, 9):
                expected = monotone_error(curve[start : end + 1], direction)
                assert errors[0, start, end] == pytest.approx(expected, abs=1e-12)


# Whole numbers give ties.
values = st.one_of(st.integers(-3, 3).map(float), st.floats(-1, 1, width=32))


@given(st.lists(values, min_size=4, max_size=8), st.integers(1, 3), st.sampled_from(["rise", "fall"]))
@settings(deadline=None, max_examples=100)
def test_the_fit_is_the_best_of_all_boundaries(curve, n_segments, first):
    curve = np.array(curve)
    segments = fit_segments(curve, n_segments, first)
    assert segments.error == pytest.approx(brute_force(curve, n_segments, first), abs=1e-9)
    assert segments.error == pytest.approx(((curve - segments.fit) ** 2).sum(), abs=1e-9)
    # Between turning layers the fit has no step against the segment's direction.
    edges = [0, *segments.turning_layers, len(curve) - 1]
    assert edges == sorted(edges)
    for start, end, direction in zip(edges, edges[1:], segments.directions, strict=False):
        steps = np.diff(segments.fit[start : end + 1])
        assert ((steps if direction == "rise" else -steps) >= -1e-12).all()


@given(st.lists(values, min_size=5, max_size=12), st.floats(0.5, 3), st.floats(-2, 2))
@settings(deadline=None, max_examples=50)
def test_the_error_scales_and_more_segments_fit_no_worse(curve, scale, shift):
    curve = np.array(curve)
    errors = [fit_segments(curve, n, "rise").error for n in (1, 2, 3, 4)]
    # A run may be a single layer, which is both a rise and a fall, so one more run fits no worse.
    assert all(more <= fewer + 1e-9 for fewer, more in pairwise(errors))
    assert fit_segments(scale * curve + shift, 2, "rise").error == pytest.approx(scale**2 * errors[1], abs=1e-6)
    assert fit_segments(-curve, 2, "fall").error == pytest.approx(errors[1], abs=1e-9)


# --- how many segments, and which ---


@pytest.mark.parametrize(
    ("turns", "directions", "labels", "says"),
    [
        (TURNS, ("rise", "fall", "rise", "fall"), FOUR, "the paper's four phases, in its order"),
        ({0: 0.4, 8: 0.1, 14: 0.4, 16: 0.2}, ("fall", "rise", "fall"), FOUR[1:], "phase I does not show"),
        ({0: 0.1, 4: 0.3, 8: 0.1, 16: 0.4}, ("rise", "fall", "rise"), FOUR[:3], "phase IV does not show"),
        ({0: 0.1, 8: 0.4, 16: 0.1}, ("rise", "fall"), (None,) * 2, "I and II or III and IV"),
        ({0: 0.4, 8: 0.1, 16: 0.4}, ("fall", "rise"), (None,) * 2, "any dip"),
        ({0: 0.1, 16: 0.4}, ("rise",), (None,), "no turn"),
        ({0: 0.4, 16: 0.1}, ("fall",), (None,), "no turn"),
        ({0: 0.3, 16: 0.3}, (), (), "neither rises nor falls"),
        ({0: 0.4, 3: 0.1, 8: 0.4, 12: 0.1, 16: 0.4}, ("fall", "rise") * 2, (None,) * 4, "not the paper's four"),
        (
            {0: 0.4, 3: 0.1, 6: 0.4, 9: 0.1, 12: 0.4, 16: 0.1},
            ("fall", "rise", "fall", "rise", "fall"),
            (None,) * 5,
            "Segments 2 to 5 alone would go in its order",
        ),
    ],
)
def test_known_segments_are_found_and_not_forced_into_four(turns, directions, labels, says):
    phases = fit_phases(examples(piecewise(turns)), n_bootstrap=200)
    assert phases.directions == directions
    assert phases.labels == labels
    assert phases.shows_pattern == (labels == FOUR)
    assert says in phases.explanation
    assert phases.support > 0.8
    assert phases.boundaries == pytest.approx(list(turns)[1:-1], abs=1)
    assert [candidate.n_segments for candidate in phases.evidence if candidate.chosen] == [len(directions)]


RIPPLED = {0: 0.1, 5: 0.35, 9: 0.31, 16: 0.5}
"""A rise with a dip of 0.04 of its range 0.4, which is 10 %."""


@pytest.mark.parametrize(("min_turn", "directions"), [
    (0, ("rise", "fall", "rise")), (0.08, ("rise", "fall", "rise")), (0.12, ("rise",)), (0.2, ("rise",)), (1, ("rise",)),
])  # fmt: skip
def test_small_turns_do_not_count_however_sure(min_turn, directions):
    phases = fit_phases(examples(piecewise(RIPPLED), noise=0.002), min_turn=min_turn, n_bootstrap=20)
    assert phases.directions == directions
    assert phases.min_turn == min_turn
    assert ("3 segments predict held-out examples better" in phases.explanation) == (len(directions) == 1)
    assert [e.n_segments for e in phases.evidence if e.of_any_size] == [3]
    (dip,) = [e.smallest_turn for e in phases.evidence if (e.n_segments, e.first) == (3, "rise")]
    assert dip == pytest.approx(0.1, abs=0.01)


def test_a_ripple_on_four_phases_leaves_four():
    """Sure turns of a tenth everywhere, on larger ones: without a smallest turn, no pattern."""
    curves = examples(piecewise(TURNS), noise=0.001)
    ripple = curves + 0.03 * (-1.0) ** np.arange(17)
    assert fit_phases(ripple, n_bootstrap=20).labels == FOUR
    assert not fit_phases(ripple, min_turn=0, n_bootstrap=20).shows_pattern


@pytest.mark.parametrize("most", [5, 7, 9])
def test_the_verdict_does_not_hang_on_how_many_are_tried(monkeypatch, most):
    monkeypatch.setattr(phase_fit, "MOST_SEGMENTS", most)
    curves = examples(piecewise(TURNS), noise=0.001) + 0.03 * (-1.0) ** np.arange(17)
    assert fit_phases(curves, n_bootstrap=20).labels == FOUR
    zigzag = piecewise({layer: 0.4 * (layer // 2 % 2) for layer in range(0, 17, 2)})
    assert not fit_phases(examples(zigzag), n_bootstrap=10).shows_pattern


@pytest.mark.long
@pytest.mark.parametrize("kind", ["layers", "walk", "exactly flat"])
@pytest.mark.parametrize("n_examples", [5, 100])
def test_noise_shows_no_phases(kind, n_examples):
    rng = np.random.default_rng(0)
    numbers = []
    for _ in range(10):
        noise = rng.normal(size=(n_examples, 17))
        curves = {"layers": noise, "walk": noise.cumsum(1), "exactly flat": np.full_like(noise, 0.3)}[kind]
        phases = fit_phases(curves, n_bootstrap=2)
        numbers.append(phases.n_segments)
        assert not phases.shows_pattern
    assert sum(n > 0 for n in numbers) <= 1
    assert max(numbers) <= 1


@pytest.mark.long
def test_intervals_cover_the_truth_at_about_the_nominal_rate():
    truth = np.array(list(TURNS)[1:-1])
    hits, widths = [], []
    for seed in range(40):
        phases = fit_phases(examples(piecewise(TURNS), 40, noise=0.1, seed=seed), n_bootstrap=50, confidence=0.9)
        if phases.n_segments == 4:
            low, high = np.array(phases.boundary_intervals).T
            hits.append((low <= truth) & (truth <= high))
            widths.append(high - low)
    assert len(hits) >= 32
    # The intervals are whole layers, rounded outwards, so they cover at least the nominal rate,
    # less three standard errors of 40 trials. They must not do so by being wide.
    assert (np.mean(hits, axis=0) > 0.9 - 3 * math.sqrt(0.09 / 40)).all()
    assert np.mean(widths) < 3


def test_changes_are_those_of_the_mean_with_plain_bootstrap_intervals():
    inter = examples(piecewise(TURNS), noise=0.02)
    image = examples(piecewise({0: 0.2, 3: 0.2, 8: 0.6, 14: 0.6, 16: 0.3}), noise=0.02, seed=1)
    text = examples(np.full(17, 0.5), noise=0.02, seed=2)
    phases = fit_phases(inter, image=image, text=text)
    for name, curves in (("inter", inter), ("image", image), ("text", text)):
        for change, (first, last) in zip(phases.changes[name], phases.intervals, strict=True):
            steps = curves[:, last] - curves[:, first]
            assert change.value == pytest.approx(steps.mean())
            half = 1.96 * steps.std() / math.sqrt(len(steps))
            assert (change.low, change.high) == pytest.approx((steps.mean() - half, steps.mean() + half), abs=half / 4)
    assert [change.direction for change in phases.changes["image"]][1::2] == ["rise", "fall"]
    assert "In phase II the similarity within the image rose (+0.39" in phases.explanation
    assert "In phase IV the similarity within the text did not clearly change" in phases.explanation


def test_the_frame():
    phases = fit_phases(examples(piecewise(TURNS), noise=0.02), image=examples(piecewise(TURNS), seed=3))
    frame = phases.to_frame()
    assert frame["phase"].tolist() == ["I", "II", "III", "IV"]
    assert frame["name"].tolist() == [label.split(" ", 1)[1] for label in FOUR]
    assert frame["direction"].tolist() == ["rise", "fall", "rise", "fall"]
    assert frame["first_state"].tolist() == [0, 3, 8, 14]
    assert frame["last_state"].tolist() == [3, 8, 14, 16]
    assert (frame["low"] <= frame["last_state"])[:3].all()
    assert (frame["high"] >= frame["last_state"])[:3].all()
    assert frame[["low", "high"]].iloc[3].isna().all()
    assert (np.sign(frame["change"]) == [1, -1, 1, -1]).all()
    assert {"image_change", "image_change_low", "image_change_high"} <= set(frame)
    flat = fit_phases(np.full((4, 5), 0.2)).to_frame()
    assert flat.empty
    assert list(flat)[:7] == list(frame)[:7]


def test_phases_are_saved_and_loaded(tmp_path):
    phases = fit_phases(examples(piecewise(TURNS)), n_bootstrap=50)
    phases.save(tmp_path / "phases.safetensors")
    loaded = Phases.load(tmp_path / "phases.safetensors")
    assert torch.equal(loaded.mean, phases.mean)
    assert loaded.evidence == phases.evidence
    assert loaded.changes == phases.changes
    assert loaded.to_frame().equals(phases.to_frame())


def test_the_same_seed_gives_the_same_and_tensors_equal_arrays():
    curves = examples(piecewise(TURNS), 20)
    of_array = fit_phases(curves, n_bootstrap=50)
    of_tensor = fit_phases(torch.from_numpy(curves).requires_grad_(), n_bootstrap=50)
    assert of_array.boundary_intervals == of_tensor.boundary_intervals
    assert of_array.evidence == of_tensor.evidence
    assert of_array.explanation == of_tensor.explanation


def test_an_offset_per_example_changes_nothing():
    curves = examples(piecewise(TURNS), 20)
    offsets = np.random.default_rng(5).normal(size=(20, 1))
    plain, shifted = fit_phases(curves, n_bootstrap=50), fit_phases(curves + offsets, n_bootstrap=50)
    assert plain.boundaries == shifted.boundaries
    assert [e.error for e in plain.evidence] == pytest.approx([e.error for e in shifted.evidence])


def test_one_example_gets_a_fit_but_no_interval_and_no_name():
    phases = fit_phases(piecewise(TURNS)[None])
    assert phases.boundaries == (3, 8, 14)
    assert phases.directions == ("rise", "fall", "rise", "fall")
    assert phases.labels == (None,) * 4
    assert not phases.shows_pattern
    assert np.isnan(phases.boundary_intervals).all()
    assert np.isnan([[change.low, change.high] for change in phases.changes["inter"]]).all()
    assert math.isnan(phases.support)
    assert "two examples" in phases.explanation
    assert fit_phases(np.full((1, 5), 0.3)).n_segments == 0


@pytest.mark.parametrize("seed", range(5))
def test_rounding_does_not_decide_between_equally_good_numbers(seed):
    offsets = np.random.default_rng(seed).normal(size=(12, 1))
    assert fit_phases(piecewise(TURNS) + offsets, n_bootstrap=10).boundaries == (3, 8, 14)


def test_two_examples_and_three_layers_are_enough():
    phases = fit_phases(np.array([[0.1, 0.5, 0.1], [0.1, 0.52, 0.11]]), n_bootstrap=50)
    assert phases.directions == ("rise", "fall")
    assert phases.boundary_intervals == ((1.0, 1.0),)


def test_as_many_segments_are_tried_as_the_curve_has():
    zigzag = piecewise({layer: 0.4 * (layer // 2 % 2) for layer in range(0, 21, 2)})
    phases = fit_phases(examples(zigzag), n_bootstrap=10)
    assert phases.n_segments == 10
    assert "10 segments, more than the paper's four" in phases.explanation


@pytest.mark.parametrize(("curve", "share", "n"), [
    ([0, 1, 0.9, 1, 0.4], 0.2, 2), ([0, 1, 0.9, 1, 0.4], 0.09, 4), ([0, 1, 0.9, 1, 0.4], 0.7, 1), ([0.3] * 4, 0.2, 0),
    ([0.3] * 4, 0, 0), ([1, 0.9, 2, 0], 0.2, 2), ([1, 0.9, 2, 0], 0.04, 3), ([0, 1, 0, 1, 0], 0, 4), ([2, 2, 1, 1, 3], 1, 1),
    ([0, 0.15, 0.3, 0.45], 0.9, 1),
])  # fmt: skip
def test_large_segments_are_counted(curve, share, n):
    curve = np.array(curve, dtype=float)
    assert n_large_segments(curve, share) == n
    assert n_large_segments(-curve, share) == n
    assert n_large_segments(3 * curve + 1, share) == n


@pytest.mark.parametrize(
    ("curves", "options", "message"),
    [
        (np.zeros((3, 2)), {}, "at least 1 example and 3 layers"),
        (np.zeros((0, 5)), {}, "at least 1 example and 3 layers"),
        (np.array([[0, 1, 2], [0, math.nan, math.inf]]), {}, r"2 values are not, in 1 examples \(1\)"),
        (np.zeros((3, 5)), {"image": np.full((3, 5), math.nan)}, "image must be finite"),
        (np.zeros((3, 5)), {"confidence": 95.0}, "confidence between 0 and 1"),
        (np.zeros((3, 5)), {"n_bootstrap": 0}, "at least 1"),
        (np.zeros((3, 5)), {"min_turn": 20.0}, "min_turn lies in 0 to 1"),
        (np.zeros((3, 5)), {"min_turn": -0.1}, "min_turn lies in 0 to 1"),
    ],
)
def test_bad_curves_are_named(curves, options, message):
    with pytest.raises(ValueError, match=message):
        fit_phases(curves, **options)


def test_wrong_shapes_are_refused():
    with pytest.raises((ValueError, TypeCheckError)):
        fit_phases(np.zeros(5))
    with pytest.raises((ValueError, TypeCheckError)):
        fit_phases(np.zeros((3, 5)), text=np.zeros((4, 5)))


@pytest.mark.parametrize(
    ("curve", "n_segments", "first", "message"),
    [
        (np.array([0.0, math.nan, 1.0]), 1, "rise", "1 that are not finite"),
        (np.arange(4.0), 2, "up", "'rise' or 'fall', not 'up'"),
        (np.arange(4.0), 4, "rise", "from 1 to 3 segments, not 4"),
        (np.arange(4.0), 0, "rise", "from 1 to 3 segments, not 0"),
    ],
)
def test_bad_fits_are_named(curve, n_segments, first, message):
    with pytest.raises(ValueError, match=message):
        fit_segments(curve, n_segments, first)


def test_a_contextualization_result_equals_its_plain_curves():
    """The result's tensors are [layer example]; plain curves are [example layer]."""
    from mechvlm.probes.contextualization import ContextualizationResult

    rng = np.random.default_rng(3)
    base = np.array([0.0, 0.3, 0.1, 0.5, 0.2])
    inter, image, text = (base + 0.02 * rng.standard_normal((9, 5)) for _ in range(3))
    zeros = torch.zeros(5, 4)
    result = ContextualizationResult(
        *(torch.tensor(x.T, dtype=torch.float32) for x in (inter, image, text)), torch.zeros(3, 5), True, False, False,
        "a model", zeros, zeros, torch.zeros(3, 5),
    )  # fmt: skip
    got = fit_phases(result, n_bootstrap=50)
    want = fit_phases(np.float32(inter), image=np.float32(image), text=np.float32(text), n_bootstrap=50)
    assert (got.n_examples, len(got.mean)) == (9, 5)
    assert got.explanation == want.explanation
    assert got.boundaries == want.boundaries == (1, 2, 3)
