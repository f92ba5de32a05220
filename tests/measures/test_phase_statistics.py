"""The statistics of phases against naive versions: folds, errors, resamples, quantiles, labels."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechvlm.measures import phase_fit
from mechvlm.measures.phase_fit import fit_phases
from mechvlm.measures.phases import Change
from mechvlm.measures.segments import cross_validate, explains_most, fit_segments, resampled_means

CANDIDATES = [(0, None), (1, "rise"), (1, "fall"), (2, "rise"), (2, "fall"), (3, "rise"), (3, "fall")]


def curves(n: int, n_layers: int = 7, noise: float = 0.15, seed: int = 0) -> np.ndarray:
    """A rise and a fall, with noise as large as their turns differ."""
    rng = np.random.default_rng(seed)
    truth = np.interp(np.arange(n_layers), [0, 3, n_layers - 1], [0.0, 0.5, 0.1])
    return truth + 0.3 * rng.normal(size=(n, 1)) + noise * rng.normal(size=(n, n_layers))


def naive_cross_validation(values, counts, fold) -> tuple[list[float], list[float]]:
    """The error of each candidate and its standard error, example by example."""
    means, standard_errors = [], []
    for n_segments, first in CANDIDATES:
        errors = []
        for held_out in range(max(fold) + 1):
            train = [x for x, n, f in zip(values, counts, fold, strict=True) for _ in range(n) if f != held_out]
            mean = np.mean(train, axis=0)
            fit = np.zeros_like(mean) if first is None else fit_segments(mean, n_segments, first).fit
            tested = [x for x, n, f in zip(values, counts, fold, strict=True) for _ in range(n) if f == held_out]
            errors += [((x - fit) ** 2).sum() for x in tested]
        means.append(np.mean(errors))
        standard_errors.append(np.std(errors, ddof=1) / math.sqrt(len(errors)))
    return means, standard_errors


def test_cross_validation_of_six_examples_equals_the_naive_one():
    values = curves(6)
    values -= values.mean(1, keepdims=True)
    fold = np.array([2, 0, 1, 1, 0, 2])
    counts = np.array([[1] * 6, [2, 0, 1, 1, 0, 2], [0, 3, 1, 0, 2, 0]])
    errors, standard_errors = cross_validate(values, counts, fold, CANDIDATES)
    for row, numbers in enumerate(counts):
        naive = naive_cross_validation(values, numbers, fold)
        assert errors[row] == pytest.approx(naive[0], rel=1e-9)
        assert standard_errors[row] == pytest.approx(naive[1], rel=1e-7)


@pytest.fixture(autouse=True, scope="module")
def three():
    """At most three segments, so that the naive versions stay short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase_fit, "MOST_SEGMENTS", 3)
        yield


class Captured(dict):
    """What a fit computed on its way: `fold`, `counts`, `errors`, `standard_errors`, `means`."""


@pytest.fixture
def captured(monkeypatch) -> Captured:
    kept = Captured()

    def validated(values, counts, fold, candidates):
        errors, standard_errors = cross_validate(values, counts, fold, candidates)
        kept.update(values=values, counts=counts, fold=fold, errors=errors, standard_errors=standard_errors)
        return errors, standard_errors

    def resampled(values, n_resamples, rng):
        kept["means"] = resampled_means(values, n_resamples, rng)
        return kept["means"]

    monkeypatch.setattr(phase_fit, "cross_validate", validated)
    monkeypatch.setattr(phase_fit, "resampled_means", resampled)
    return kept


def test_folds_are_even_and_random(captured):
    folds = []
    for seed in range(3):
        fit_phases(curves(25), n_bootstrap=3, seed=seed)
        fold = captured["fold"]
        assert sorted(np.bincount(fold, minlength=10).tolist()) == [2] * 5 + [3] * 5
        assert fold.tolist() != [i % 10 for i in range(25)]
        folds.append(tuple(fold))
    assert len(set(folds)) == 3, "the seed decides the folds"
    fit_phases(curves(6), n_bootstrap=3)
    assert sorted(captured["fold"]) == list(range(6)), "of six examples each is held out alone"


def test_evidence_is_the_naive_cross_validation_of_the_examples(captured):
    values = curves(13)
    phases = fit_phases(values, n_bootstrap=3)
    centred = values - values.mean(1, keepdims=True)
    errors, standard_errors = naive_cross_validation(centred, [1] * 13, captured["fold"])
    assert [(e.n_segments, e.first) for e in phases.evidence] == CANDIDATES
    assert [e.error for e in phases.evidence] == pytest.approx(errors)
    assert [e.standard_error for e in phases.evidence] == pytest.approx(standard_errors)


def naive_choice(errors, standard_errors, allowed) -> tuple[int, str | None]:
    """The fewest segments within one standard error of the least error, in the better direction."""
    allowed = [i for i, candidate in enumerate(CANDIDATES) if candidate in allowed]
    best = min(allowed, key=lambda i: errors[i])
    for n in range(4):
        good = [i for i in allowed if CANDIDATES[i][0] == n]
        if any(errors[i] <= errors[best] + standard_errors[best] for i in good):
            return CANDIDATES[min(good, key=lambda i: errors[i])]
    raise AssertionError


def naive_size(mean: np.ndarray, n_segments: int, first: str | None) -> float:
    """The smallest change of a segment over the range, segment by segment."""
    if first is None:
        return 1.0
    fitted = fit_segments(mean, n_segments, first)
    ends = [0, *fitted.turning_layers, len(mean) - 1]
    changes = []
    for direction, (start, end) in zip(fitted.directions, pairwise(ends), strict=True):
        step = mean[end] - mean[start]
        changes.append(step if direction == "rise" else -step)
    return max(0.0, min(changes)) / (max(mean) - min(mean))


@pytest.mark.parametrize("min_turn", [0, 0.2, 0.45])
def test_the_fewest_segments_within_one_standard_error(captured, min_turn):
    numbers = set()
    for seed, noise in enumerate([0.05, 0.15, 0.15, 0.3, 0.3]):
        values = (-1) ** seed * curves(8, noise=noise, seed=seed)
        phases = fit_phases(values, min_turn=min_turn, n_bootstrap=60)
        sizes = {candidate: naive_size(values.mean(0), *candidate) for candidate in CANDIDATES}
        assert [evidence.smallest_turn for evidence in phases.evidence] == pytest.approx(list(sizes.values()))
        choices = []
        for pair in zip(captured["errors"], captured["standard_errors"], strict=True):
            most, _ = naive_choice(*pair, CANDIDATES)
            choices.append(naive_choice(*pair, [c for c in CANDIDATES if sizes[c] >= min_turn and c[0] <= most]))
        chosen = phases.n_segments, phases.directions[0] if phases.directions else None
        assert chosen == choices[0]
        assert phases.support == pytest.approx(np.mean([choice == chosen for choice in choices[1:]]))
        numbers.add(phases.support)
    assert len(numbers) > 1


def test_the_number_is_chosen_again_in_resamples_with_replacement(captured):
    fit_phases(curves(9), n_bootstrap=1000)
    first, *others = captured["counts"].tolist()
    assert first == [1] * 9
    assert len(others) == 100
    assert all(sum(row) == 9 for row in others)
    # Of 9 draws with replacement, on average 3.1 examples are not drawn.
    assert np.mean([row.count(0) for row in others]) == pytest.approx(9 * (8 / 9) ** 9, abs=0.4)
    assert max(max(row) for row in others) >= 3


def test_resampled_means_vary_as_means_of_draws_with_replacement():
    values = curves(6)
    means = resampled_means({"a": values, "b": 2 * values + 1}, 2000, np.random.default_rng(0))
    assert means["a"].shape == (2000, 7)
    assert means["b"] == pytest.approx(2 * means["a"] + 1), "all curves share the same resamples"
    # The standard error of a mean of 6 draws: those of the examples' spread, not of a sample's.
    assert means["a"].std(0) == pytest.approx(values.std(0) / math.sqrt(6), rel=0.06)
    assert means["a"].mean(0) == pytest.approx(values.mean(0), abs=0.02)


def test_intervals_are_the_quantiles_of_the_resamples(captured):
    """At the ends of 95 %, which are others than those of 90 %."""
    values, image = curves(6), curves(6, seed=5)
    phases = fit_phases(values, image=image, n_bootstrap=400)
    assert phases.directions == ("rise", "fall")
    for name in ("inter", "image"):
        means = captured["means"][name]
        mean = {"inter": values, "image": image}[name].mean(0)
        for change, (first, last) in zip(phases.changes[name], phases.intervals, strict=True):
            assert change.value == pytest.approx(mean[last] - mean[first])
            steps = means[:, last] - means[:, first]
            assert (change.low, change.high) == pytest.approx(np.quantile(steps, [0.025, 0.975]))
            assert change.low < np.quantile(steps, 0.05) - 1e-3
            assert change.high > np.quantile(steps, 0.95) + 1e-3


def test_boundaries_have_whole_layers_rounded_outwards(captured):
    """The interval of a turn, where one of its ends falls between two different layers."""
    plateau = np.interp(np.arange(7), [0, 2, 4, 6], [0, 0.5, 0.5, 0])
    values = plateau + 0.1 * np.random.default_rng(0).normal(size=(6, 7))
    options, tested = {"n_bootstrap": 101}, set()
    for curve in (values, values[:, ::-1]):
        fit_phases(curve, **options)
        turns = sorted(fit_segments(mean, 2, "rise").turning_layers[0] for mean in captured["means"]["inter"])
        rank = next(i for i, (a, b) in enumerate(pairwise(turns)) if a != b)
        below = rank + 0.5 < 50
        tail = (rank + 0.5 if below else 99.5 - rank) / 100
        (interval,) = fit_phases(curve, confidence=1 - 2 * tail, **options).boundary_intervals
        assert interval == (turns[math.floor(100 * tail)], turns[math.ceil(100 * (1 - tail))])
        assert interval[0 if below else 1] == turns[rank + (not below)]
        tested.add(below)
    assert tested == {True, False}, "one end each"


@pytest.mark.parametrize(("low", "high", "direction"), [
    (0.1, 0.2, "rise"), (-0.2, -0.1, "fall"), (-0.1, 0.2, None), (-0.2, 0.1, None), (0.0, 0.2, None), (-0.2, 0.0, None),
    (math.nan, math.nan, None),
])  # fmt: skip
def test_a_change_has_a_direction_if_its_interval_does_not_hold_0(low, high, direction):
    assert Change((low + high) / 2, low, high).direction == direction


@pytest.mark.parametrize(("share", "n_segments"), [(0.045, 1), (0.055, 2)])
def test_one_example_gets_the_fewest_segments_that_leave_5_percent(share, n_segments):
    """A rise to 1 with a dip of d at its end: pooled, the dip leaves the error d² / 2."""

    def left(d):
        curve = np.array([0.0, 0.5, 1.0, 1 - d])
        return d**2 / 2 / ((curve - curve.mean()) ** 2).sum(), curve

    curve = next(curve for d in np.linspace(0, 0.5, 5001) if (part := left(d))[0] >= share for curve in [part[1]])
    assert explains_most(curve, 3) == (n_segments, "rise")
    assert explains_most(-curve, 3) == (n_segments, "fall")


# -- what always holds --


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=9), st.integers(1, 3), st.sampled_from(["rise", "fall"])
)
@settings(max_examples=40)
def test_a_curve_read_backwards_fits_as_well(curve, n_segments, first):
    """Backwards a rise is a fall, and the last segment comes first."""
    segments = fit_segments(np.array(curve), n_segments, first)
    last = {"rise": "fall", "fall": "rise"}[segments.directions[-1]]
    assert fit_segments(np.array(curve[::-1]), n_segments, last).error == pytest.approx(segments.error, abs=1e-9)


@given(st.integers(0, 50), st.floats(0.1, 10), st.floats(-3, 3), st.booleans())
@settings(max_examples=10)
def test_phases_scale_with_their_curves(seed, scale, shift, flipped):
    """Turns stay, changes scale, and upside down each rise is a fall."""
    values, options = curves(6, 5, seed=seed), {"n_bootstrap": 10}
    sign = -scale if flipped else scale
    plain, scaled = fit_phases(values, **options), fit_phases(sign * values + shift, **options)
    assert scaled.boundaries == plain.boundaries
    assert scaled.boundary_intervals == plain.boundary_intervals
    assert scaled.support == plain.support
    swap = {"rise": "fall", "fall": "rise"} if flipped else {"rise": "rise", "fall": "fall"}
    assert scaled.directions == tuple(swap[direction] for direction in plain.directions)
    for was, now in zip(plain.changes["inter"], scaled.changes["inter"], strict=True):
        ends = (sign * was.low, sign * was.high)
        assert (now.value, now.low, now.high) == pytest.approx((sign * was.value, min(ends), max(ends)), abs=1e-9)
