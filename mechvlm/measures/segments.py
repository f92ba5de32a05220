"""MEASURE: least-squares fits of curves over layers that rise and fall in turn, of many curves at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

MOVED = {"rise": "rises", "fall": "falls"}
EXAMPLES_AT_ONCE = 1000  # examples, and
RESAMPLES_AT_ONCE = 100  # resamples, that are worked on at once: memory does not grow with their number


class SegmentFit(NamedTuple):
    """The closest curve of alternating rising and falling segments."""

    turning_layers: tuple[int, ...]  # n_segments - 1 layers; neighbouring segments share theirs
    directions: tuple[str, ...]  # "rise" or "fall", alternating
    fit: Float[np.ndarray, " layer"]  # the curve's units
    error: float  # sum of squares over layers


def fit_segments(curve: Float[np.ndarray, " layer"], n_segments: int, first: str) -> SegmentFit:
    """The least-squares curve that turns `n_segments` - 1 times, rising and falling in turn, `first` first.

    min over layers 0 = t_0 <= t_1 <= ... <= t_n = L - 1 and f monotone on each t_(i-1)..t_i  of  Σ_l (curve_l - f_l)²

    Exact: isotonic regression of every interval of layers, then dynamic programming over the boundaries. The runs of
    layers that it joins share no layer; whichever side of a join fits higher (lower) is the peak (valley), and
    neighbouring segments share that turning layer, since a phase is a stretch of steps between layers. A segment
    that the curve does not have comes out without a step: nothing is invented to fill it.

    Source: Demetriou & Powell 1991, piecewise monotone least squares.
    Tested: equals the best of every set of boundaries, each run fitted by scipy's isotonic regression.

    Raises ValueError for NaN, for another `first`, and for more segments than there are steps between layers.
    """
    curve = np.asarray(curve, dtype=np.float64)
    if curve.ndim != 1 or len(curve) < 2 or not np.isfinite(curve).all():
        raise ValueError(f"curve must be finite values at two layers or more, got shape {curve.shape} with "
                         f"{int((~np.isfinite(curve)).sum())} that are not finite.")  # fmt: skip
    if first not in MOVED:
        raise ValueError(f"first is 'rise' or 'fall', not {first!r}.")
    if not 1 <= n_segments <= len(curve) - 1:
        raise ValueError(f"A curve of {len(curve)} layers has from 1 to {len(curve) - 1} segments, not {n_segments}.")
    ends = partitions(interval_errors(curve[None]), n_segments, first)[-1]
    fit, error = fit_runs(curve[None], ends, first)
    turning = turning_layers(fit, ends, first)[0]
    return SegmentFit(tuple(map(int, turning)), directions_of(n_segments, first), fit[0], float(error[0]))


def _isotonic(
    values: Float[np.ndarray, "row layer"], starts: Bool[np.ndarray, "row layer"]
) -> tuple[Float[np.ndarray, "row layer"], Float[np.ndarray, "row layer"]]:
    """Non-decreasing least-squares fit of each run of layers, a run beginning where `starts`; and the error so far.

    Pool adjacent violators, all rows a layer at a time: thousands of short fits cost a few array operations, where
    scipy's would cost a call each. Tested against it.
    """
    n_rows, n_layers = values.shape
    rows = np.arange(n_rows)
    # Each row's stack of pooled blocks.
    mean, count = np.zeros((n_rows, n_layers)), np.zeros((n_rows, n_layers), dtype=np.int64)
    bottom = np.zeros((n_rows, n_layers), dtype=bool)
    top = np.full(n_rows, -1)
    error, errors = np.zeros(n_rows), np.zeros((n_rows, n_layers))
    for layer in range(n_layers):
        top += 1
        mean[rows, top], count[rows, top], bottom[rows, top] = values[:, layer], 1, starts[:, layer]
        active = rows
        while active.size:
            here = top[active]
            falls = ~bottom[active, here] & (mean[active, here - 1] > mean[active, here])
            active, here = active[falls], here[falls]
            n_below, n_here = count[active, here - 1], count[active, here]
            below, above = mean[active, here - 1], mean[active, here]
            error[active] += n_below * n_here / (n_below + n_here) * (below - above) ** 2
            mean[active, here - 1] = (n_below * below + n_here * above) / (n_below + n_here)
            count[active, here - 1] += n_here
            count[active, here] = 0
            top[active] -= 1
        errors[:, layer] = error
    fit = np.repeat(mean[count > 0], count[count > 0]).reshape(n_rows, n_layers)
    return fit, errors


def interval_errors(curves: Float[np.ndarray, "curve layer"]) -> dict[str, Float[np.ndarray, "curve start end"]]:
    """The error of the monotone fit from every layer to every later one, rising and falling; infinite elsewhere."""
    n_curves, n_layers = curves.shape
    rows = np.repeat(curves, n_layers, axis=0)
    # Row `start` pools nothing up to its start: each layer there is a run of its own, without error.
    starts = np.tile(np.tri(n_layers, dtype=bool), (n_curves, 1))
    errors = {}
    for direction, sign in (("rise", 1), ("fall", -1)):
        error = _isotonic(sign * rows, starts)[1].reshape(n_curves, n_layers, n_layers)
        errors[direction] = np.where(np.tri(n_layers, k=-1, dtype=bool), np.inf, error)
    return errors


def partitions(
    errors: dict[str, Float[np.ndarray, "curve start end"]], max_segments: int, first: str
) -> list[Int[np.ndarray, "curve _"]]:
    """For 1 to `max_segments` runs of layers, the last layer of each run in the best partition of each curve."""
    n_curves, n_layers, _ = errors[first].shape
    curve = np.arange(n_curves)
    best, begins, found = errors[first][:, 0, :], [], []
    for n_segments, direction in enumerate(directions_of(max_segments, first), start=1):
        if n_segments > 1:
            # [curve, start, end]: the best that ends before this run starts, and the run.
            total = best[:, :-1, None] + errors[direction][:, 1:, :]
            begin = total.argmin(1)
            begins.append(begin + 1)
            best = np.take_along_axis(total, begin[:, None, :], 1)[:, 0]
        ends = [np.full(n_curves, n_layers - 1)]
        for begin in reversed(begins):
            ends.append(begin[curve, ends[-1]] - 1)
        found.append(np.stack(ends[::-1], axis=1))
    return found


def fit_runs(
    curves: Float[np.ndarray, "curve layer"], ends: Int[np.ndarray, "curve segment"], first: str
) -> tuple[Float[np.ndarray, "curve layer"], Float[np.ndarray, " curve"]]:
    """The monotone fits of the runs that end at `ends`, and the summed error."""
    n_curves, n_layers = curves.shape
    starts = np.zeros((n_curves, n_layers), dtype=bool)
    starts[:, 0] = True
    starts[np.arange(n_curves)[:, None], ends[:, :-1] + 1] = True
    run = starts.cumsum(1) - 1
    sign = np.where((run % 2 == 0) == (first == "rise"), 1.0, -1.0)
    fit, errors = _isotonic(sign * curves, starts)
    return sign * fit, errors[:, -1]


def turning_layers(
    fit: Float[np.ndarray, "curve layer"], ends: Int[np.ndarray, "curve segment"], first: str
) -> Int[np.ndarray, "curve turn"]:
    """Of the two layers at each join, the higher one after a rise and the lower one after a fall."""
    before = ends[:, :-1]
    step = np.take_along_axis(fit, before + 1, 1) - np.take_along_axis(fit, before, 1)
    sign = np.where((np.arange(before.shape[1]) % 2 == 0) == (first == "rise"), 1, -1)
    return before + (sign * step > 0)


def directions_of(n_segments: int, first: str | None) -> tuple[str, ...]:
    order = ("rise", "fall") if first == "rise" else ("fall", "rise")
    return tuple(order[i % 2] for i in range(n_segments))


def explains_most(curve: Float[np.ndarray, " layer"], max_segments: int) -> tuple[int, str | None]:
    """The fewest segments that leave at most 5 % of one curve's variance; the most there are where none do."""
    spread = ((curve - curve.mean()) ** 2).sum()
    if spread <= 1e-20 * (curve**2).sum():  # flat, but for rounding
        return 0, None
    for n_segments in range(1, max_segments + 1):
        error, first = min((fit_segments(curve, n_segments, first).error, first) for first in MOVED)
        if error <= 0.05 * spread:
            break
    return n_segments, first


# --- what it means ---


def cross_validate(
    curves: Float[np.ndarray, "example layer"],
    counts: Int[np.ndarray, "resample example"],
    fold: Int[np.ndarray, " example"],
    candidates: Sequence[tuple[int, str | None]],
) -> tuple[Float[np.ndarray, "resample candidate"], Float[np.ndarray, "resample candidate"]]:
    """Held-out squared error per example, and its standard error, for each resample (how often it has each example)."""
    n_resamples, n_examples = counts.shape
    n_layers = curves.shape[1]
    max_segments = candidates[-1][0]
    # Sums over the examples of their held-out errors and the errors' squares: [resample candidate example] would be gigabytes.
    total, of_squares = np.zeros((2, n_resamples, len(candidates)))
    for held_out in range(fold.max() + 1):
        train = counts * (fold != held_out)
        means = train @ curves / train.sum(1, keepdims=True)
        errors_of = interval_errors(means)
        fits = np.zeros((n_resamples, len(candidates), n_layers))  # no segment: 0, the mean of a centred curve
        for first in MOVED:
            for n, ends in enumerate(partitions(errors_of, max_segments, first), start=1):
                fits[:, candidates.index((n, first))] = fit_runs(means, ends, first)[0]
        for some in np.array_split(np.flatnonzero(fold == held_out), n_examples // EXAMPLES_AT_ONCE + 1):
            test = curves[some]
            squared = (test**2).sum(1) - 2 * fits @ test.T + (fits**2).sum(-1, keepdims=True)
            total += np.einsum("rce,re->rc", squared, counts[:, some])
            of_squares += np.einsum("rce,re->rc", squared**2, counts[:, some])
    error = total / n_examples
    variance = np.maximum(of_squares - n_examples * error**2, 0) / (n_examples - 1)
    return error, np.sqrt(variance / n_examples)


def resampled_means(
    values: dict[str, Float[np.ndarray, "example layer"]], n_resamples: int, rng: np.random.Generator
) -> dict[str, Float[np.ndarray, "resample layer"]]:
    """The means of each curve over examples drawn with replacement, the same ones for every curve."""
    n_examples = len(next(iter(values.values())))
    found: dict[str, list] = {name: [] for name in values}
    for start in range(0, n_resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, n_resamples - start)
        # The mean of a resample is a weighted mean of the examples: one matrix product for all of them.
        weights = rng.multinomial(n_examples, np.full(n_examples, 1 / n_examples), size=size) / n_examples
        for name, value in values.items():
            found[name].append(weights @ value)
    return {name: np.concatenate(parts) for name, parts in found.items()}
