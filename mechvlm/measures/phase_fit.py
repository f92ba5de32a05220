"""Fits the phases of a curve over layers.

1. Choose the number of segments and the first direction by cross-validation over examples, among
   those whose segments are all large enough on the mean curve.
2. Fit these segments to the mean curve.
3. Refit them to bootstrap resamples of the examples, for the intervals.
4. Label the segments with the paper's phases, and explain the finding in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.measures.phases import PAPER_PHASES, PAPER_WITHIN_MODALITY, Change, Evidence, Phases
from mechvlm.measures.segments import (
    DIRECTION_VERBS,
    cross_validate,
    directions_of,
    explains_most,
    fit_runs,
    fit_segments,
    interval_errors,
    n_large_segments,
    partitions,
    resampled_means,
    smallest_turn,
    turning_layers,
)
from mechvlm.results import concat

N_BOOTSTRAP = 1000
N_FOLDS = 10
MOST_SEGMENTS = 6
"""Most segments that are tried, two more than the paper's; more where the mean curve has more that
are large enough."""
MIN_TURN = 0.2
"""`scripts/simulate_phases.py`: without phases at most 2 % of curves then show four, of those with
dips of 30 % 98 % do. At 0.1 up to 52 % without do, at 0.3 only 45 % of those with dips."""
N_SELECTION_RESAMPLES = 100
"""Resamples in which the number of segments is chosen again. Each costs N_FOLDS fits, and a share
needs no more."""


@runtime_checkable
class ModalityCurves(Protocol):
    """Similarities between and within the modalities, as in a `ContextualizationResult`.

    Attributes:
        inter, image, text: between image and text, within the image, and within the text
            [layer example].
    """

    inter: Float[Tensor, "layer example"]
    image: Float[Tensor, "layer example"]
    text: Float[Tensor, "layer example"]


def fit_phases(
    curves: ModalityCurves | Float[np.ndarray, "example layer"] | Float[Tensor, "example layer"] | Sequence,
    *,
    image: Float[np.ndarray, "example layer"] | Float[Tensor, "example layer"] | Sequence | None = None,
    text: Float[np.ndarray, "example layer"] | Float[Tensor, "example layer"] | Sequence | None = None,
    min_turn: float | int = MIN_TURN,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> Phases:
    """The rising and falling segments that inter-modal curves support, with the paper's phases.

    >>> phases = mv.fit_phases(mv.contextualization(vlm, inputs))
    >>> print(phases.explanation)

    Number of segments: chosen by 10-fold cross-validation over examples, from 0 (a flat line) to 6,
    or to as many as the mean curve has that are large enough; rising or falling first.
    `fit_segments` fits the mean of the training examples, and the fit is compared with each
    held-out example. The fewest segments within one standard error of the least error are chosen
    (Breiman et al. 1984). Every curve is taken without its mean over layers, which has no
    direction. The standard error is that of the error, not of a difference: a turn counts if it
    stands out from the differences between examples.

    Size: the standard error shrinks with the number of examples, and where examples differ little
    any ripple of the decoder's own stands out. So where segments are chosen of which one, fitted to
    the mean curve, changes it in its direction by less than `min_turn` of the curve's range
    (maximum minus minimum), fewer are chosen, all of them large enough. `Phases.explanation` says
    when smaller turns stand out too. A turn of this size may still be the decoder's own: then the
    same curve is seen without an image.

    Intervals: percentiles over `n_bootstrap` resamples of the examples. In each, the turning layers
    are refitted with the chosen number and first direction, and the changes are taken between the
    layers of the original fit. The intervals do not carry the uncertainty of the number itself:
    `support` does, the share of 100 resamples that choose the same.

    Labels: rise, fall, rise, fall are I to IV, and `shows_pattern` is True. Three segments fit the
    paper's order in one place only: rise, fall, rise are I to III, and fall, rise, fall are II to
    IV. One or two are too few to tell; four in another order, and more than four, are not the
    paper's: they are labelled None. Only order and direction are judged, since the paper gives no
    layer for "very early" and "very late".

    One example has no spread. It gets the fewest segments that leave at most 5 % of its variance,
    with NaN for every interval and no label.

    Source: Wei et al. 2024 (arXiv 2411.00646). Differs: the paper reads the curves by eye.
    Tested: known boundaries are found, and covered at the nominal rate; noise gives 0 segments, a
    ramp 1.

    Args:
        curves: a `ContextualizationResult`, or each example's inter-modal similarity [example
            layer]; a list of either is one group of examples.
        image: similarity within the image, of the same examples [example layer]. It corroborates
            the phases and decides nothing. A `ContextualizationResult` brings its own.
        text: the same within the text.
        min_turn: smallest change of a segment as a share of the curve's range, 0 to 1; with 0 any
            turn counts that stands out from the differences between examples.
        n_bootstrap: resamples for the intervals.
        confidence: share of the resamples inside an interval, between 0 and 1.
        seed: of the folds and resamples.

    Returns:
        The `Phases`, in the unit of the curves.

    Raises:
        ValueError: for NaN, no example, fewer than 3 layers, shapes that differ, or an option out
            of its range.
    """
    inter_modal: Any
    curves, image, text = _as_one(curves), _as_one(image), _as_one(text)
    if isinstance(curves, ModalityCurves):
        inter_modal, image, text = curves.inter.T, curves.image.T, curves.text.T
    else:
        inter_modal = curves
    values = {"inter": _check_curves("curves", inter_modal)}
    for name, intra_modal in (("image", image), ("text", text)):
        if intra_modal is not None:
            values[name] = _check_curves(name, intra_modal)
            if values[name].shape != values["inter"].shape:
                raise ValueError(f"{name} must have the shape of curves, {values['inter'].shape} (example, layer), "
                                 f"not {values[name].shape}: give the same examples and layers.")  # fmt: skip
    if not 0 <= min_turn <= 1 or n_bootstrap < 1 or not 0 < confidence < 1:
        raise ValueError(f"min_turn lies in 0 to 1, n_bootstrap is at least 1 and confidence between 0 and 1, got "
                         f"{min_turn}, {n_bootstrap} and {confidence}.")  # fmt: skip
    inter = values["inter"]
    n_examples, n_layers = inter.shape
    max_segments = min(max(MOST_SEGMENTS, n_large_segments(inter.mean(0), min_turn)), n_layers - 1)
    rng = np.random.default_rng(seed)

    evidence: tuple[Evidence, ...] = ()
    support, resampled = math.nan, None
    if n_examples == 1:
        n_segments, first = explains_most(inter[0], max_segments)
    else:
        n_segments, first, evidence, support = _select(
            inter, max_segments, min_turn, min(n_bootstrap, N_SELECTION_RESAMPLES), rng
        )
        resampled = resampled_means(values, n_bootstrap, rng)

    mean = inter.mean(0)
    directions = directions_of(n_segments, first)
    boundaries: tuple[int, ...] = ()
    if first is None:
        fit, edges = np.full(n_layers, mean.mean()), []
    else:
        boundaries, _, fit, _ = fit_segments(mean, n_segments, first)
        edges = [0, *boundaries, n_layers - 1]
    intervals = tuple(pairwise(edges))

    boundary_intervals = ((math.nan, math.nan),) * len(boundaries)
    tail = (1 - confidence) / 2
    if resampled is not None and first is not None:
        ends = partitions(interval_errors(resampled["inter"]), n_segments, first)[-1]
        turning = turning_layers(fit_runs(resampled["inter"], ends, first)[0], ends, first)
        # Rounded outwards, to whole layers.
        low = np.quantile(turning, tail, axis=0, method="lower")
        high = np.quantile(turning, 1 - tail, axis=0, method="higher")
        boundary_intervals = tuple(zip(low.astype(float).tolist(), high.astype(float).tolist(), strict=True))
    changes = {}
    for name, value in values.items():
        means = None if resampled is None else resampled[name]
        changes[name] = tuple(_change(value.mean(0), means, interval, tail) for interval in intervals)
    labels = _labels(directions) if n_examples > 1 else (None,) * n_segments
    return Phases(
        mean=torch.from_numpy(mean), fit=torch.from_numpy(fit), n_segments=n_segments, directions=directions, labels=labels,
        intervals=intervals, boundaries=boundaries, boundary_intervals=boundary_intervals, changes=changes,
        evidence=evidence, support=support, shows_pattern=labels == tuple(PAPER_PHASES), n_examples=n_examples,
        confidence=confidence, min_turn=min_turn,
        explanation=_explain(directions, labels, intervals, changes, support, inter.shape, evidence, min_turn),
    )  # fmt: skip


def _select(
    curves: Float[np.ndarray, "example layer"],
    max_segments: int,
    min_turn: float | int,
    n_resamples: int,
    rng: np.random.Generator,
) -> tuple[int, str | None, tuple[Evidence, ...], float]:
    """Choose the segments by cross-validation: the fewest within one standard error of the best.

    Only those count whose segments are large enough on the mean curve.

    Returns:
        (number, first direction, evidence, share of resamples that choose the same).
    """
    n_examples = len(curves)
    centred = curves - curves.mean(1, keepdims=True)
    fold = rng.permutation(n_examples) % min(N_FOLDS, n_examples)
    counts = rng.multinomial(n_examples, np.full(n_examples, 1 / n_examples), size=n_resamples)
    # An example's copies stay in its fold, or the same example would be held out and trained on. A
    # resample therefore needs examples of two folds.
    counts = counts[(counts @ np.eye(fold.max() + 1)[fold] > 0).sum(1) > 1]
    # Row 0 is the original sample.
    counts = np.concatenate([np.ones((1, n_examples), dtype=counts.dtype), counts])
    candidates = [(0, None)] + [(n, first) for n in range(1, max_segments + 1) for first in DIRECTION_VERBS]
    errors, standard_errors = cross_validate(centred, counts, fold, candidates)
    smallest = np.array([smallest_turn(curves.mean(0), n, first) for n, first in candidates])

    # Rounding must not decide between candidates that predict equally well.
    slack = 1e-9 * (centred**2).sum(1).mean()
    numbers = np.array([n for n, _ in candidates])

    def choose(errors):
        best = errors.argmin(1)[:, None]
        enough = errors <= np.take_along_axis(errors, best, 1) + np.take_along_axis(standard_errors, best, 1) + slack
        fewest = np.where(enough, numbers, numbers.max() + 1).min(1)[:, None]
        return np.where(numbers == fewest, errors, np.inf).argmin(1)

    of_any_size = choose(errors)
    # Large enough, and no more than without the condition: it takes turns away and adds none.
    counts_here = (smallest >= min_turn) & (numbers <= numbers[of_any_size][:, None])
    chosen = choose(np.where(counts_here, errors, np.inf))
    n_segments, first = candidates[chosen[0]]
    evidence = tuple(
        Evidence(
            n, direction, float(errors[0, i]), float(standard_errors[0, i]), bool(i == chosen[0]), float(smallest[i]),
            bool(i == of_any_size[0]),
        )
        for i, (n, direction) in enumerate(candidates)
    )  # fmt: skip
    support = float((chosen[1:] == chosen[0]).mean()) if len(chosen) > 1 else math.nan
    return n_segments, first, evidence, support


def _change(
    mean: Float[np.ndarray, " layer"],
    resampled: Float[np.ndarray, "resample layer"] | None,
    interval: tuple[int, int],
    tail: float,
) -> Change:
    """The change of the mean curve over an interval of layers, with its bootstrap interval."""
    first, last = interval
    low = high = math.nan
    if resampled is not None:
        low, high = np.quantile(resampled[:, last] - resampled[:, first], [tail, 1 - tail]).tolist()
    return Change(float(mean[last] - mean[first]), low, high)


def _labels(directions: tuple[str, ...]) -> tuple[str | None, ...]:
    """The paper's phases of three or four segments in its order; None for each of any others."""
    names, order = tuple(PAPER_PHASES), tuple(PAPER_PHASES.values())
    n = len(directions)
    if n in (3, 4):
        for start in range(len(order) - n + 1):
            if order[start : start + n] == directions:
                return names[start : start + n]
    return (None,) * n


def _explain(
    directions: tuple[str, ...],
    labels: tuple[str | None, ...],
    intervals: tuple[tuple[int, int], ...],
    changes: dict[str, tuple[Change, ...]],
    support: float,
    shape: tuple[int, int],
    evidence: tuple[Evidence, ...],
    min_turn: float | int,
) -> str:
    """The finding in words, and why it is or is not the paper's pattern."""
    n, n_examples = len(directions), shape[0]
    if n == 0:
        flat = ("The inter-modal curve neither rises nor falls by more than examples differ: a flat line predicts them "
                "as well as any segments do. None of the paper's phases shows.")  # fmt: skip
        return " ".join([flat, *_explain_size(n, evidence, min_turn)])
    course = ", then ".join(
        f"{DIRECTION_VERBS[direction]} over states {first}-{last}"
        for direction, (first, last) in zip(directions, intervals, strict=True)
    )
    sentences = [f"The inter-modal curve {course}."]
    order = ", ".join(directions)
    if n_examples == 1:
        sentences.append("From one example nothing tells a turn from noise, so no phase is named and no interval is "
                         "given: both need two examples at least, and better dozens.")  # fmt: skip
        return " ".join(sentences)
    if n == 4 and labels[0]:
        sentences.append("These are the directions of the paper's four phases, in its order.")
    elif directions == ("rise", "fall", "rise"):
        sentences.append(
            "It goes as the paper's phases I, II and III; phase IV does not show: no fall at the end stands out."
        )
    elif directions == ("fall", "rise", "fall"):
        sentences.append("The curve falls first: no rise before it stands out, so the paper's phase I does not show. "
                         "The rest goes as phases II, III and IV.")  # fmt: skip
    elif n == 4:
        sentences.append("The curve falls first, where the paper's rises, and rises at the end, where the paper's "
                         "falls: four segments, but not the paper's four phases. None is named.")  # fmt: skip
    elif n > 4:
        sentences.append(f"The data support {n} segments, more than the paper's four, so none is named.")
        if (start := _pattern_start(directions)) is not None:
            sentences.append(f"Segments {start + 1} to {start + 4} alone would go in its order.")
    elif n == 2:
        place = ("could be phases I and II or III and IV" if directions[0] == "rise" else
                 "could be phases II and III, or any dip")  # fmt: skip
        sentences.append(f"That is one turn where the paper has three: {order} {place}, so neither is named.")
    else:
        sentences.append(f"That is no turn where the paper has three: one {order} could be either of two phases, so it "
                         "is not named.")  # fmt: skip
    sentences += _explain_size(n, evidence, min_turn)
    if not math.isnan(support):
        sentences.append(f"{support:.0%} of the resamples of the {n_examples} examples choose the same segments.")
    sentences += _explain_within(labels, changes)
    return " ".join(sentences)


def _explain_size(n_segments: int, evidence: tuple[Evidence, ...], min_turn: float | int) -> list[str]:
    """A sentence on turns that stand out from the examples' differences and are too small."""
    of_any_size = next((e.n_segments for e in evidence if e.of_any_size), 0)
    if of_any_size <= n_segments:
        return []
    return [f"{of_any_size} segments predict held-out examples better, but not all of them change the curve by "
            f"{min_turn:.0%} of its range: such turns are not counted."]  # fmt: skip


def _pattern_start(directions: tuple[str, ...]) -> int | None:
    """Index of the segment at which the paper's four directions start, if there is only one."""
    order = tuple(PAPER_PHASES.values())
    starts = [i for i in range(len(directions) - 3) if directions[i : i + 4] == order]
    return starts[0] if len(starts) == 1 else None


def _explain_within(labels: tuple[str | None, ...], changes: dict[str, tuple[Change, ...]]) -> list[str]:
    """Sentences on whether the similarities within image and text changed as in the paper.

    Only for labelled phases in which the paper gives their direction.
    """
    sentences = []
    for i, label in enumerate(labels):
        if label not in PAPER_WITHIN_MODALITY:
            continue
        for name in ("image", "text"):
            if name in changes:
                change = changes[name][i]
                verb = {"rise": "rose", "fall": "fell", None: "did not clearly change"}[change.direction]
                agrees = "as in the paper" if change.direction == PAPER_WITHIN_MODALITY[label] else "unlike the paper's"
                by_how_much = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
                phase = label.split()[0]
                sentences.append(f"In phase {phase} the similarity within the {name} {verb} ({by_how_much}), {agrees}.")
    return sentences


def _as_one(curves: Any) -> Any:
    """Several results, or several arrays [example layer], as one group of examples."""
    if not isinstance(curves, list | tuple):
        return curves
    if not curves:
        raise InputError("There is no curve: give a ContextualizationResult, or several.")
    kinds = [isinstance(curve, ModalityCurves) for curve in curves]
    if all(kinds):
        return concat(list(curves))
    if any(kinds):
        raise InputError("Give several results, or several arrays [example, layer], not some of both.")
    if any(getattr(curve, "ndim", 0) != 2 for curve in curves):
        return curves  # numbers, checked as one array
    shapes = [tuple(curve.shape) for curve in curves]
    if len({n_layers for _, n_layers in shapes}) > 1:
        raise InputError(f"Curves of one group go over the same layers; their shapes (example, layer) are {shapes}.")
    return np.concatenate([torch.as_tensor(curve).detach().double().cpu().numpy() for curve in curves])


def _check_curves(name: str, curves: Any) -> Float[np.ndarray, "example layer"]:
    """The curves as a float64 array, if they have a usable shape and are finite."""
    if isinstance(curves, Tensor):
        curves = curves.detach().double().cpu().numpy()
    curves = np.asarray(curves, dtype=np.float64)
    if curves.ndim != 2 or curves.shape[0] < 1 or curves.shape[1] < 3:
        raise ValueError(f"{name} must be [example, layer] with at least 1 example and 3 layers, got shape "
                         f"{curves.shape}. For one curve give curve[None].")  # fmt: skip
    if not (finite := np.isfinite(curves)).all():
        examples = np.flatnonzero(~finite.all(1))
        first_few = ", ".join(map(str, examples[:5])) + (", ..." if len(examples) > 5 else "")
        raise ValueError(f"{name} must be finite, but {int((~finite).sum())} values are not, in {len(examples)} "
                         f"examples ({first_few}): leave those out, or see why they have no value there.")  # fmt: skip
    return curves
