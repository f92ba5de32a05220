"""Least-squares fits of curves that rise and fall in turn, for many curves at once.

1. `interval_errors`: the error of the monotone fit of every interval of layers, by isotonic
   regression.
2. `partitions`: the best cuts of the layers into runs, by dynamic programming over these errors.
3. `fit_runs` and `turning_layers`: the fit of the best runs, and the layers where it turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

DIRECTION_VERBS = {"rise": "rises", "fall": "falls"}
# Examples and resamples that are worked on at once, so that memory does not grow with their number.
EXAMPLES_AT_ONCE = 1000
RESAMPLES_AT_ONCE = 100


class SegmentFit(NamedTuple):
    """The closest curve of alternating rising and falling segments.

    Attributes:
        turning_layers: the n_segments - 1 layers that neighbouring segments share.
        directions: "rise" or "fall" of each segment, alternating.
        fit: the fitted curve [layer], in the unit of the curve.
        error: squared error, summed over layers.
    """

    turning_layers: tuple[int, ...]
    directions: tuple[str, ...]
    fit: Float[np.ndarray, " layer"]
    error: float


def fit_segments(curve: Float[np.ndarray, " layer"], n_segments: int, first: str) -> SegmentFit:
    """The least-squares curve of `n_segments` alternating rising and falling segments.

    min  Σ_l (curve_l - f_l)²
    over layers 0 = t_0 <= t_1 <= ... <= t_n = L - 1 and curves f monotone on each t_(i-1)..t_i

    The minimum is exact: isotonic regression of every interval of layers, then dynamic programming
    over the boundaries. The dynamic program splits the layers into runs that share no layer. A
    segment, in contrast, is a stretch of steps between layers, so neighbouring segments share a
    turning layer: of the two layers at a join, the peak is the one that fits higher, the valley the
    one that fits lower. A segment that the curve does not have comes out without a step: nothing is
    invented to fill it.

    >>> fit_segments(np.array([0.0, 3.0, 1.0, 2.0, 0.0]), 2, "rise").turning_layers
    (1,)

    Source: Demetriou & Powell 1991, piecewise monotone least squares.
    Tested: equals the best of every set of boundaries, by scipy's isotonic regression of each run.

    Args:
        curve: finite values [layer], two or more.
        n_segments: number of segments, 1 to the number of steps between layers.
        first: direction of the first segment, "rise" or "fall".

    Raises:
        ValueError: for NaN, for another `first`, or for more segments than steps between layers.
    """
    curve = np.asarray(curve, dtype=np.float64)
    if curve.ndim != 1 or len(curve) < 2 or not np.isfinite(curve).all():
        raise ValueError(f"curve must be finite values at two layers or more, got shape {curve.shape} with "
                         f"{int((~np.isfinite(curve)).sum())} that are not finite.")  # fmt: skip
    if first not in DIRECTION_VERBS:
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
    """Non-decreasing least-squares fit of each run of layers.

    Pool adjacent violators, for all rows together, one layer at a time. Thousands of short fits
    cost a few array operations, while scipy's isotonic regression costs a call each. Tested against
    it.

    Args:
        values: one curve per row.
        starts: True where a run of layers starts.

    Returns:
        (fit, errors): the fit, and at each layer the row's squared error up to it.
    """
    n_rows, n_layers = values.shape
    rows = np.arange(n_rows)
    # Each row has a stack of pooled blocks, [row block]: mean, number of layers, and whether it is
    # the first of its run, which is never pooled with the block below. `top` indexes the last
    # block.
    mean, count = np.zeros((n_rows, n_layers)), np.zeros((n_rows, n_layers), dtype=np.int64)
    bottom = np.zeros((n_rows, n_layers), dtype=bool)
    top = np.full(n_rows, -1)
    error, errors = np.zeros(n_rows), np.zeros((n_rows, n_layers))
    for layer in range(n_layers):
        top += 1
        mean[rows, top], count[rows, top], bottom[rows, top] = values[:, layer], 1, starts[:, layer]
        active = rows  # rows whose top block may have to be pooled with the one below
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
    """The squared error of the monotone fit of every interval of layers.

    Returns:
        {"rise": [curve start end], "fall": the same}; infinite for an end before its start.
    """
    n_curves, n_layers = curves.shape
    rows = np.repeat(curves, n_layers, axis=0)
    # One row per curve and start. Layers before the start are runs of their own, without error.
    starts = np.tile(np.tri(n_layers, dtype=bool), (n_curves, 1))
    errors = {}
    for direction, sign in (("rise", 1), ("fall", -1)):
        error = _isotonic(sign * rows, starts)[1].reshape(n_curves, n_layers, n_layers)
        errors[direction] = np.where(np.tri(n_layers, k=-1, dtype=bool), np.inf, error)
    return errors


def partitions(
    errors: dict[str, Float[np.ndarray, "curve start end"]], max_segments: int, first: str
) -> list[Int[np.ndarray, "curve _"]]:
    """The best partitions of each curve's layers into 1 to `max_segments` runs.

    Args:
        errors: of `interval_errors`.
        max_segments: largest number of runs.
        first: direction of the first run, "rise" or "fall".

    Returns:
        For each number of runs, the last layer of each run [curve run].
    """
    n_curves, n_layers, _ = errors[first].shape
    curve = np.arange(n_curves)
    # best [curve end]: least error of the runs up to `end`. starts: for each run after the first,
    # where it starts if it ends at `end` [curve end].
    best, starts, ends_by_number = errors[first][:, 0, :], [], []
    for n_segments, direction in enumerate(directions_of(max_segments, first), start=1):
        if n_segments > 1:
            # [curve end_of_previous_run end]: the runs before this one, and this run after them.
            total = best[:, :-1, None] + errors[direction][:, 1:, :]
            previous_end = total.argmin(1)
            starts.append(previous_end + 1)
            best = np.take_along_axis(total, previous_end[:, None, :], 1)[:, 0]
        # Backwards from the last layer: each run ends one layer before the next one starts.
        ends = [np.full(n_curves, n_layers - 1)]
        for start in reversed(starts):
            ends.append(start[curve, ends[-1]] - 1)
        ends_by_number.append(np.stack(ends[::-1], axis=1))
    return ends_by_number


def fit_runs(
    curves: Float[np.ndarray, "curve layer"], ends: Int[np.ndarray, "curve segment"], first: str
) -> tuple[Float[np.ndarray, "curve layer"], Float[np.ndarray, " curve"]]:
    """The monotone fits of the runs that end at `ends`, and the squared error of each curve."""
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
    """The layers where the fit turns: at each join of two runs, the peak or the valley.

    After a rise it is the higher of the two layers at the join, after a fall the lower.
    """
    join = ends[:, :-1]
    step = np.take_along_axis(fit, join + 1, 1) - np.take_along_axis(fit, join, 1)
    sign = np.where((np.arange(join.shape[1]) % 2 == 0) == (first == "rise"), 1, -1)
    return join + (sign * step > 0)


def directions_of(n_segments: int, first: str | None) -> tuple[str, ...]:
    """The alternating directions of `n_segments` segments, from `first` on."""
    order = ("rise", "fall") if first == "rise" else ("fall", "rise")
    return tuple(order[i % 2] for i in range(n_segments))


def explains_most(curve: Float[np.ndarray, " layer"], max_segments: int) -> tuple[int, str | None]:
    """The fewest segments that leave at most 5 % of a curve's variance, or else `max_segments`.

    Returns:
        (number, first direction); (0, None) for a flat curve.
    """
    spread = ((curve - curve.mean()) ** 2).sum()
    if spread <= 1e-20 * (curve**2).sum():  # flat, except for rounding
        return 0, None
    for n_segments in range(1, max_segments + 1):
        error, first = min((fit_segments(curve, n_segments, first).error, first) for first in DIRECTION_VERBS)
        if error <= 0.05 * spread:
            break
    return n_segments, first


def smallest_turn(curve: Float[np.ndarray, " layer"], n_segments: int, first: str | None) -> float:
    """The smallest change among a curve's fitted segments, as a share of its range, 0 to 1.

    The change of a segment is that of the curve itself between its ends, and counts as 0 if it goes
    the other way. No segment (a flat line) has the share 1.

    >>> smallest_turn(np.array([0.0, 1.0, 0.5, 0.75]), 3, "rise")
    0.25
    """
    if first is None:
        return 1.0
    fitted = fit_segments(curve, n_segments, first)
    steps = np.diff(curve[[0, *fitted.turning_layers, len(curve) - 1]])
    signs = np.array([1 if direction == "rise" else -1 for direction in fitted.directions])
    span = curve.max() - curve.min()
    return abs(float(max((signs * steps).min(), 0) / span)) if span > 0 else 0.0


def n_large_segments(curve: Float[np.ndarray, " layer"], share: float | int) -> int:
    """How many segments a curve has, each of which changes it by at least a share of its range.

    Smaller turns are passed over: the curve has turned once it has come back from its last extreme
    by that much.

    >>> n_large_segments(np.array([0.0, 1.0, 0.9, 1.0, 0.4]), 0.2)
    2
    """
    enough = share * (curve.max() - curve.min())
    n_segments, direction, extreme = 0, 0, curve[0]
    low = high = curve[0]
    for value in curve[1:]:
        if not direction:  # no segment yet
            low, high = min(low, value), max(high, value)
            up, down = value > low and value - low >= enough, value < high and high - value >= enough
            direction = 1 if up else -1 if down else 0
            n_segments, extreme = abs(direction), value
        elif direction * (value - extreme) > 0:
            extreme = value
        elif value != extreme and abs(value - extreme) >= enough:
            n_segments, direction, extreme = n_segments + 1, -direction, value
    return n_segments


# --- over examples and resamples ---


def cross_validate(
    curves: Float[np.ndarray, "example layer"],
    counts: Int[np.ndarray, "resample example"],
    fold: Int[np.ndarray, " example"],
    candidates: Sequence[tuple[int, str | None]],
) -> tuple[Float[np.ndarray, "resample candidate"], Float[np.ndarray, "resample candidate"]]:
    """The error with which each candidate predicts held-out examples.

    Args:
        curves: one curve per example, with mean 0 over layers.
        counts: how often each resample holds each example.
        fold: the fold of each example, from 0.
        candidates: (number of segments, first direction), by increasing number.

    Returns:
        (error, standard error) of each candidate in each resample: the squared error summed over
        layers, as a mean over examples, and the standard error of this mean.
    """
    n_resamples, n_examples = counts.shape
    n_layers = curves.shape[1]
    max_segments = candidates[-1][0]
    # Sums over examples of the held-out errors and of their squares. All errors at once, [resample
    # candidate example], would take gigabytes.
    total, total_squares = np.zeros((2, n_resamples, len(candidates)))
    for held_out in range(fold.max() + 1):
        train = counts * (fold != held_out)
        means = train @ curves / train.sum(1, keepdims=True)
        errors_by_direction = interval_errors(means)
        # A flat line (no segment) stays 0, the mean of a centred curve.
        fits = np.zeros((n_resamples, len(candidates), n_layers))
        for first in DIRECTION_VERBS:
            for n, ends in enumerate(partitions(errors_by_direction, max_segments, first), start=1):
                fits[:, candidates.index((n, first))] = fit_runs(means, ends, first)[0]
        for block in np.array_split(np.flatnonzero(fold == held_out), n_examples // EXAMPLES_AT_ONCE + 1):
            test = curves[block]
            # (test - fit)², summed over layers: [resample candidate example].
            squared = (test**2).sum(1) - 2 * fits @ test.T + (fits**2).sum(-1, keepdims=True)
            total += np.einsum("rce,re->rc", squared, counts[:, block])
            total_squares += np.einsum("rce,re->rc", squared**2, counts[:, block])
    error = total / n_examples
    variance = np.maximum(total_squares - n_examples * error**2, 0) / (n_examples - 1)
    return error, np.sqrt(variance / n_examples)


def resampled_means(
    values: dict[str, Float[np.ndarray, "example layer"]], n_resamples: int, rng: np.random.Generator
) -> dict[str, Float[np.ndarray, "resample layer"]]:
    """Each curve's mean over resamples of the examples; all curves share the same resamples."""
    n_examples = len(next(iter(values.values())))
    means: dict[str, list] = {name: [] for name in values}
    for start in range(0, n_resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, n_resamples - start)
        # A resample's mean is a weighted mean of the examples: one matrix product for all
        # resamples.
        weights = rng.multinomial(n_examples, np.full(n_examples, 1 / n_examples), size=size) / n_examples
        for name, value in values.items():
            means[name].append(weights @ value)
    return {name: np.concatenate(blocks) for name, blocks in means.items()}
