"""Fitting the phases of a curve: how many segments, which, and where they turn."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.measures.phases import PAPER, PAPER_WITHIN, Change, Evidence, Phases
from mechvlm.measures.segments import (
    MOVED,
    cross_validate,
    directions_of,
    explains_most,
    fit_runs,
    fit_segments,
    interval_errors,
    partitions,
    resampled_means,
    turning_layers,
)

N_BOOTSTRAP = 1000


N_FOLDS = 10


N_SELECTIONS = 100  # resamples in which the number is chosen anew: each costs N_FOLDS fits, and a share needs no more


@runtime_checkable
class ModalityCurves(Protocol):
    """Similarities between and within the modalities, as `ContextualizationResult` holds them."""

    inter: Float[Tensor, "layer example"]
    image: Float[Tensor, "layer example"]
    text: Float[Tensor, "layer example"]


def fit_phases(
    curves: ModalityCurves | Float[np.ndarray, "example layer"] | Float[Tensor, "example layer"],
    *,
    image: Float[np.ndarray, "example layer"] | Float[Tensor, "example layer"] | None = None,
    text: Float[np.ndarray, "example layer"] | Float[Tensor, "example layer"] | None = None,
    max_segments: int = 6,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> Phases:
    """The rising and falling segments that the inter-modal curves support, and which of the paper's phases they are.

    `curves` is a `ContextualizationResult`, or holds each example's inter-modal similarity at each layer, [example layer];
    `image` and `text` are then the intra-modal ones of the same examples; they corroborate and decide nothing.

    Number of segments: 10-fold cross-validation over examples. `fit_segments` of the mean of the training examples is
    held against each held-out example; the fewest segments within one standard error of the least error are chosen
    (Breiman et al. 1984), from 0, a flat line, to `max_segments`, rising or falling first. Every curve is taken
    without its mean over layers, which has no direction. The standard error is that of the error, not of a
    difference: a turn counts where it stands out from how examples differ. Since it shrinks with their number, so does
    the smallest turn that counts.

    Intervals: percentiles over `n_bootstrap` resamples of the examples, of the turning layers refitted with the chosen
    number and first direction, and of the changes between the layers found. They do not carry the uncertainty of the
    number itself: `support` does, the share of 100 resamples that choose the same.

    Labels: rise, fall, rise, fall are I to IV, and `shows_pattern` is True. Three in a row fit in one place only, and
    are labelled: rise, fall, rise are I to III, fall, rise, fall are II to IV. One or two are too few to tell, and more
    than four are not the paper's: labelled None. Only order and direction are judged, since the paper gives no layer
    for "very early" and "very late".

    Source: Wei et al. 2024 (arXiv 2411.00646). Differs: the paper reads the curves by eye.
    Tested: known boundaries are found, and covered at the nominal rate; noise gives 0 segments, a ramp 1.

    One example has no spread: it gets the fewest segments that leave at most 5 % of its variance, with NaN for every
    interval and no label. Raises ValueError for NaN, no example, fewer than 3 layers, or shapes that differ.
    """
    between: np.ndarray | Tensor
    if isinstance(curves, ModalityCurves):
        between, image, text = curves.inter.T, curves.image.T, curves.text.T
    else:
        between = curves
    values = {"inter": _checked("curves", between)}
    for name, other in (("image", image), ("text", text)):
        if other is not None:
            values[name] = _checked(name, other)
            if values[name].shape != values["inter"].shape:
                raise ValueError(f"{name} must have the shape of curves, {values['inter'].shape} (example, layer), "
                                 f"not {values[name].shape}: give the same examples and layers.")  # fmt: skip
    if max_segments < 1 or n_bootstrap < 1 or not 0 < confidence < 1:
        raise ValueError(f"max_segments and n_bootstrap are at least 1 and confidence between 0 and 1, got "
                         f"{max_segments}, {n_bootstrap} and {confidence}.")  # fmt: skip
    inter = values["inter"]
    n_examples, n_layers = inter.shape
    max_segments = min(max_segments, n_layers - 1)
    rng = np.random.default_rng(seed)

    evidence: tuple[Evidence, ...] = ()
    support, resampled = math.nan, None
    if n_examples == 1:
        n_segments, first = explains_most(inter[0], max_segments)
    else:
        n_segments, first, evidence, support = _select(inter, max_segments, min(n_bootstrap, N_SELECTIONS), rng)
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
        low = np.quantile(turning, tail, axis=0, method="lower")  # outwards, to whole layers
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
        evidence=evidence, support=support, shows_pattern=labels == tuple(PAPER), n_examples=n_examples,
        confidence=confidence,
        explanation=_explain(directions, labels, intervals, changes, support, inter.shape, max_segments),
    )  # fmt: skip


def _select(
    curves: Float[np.ndarray, "example layer"], max_segments: int, n_resamples: int, rng: np.random.Generator
) -> tuple[int, str | None, tuple[Evidence, ...], float]:
    """Number, first direction, evidence, and the share of resamples that choose the same."""
    n_examples = len(curves)
    centred = curves - curves.mean(1, keepdims=True)
    fold = rng.permutation(n_examples) % min(N_FOLDS, n_examples)
    counts = rng.multinomial(n_examples, np.full(n_examples, 1 / n_examples), size=n_resamples)
    # Copies of an example stay in its fold, or they would be held out and trained on at once.
    counts = counts[(counts @ np.eye(fold.max() + 1)[fold] > 0).sum(1) > 1]
    counts = np.concatenate([np.ones((1, n_examples), dtype=counts.dtype), counts])
    candidates = [(0, None)] + [(n, first) for n in range(1, max_segments + 1) for first in MOVED]
    errors, standard_errors = cross_validate(centred, counts, fold, candidates)

    # Rounding must not decide between numbers that predict alike.
    slack = 1e-9 * (centred**2).sum(1).mean()
    best = errors.argmin(1)[:, None]
    enough = errors <= np.take_along_axis(errors, best, 1) + np.take_along_axis(standard_errors, best, 1) + slack
    numbers = np.array([n for n, _ in candidates])
    fewest = np.where(enough, numbers, numbers.max() + 1).min(1)[:, None]
    chosen = np.where(numbers == fewest, errors, np.inf).argmin(1)
    n_segments, first = candidates[chosen[0]]
    evidence = tuple(
        Evidence(n, way, float(errors[0, i]), float(standard_errors[0, i]), bool(i == chosen[0]))
        for i, (n, way) in enumerate(candidates)
    )
    support = float((chosen[1:] == chosen[0]).mean()) if len(chosen) > 1 else math.nan
    return n_segments, first, evidence, support


def _change(
    mean: Float[np.ndarray, " layer"],
    resampled: Float[np.ndarray, "resample layer"] | None,
    interval: tuple[int, int],
    tail: float,
) -> Change:
    first, last = interval
    low = high = math.nan
    if resampled is not None:
        low, high = np.quantile(resampled[:, last] - resampled[:, first], [tail, 1 - tail]).tolist()
    return Change(float(mean[last] - mean[first]), low, high)


def _labels(directions: tuple[str, ...]) -> tuple[str | None, ...]:
    """The paper's phases where the directions have one place in its order, and are enough of it to say so."""
    names, order = tuple(PAPER), tuple(PAPER.values())
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
    max_segments: int,
) -> str:
    """What is seen, in plain words, and why it is or is not the paper's."""
    n, (n_examples, n_layers) = len(directions), shape
    if n == 0:
        return ("The inter-modal curve neither rises nor falls by more than examples differ: a flat line predicts them "
                "as well as any segments do. None of the paper's phases shows.")  # fmt: skip
    seen = ", then ".join(
        f"{MOVED[direction]} over layers {first}-{last}"
        for direction, (first, last) in zip(directions, intervals, strict=True)
    )
    sentences = [f"The inter-modal curve {seen}."]
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
        if (start := _paper_within(directions)) is not None:
            sentences.append(f"Segments {start + 1} to {start + 4} alone would go in its order.")
    elif n == 2:
        place = ("could be phases I and II or III and IV" if directions[0] == "rise" else
                 "could be phases II and III, or any dip")  # fmt: skip
        sentences.append(f"That is one turn where the paper has three: {order} {place}, so neither is named.")
    else:
        sentences.append(f"That is no turn where the paper has three: one {order} could be either of two phases, so it "
                         "is not named.")  # fmt: skip
    if n == max_segments < n_layers - 1:
        sentences.append(f"No more than {max_segments} segments were tried; the data may support more.")
    if not math.isnan(support):
        sentences.append(f"{support:.0%} of the resamples of the {n_examples} examples choose the same segments.")
    sentences += _within(labels, changes)
    return " ".join(sentences)


def _paper_within(directions: tuple[str, ...]) -> int | None:
    """Where the paper's four directions begin within more, if in one place only."""
    order = tuple(PAPER.values())
    places = [i for i in range(len(directions) - 3) if directions[i : i + 4] == order]
    return places[0] if len(places) == 1 else None


def _within(labels: tuple[str | None, ...], changes: dict[str, tuple[Change, ...]]) -> list[str]:
    """Whether the similarity within each modality moved as the paper says, for each labelled phase it says it of."""
    sentences = []
    for i, label in enumerate(labels):
        if label not in PAPER_WITHIN:
            continue
        for name in ("image", "text"):
            if name in changes:
                change = changes[name][i]
                moved = {"rise": "rose", "fall": "fell", None: "did not clearly change"}[change.direction]
                agrees = "as in the paper" if change.direction == PAPER_WITHIN[label] else "unlike the paper's"
                by_how_much = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
                phase = label.split()[0]
                sentences.append(
                    f"In phase {phase} the similarity within the {name} {moved} ({by_how_much}), {agrees}."
                )
    return sentences


def _checked(name: str, curves: np.ndarray | Tensor) -> Float[np.ndarray, "example layer"]:
    if isinstance(curves, Tensor):
        curves = curves.detach().double().cpu().numpy()
    curves = np.asarray(curves, dtype=np.float64)
    if curves.ndim != 2 or curves.shape[0] < 1 or curves.shape[1] < 3:
        raise ValueError(f"{name} must be [example, layer] with at least 1 example and 3 layers, got shape "
                         f"{curves.shape}. For one curve give curve[None].")  # fmt: skip
    if not (finite := np.isfinite(curves)).all():
        examples = np.flatnonzero(~finite.all(1))
        some = ", ".join(map(str, examples[:5])) + (", ..." if len(examples) > 5 else "")
        raise ValueError(f"{name} must be finite, but {int((~finite).sum())} values are not, in {len(examples)} "
                         f"examples ({some}): leave those out, or see why they have no value there.")  # fmt: skip
    return curves
