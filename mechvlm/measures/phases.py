"""The phases of a curve over layers, as alternating rising and falling segments.

Wei et al. 2024 (arXiv 2411.00646) read four phases off the cosine between image and text tokens,
layer by layer:

    I    alignment                the curve rises, in the very early layers
    II   intra-modal encoding     it falls, while the similarity within each modality rises
    III  inter-modal encoding     it rises again
    IV   output preparation       it falls in the very late layers, as all similarities do

They read them by eye. Here rising and falling segments are fitted to the curve. Their number is the
one that best predicts the curves of held-out examples, and the boundaries get bootstrap intervals
over examples. A phase that the data do not show is not named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib import font_manager
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.headings import ALONE
from mechvlm.figures.settings import marker_size
from mechvlm.figures.style import LINES, hue, state_axis
from mechvlm.results import Result

PAPER_PHASES = {
    "I alignment": "rise",
    "II intra-modal encoding": "fall",
    "III inter-modal encoding": "rise",
    "IV output preparation": "fall",
}
"""The paper's phases in their order, and the direction of the inter-modal curve in each."""
PAPER_WITHIN_MODALITY = {"II intra-modal encoding": "rise", "IV output preparation": "fall"}
"""Direction of the similarity within image and within text. The paper gives none for I and III."""
PHASE_COLORS = {"I": "#DCE9F5", "II": "#FBE6D4", "III": "#DDF0E6", "IV": "#EFE3F3"}


class Evidence(NamedTuple):
    """How well a number of segments predicts held-out examples.

    Attributes:
        n_segments: number of segments; 0 for a flat line.
        first: direction of the first segment, "rise" or "fall"; None for no segment.
        error: squared error summed over layers, mean over the held-out examples.
        standard_error: of `error`.
        chosen: whether this number and direction were chosen.
        smallest_turn: the smallest change of a segment in its direction, when they are fitted to
            the mean curve, as a share of its range; 0 for a change the other way, 1 for no segment.
        of_any_size: whether they would be chosen if a turn could have any size.
    """

    n_segments: int
    first: str | None
    error: float
    standard_error: float
    chosen: bool
    smallest_turn: float = math.nan
    of_any_size: bool = False


class Change(NamedTuple):
    """How much a mean curve changes over a segment.

    Attributes:
        value: the curve's last value in the segment minus its first.
        low, high: ends of the value's bootstrap interval over examples.
    """

    value: float
    low: float
    high: float

    @property
    def direction(self) -> str | None:
        """The direction, "rise" or "fall"; None if the interval contains 0."""
        return "rise" if self.low > 0 else "fall" if self.high < 0 else None


@dataclass(frozen=True, repr=False)
class Phases(Result):
    """The segments of a curve over states, as `fit_phases` returns them.

    A segment goes from a state to a state, and neighbours share the one where the curve turns.

    >>> phases = mv.fit_phases(mv.contextualization(vlm, inputs))
    >>> phases.boundaries, phases.labels
    >>> phases.to_frame()
    >>> phases.plot()

    Attributes:
        mean: mean of the inter-modal curve over examples [state].
        fit: the rising and falling curve fitted to `mean` [state].
        n_segments: number of segments; 0 if a flat line predicts held-out examples as well.
        directions: "rise" or "fall" of each segment.
        labels: the paper's phase of each segment, or None where it cannot be told.
        intervals: (first, last) state of each segment.
        boundaries: the states where the curve turns, between the segments.
        boundary_intervals: (low, high) state of each boundary's bootstrap interval, NaN for one
            example.
        changes: "inter", and "image" and "text" if they were given, each with a `Change` for each
            segment.
        evidence: an `Evidence` for each number of segments and first direction.
        support: share of resamples that choose the same number and directions, 0 to 1; NaN if it
            cannot be told.
        shows_pattern: whether the segments are the paper's four phases in order.
        explanation: the finding in words.
        n_examples: number of examples.
        confidence: share of the resamples inside each interval.
        min_turn: smallest change of a segment, as a share of the curve's range; 0 in results of
            versions that counted turns of any size.
    """

    units = "cosine similarity"
    apart: ClassVar[str] = (
        "phases are those of all examples together. Give fit_phases the curves of all batches, as a list."
    )

    mean: Float[Tensor, " state"]
    fit: Float[Tensor, " state"]
    n_segments: int
    directions: tuple[str, ...]
    labels: tuple[str | None, ...]
    intervals: tuple[tuple[int, int], ...]
    boundaries: tuple[int, ...]
    boundary_intervals: tuple[tuple[float, float], ...]
    changes: Mapping[str, Sequence]
    evidence: Sequence
    support: float
    shows_pattern: bool
    explanation: str
    n_examples: int
    confidence: float
    min_turn: float | int = 0.0

    def __post_init__(self):
        # A loaded file gives plain tuples: JSON does not keep the classes.
        changes = {curve: tuple(Change(*fields) for fields in values) for curve, values in self.changes.items()}
        object.__setattr__(self, "changes", changes)
        object.__setattr__(self, "evidence", tuple(Evidence(*fields) for fields in self.evidence))

    @classmethod
    def counted_from_0(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file of format 1, which calls states layers in its explanation."""
        return values | {"explanation": values["explanation"].replace(" over layers ", " over states ")}

    def to_frame(self) -> pd.DataFrame:
        """The segments as a table, one row each.

        `low` and `high` are the interval of `last_state`; NaN for the last segment, which ends
        where the curve does. `phase` and `name` are None where the paper's phase cannot be told.
        """
        rows = []
        for i, (label, direction, interval) in enumerate(
            zip(self.labels, self.directions, self.intervals, strict=True)
        ):
            phase, _, name = label.partition(" ") if label else (None, None, None)
            low_high = self.boundary_intervals[i] if i < len(self.boundaries) else (math.nan, math.nan)
            change_values = [value for changes in self.changes.values() for value in changes[i]]
            rows.append([phase, name, direction, *interval, *low_high, *change_values])
        columns = ["phase", "name", "direction", "first_state", "last_state", "low", "high"]
        for curve in self.changes:
            prefix = "" if curve == "inter" else f"{curve}_"
            columns += [f"{prefix}change", f"{prefix}change_low", f"{prefix}change_high"]
        return pd.DataFrame(rows, columns=columns)

    @plots()
    def plot(self, canvas: Canvas) -> None:
        """Plot the mean curve, its fitted segments and the phases that the data show."""
        ax, last = canvas.ax, len(self.mean) - 1
        shade(ax, self)
        line = LINES["inter"]
        marker = line.marker if last < 20 else ""
        ax.plot(
            range(last + 1), self.mean.numpy(), color=hue(line.color), marker=marker, markersize=marker_size(),
            label="mean", zorder=3,
        )  # fmt: skip
        ax.plot(
            range(last + 1), self.fit.numpy(), color="#666666", linestyle="--", linewidth=1, label="fitted segments"
        )
        state_axis(ax, last)
        ax.set_ylabel("image – text similarity (mean cosine)")
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.3 * (high - low))  # for the phases' names
        ax.legend(loc="lower right")
        level = f"bars: {100 * self.confidence:.0f} % intervals of the boundaries"
        canvas.head(
            "Phases of contextualization", f"n = {self.n_examples} examples; {level}" if self.n_examples > 1 else ALONE
        )


def shade(ax: Axes, phases: Phases, names: bool = True, heads: bool = True) -> None:
    """Shade the segments behind a plot, and draw their boundaries.

    Args:
        ax: axes with states on x.
        phases: the segments.
        names: write a phase's name below its number, in segments that are wide enough.
        heads: write each segment's phase number (or an arrow, if it has no phase) at the top, and
            draw the intervals of the boundaries.
    """
    em = font_manager.FontProperties(size="x-small").get_size_in_points() / 72  # inches
    below = -3 - 1.4 * font_manager.FontProperties(size="large").get_size_in_points()
    per_state = ax.get_window_extent().width / ax.figure.dpi / len(phases.mean)
    for i, ((first, last), label, direction) in enumerate(
        zip(phases.intervals, phases.labels, phases.directions, strict=True)
    ):
        color = PHASE_COLORS[label.split()[0]] if label else ("#F4F4F4", "#EBEBEB")[i % 2]
        ax.axvspan(first, last, color=color, linewidth=0, zorder=0)
        if not heads:
            continue
        head = label.split()[0] if label else {"rise": "↗", "fall": "↘"}[direction]
        ax.annotate(
            head, ((first + last) / 2, 1), xycoords=ax.get_xaxis_transform(), xytext=(0, -3), ha="center", va="top",
            textcoords="offset points", fontsize="large" if label else "medium", weight="bold", color="#333333",
        )  # fmt: skip
        words = "".join((label or "").split(maxsplit=1)[1:]).replace(" ", "\n").replace("-", "-\u200b")
        if words and names and (last - first) * per_state > 0.6 * em * max(map(len, words.split("\n"))):
            ax.annotate(
                words, ((first + last) / 2, 1), xycoords=ax.get_xaxis_transform(), xytext=(0, below), ha="center",
                va="top", textcoords="offset points", fontsize="x-small", color="#444444", linespacing=1.05,
            )  # fmt: skip
    for at, (low, high) in zip(phases.boundaries, phases.boundary_intervals, strict=True):
        ax.axvline(at, color="#333333", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        if heads and not np.isnan(low):
            ax.errorbar(
                [at], [0.025], xerr=[[at - low], [high - at]], transform=ax.get_xaxis_transform(), color="#333333",
                marker="|", markersize=6, capsize=3, linewidth=1.4, zorder=4,
            )  # fmt: skip
