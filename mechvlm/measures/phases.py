"""MEASURE: the phases of a curve over layers, as alternating monotone segments. What the data do not show is not named.

Wei et al. 2024 (arXiv 2411.00646) read four phases off the cosine between image and text tokens, layer by layer:

    I    alignment                the curve rises, in the very early layers
    II   intra-modal encoding     it falls, while the similarity within each modality rises
    III  inter-modal encoding     it rises again
    IV   output preparation       it falls in the very late layers, as everything does

They read them by eye. Here the curve is fitted with rising and falling segments, their number is chosen by how well the
curves of examples that were held out are predicted, and the boundaries get bootstrap intervals over examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.figures.style import LINES, axes, layer_axis, style
from mechvlm.results import Result

PAPER = {
    "I alignment": "rise",
    "II intra-modal encoding": "fall",
    "III inter-modal encoding": "rise",
    "IV output preparation": "fall",
}
# What the paper says of the similarity within the image and within the text. Of I and III it says nothing.
PAPER_WITHIN = {"II intra-modal encoding": "rise", "IV output preparation": "fall"}


class Evidence(NamedTuple):
    """How well a number of segments predicts held-out examples. Errors are squares summed over layers, per example."""

    n_segments: int
    first: str | None  # the first segment's direction; None for no segment, a flat line
    error: float
    standard_error: float
    chosen: bool


class Change(NamedTuple):
    """The mean curve's last value in a segment less its first, with its bootstrap interval over examples."""

    value: float
    low: float
    high: float

    @property
    def direction(self) -> str | None:
        """Rise or fall where the interval leaves out 0, else None."""
        return "rise" if self.low > 0 else "fall" if self.high < 0 else None


@dataclass(frozen=True, repr=False)
class Phases(Result):
    """What `fit_phases` found. A segment goes from a layer to a layer, and neighbours share their turning layer."""

    units = "cosine similarity"

    mean: Float[Tensor, " layer"]
    fit: Float[Tensor, " layer"]
    n_segments: int  # 0: a flat line predicts held-out examples as well
    directions: tuple[str, ...]
    labels: tuple[str | None, ...]
    intervals: tuple[tuple[int, int], ...]  # first and last layer of each segment
    boundaries: tuple[int, ...]  # the turning layers between them
    boundary_intervals: tuple[tuple[float, float], ...]  # low and high layer of each, NaN for one example
    changes: Mapping[str, Sequence]  # "inter", and "image" and "text" where given: a Change for each segment
    evidence: Sequence  # an Evidence for each number of segments and first direction
    support: float  # share of resamples with the same number and directions, 0 to 1; NaN where it cannot be told
    shows_pattern: bool
    explanation: str
    n_examples: int
    confidence: float

    def __post_init__(self):
        # Loaded from JSON, these come back without their names.
        changes = {curve: tuple(Change(*one) for one in changes) for curve, changes in self.changes.items()}
        object.__setattr__(self, "changes", changes)
        object.__setattr__(self, "evidence", tuple(Evidence(*one) for one in self.evidence))

    def to_frame(self) -> pd.DataFrame:
        """One row a segment. `low` and `high` are the interval of `last_layer`, NaN for the last segment's, which
        ends where the curve does. `phase` and `name` are None where the paper's phase cannot be told."""
        rows = []
        for i, (label, direction, interval) in enumerate(
            zip(self.labels, self.directions, self.intervals, strict=True)
        ):
            phase, _, name = label.partition(" ") if label else (None, None, None)
            low_high = self.boundary_intervals[i] if i < len(self.boundaries) else (math.nan, math.nan)
            moved = [value for changes in self.changes.values() for value in changes[i]]
            rows.append([phase, name, direction, *interval, *low_high, *moved])
        columns = ["phase", "name", "direction", "first_layer", "last_layer", "low", "high"]
        for curve in self.changes:
            prefix = "" if curve == "inter" else f"{curve}_"
            columns += [f"{prefix}change", f"{prefix}change_low", f"{prefix}change_high"]
        return pd.DataFrame(rows, columns=columns)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The mean curve, its fitted segments, and the phases that the data show."""
        with style():
            ax = axes(ax)
            n = len(self.mean) - 1
            shade(ax, self)
            line = LINES["inter"]
            marker = line.marker if n < 20 else ""
            ax.plot(range(n + 1), self.mean.numpy(), color=line.color, marker=marker, label="mean", zorder=3)
            ax.plot(
                range(n + 1), self.fit.numpy(), color="#222222", linestyle="--", linewidth=1, label="fitted segments"
            )
            layer_axis(ax, n)
            ax.set_ylabel("image – text similarity (mean cosine)")
            ax.legend(loc="lower right")
        return ax


# --- how many segments ---


PHASES = {"I": "#DCE9F5", "II": "#FBE6D4", "III": "#DDF0E6", "IV": "#EFE3F3"}


def shade(ax: Axes, found: Phases, names: bool = True, heads: bool = True) -> None:
    """The segments as ground, their phases above them where the data show which, boundaries with their intervals."""
    for i, ((first, last), label, direction) in enumerate(
        zip(found.intervals, found.labels, found.directions, strict=True)
    ):
        color = PHASES[label.split()[0]] if label else ("#F4F4F4", "#EBEBEB")[i % 2]
        ax.axvspan(first, last, color=color, linewidth=0, zorder=0)
        if not heads:
            continue
        head = label.split()[0] if label else {"rise": "↗", "fall": "↘"}[direction]
        ax.annotate(
            head, ((first + last) / 2, 1), xycoords=ax.get_xaxis_transform(), xytext=(0, -3), ha="center", va="top",
            textcoords="offset points", fontsize=11 if label else 9, weight="bold", color="#333333",
        )  # fmt: skip
        if label and names and last - first > 0.1 * len(found.mean):
            words = label.split(maxsplit=1)[1].replace(" ", "\n").replace("-", "-\u200b")
            ax.annotate(
                words, ((first + last) / 2, 1), xycoords=ax.get_xaxis_transform(), xytext=(0, -18), ha="center",
                va="top", textcoords="offset points", fontsize=6.5, color="#444444", linespacing=1.05,
            )  # fmt: skip
    for at, (low, high) in zip(found.boundaries, found.boundary_intervals, strict=True):
        ax.axvline(at, color="#333333", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        if heads and not np.isnan(low):
            ax.errorbar(
                [at], [0.025], xerr=[[at - low], [high - at]], transform=ax.get_xaxis_transform(), color="#333333",
                marker="|", markersize=6, capsize=3, linewidth=1.4, zorder=4,
            )  # fmt: skip
