"""What of a curve's phases exceeds its controls: the same curve with something else in the image.

A segment of the images' curve exceeds a control where it changes by more than the control does in
its direction nearby. Nearby, since a segment begins and ends where the images' curve turns: over
exactly these states any other curve of the decoder changes less, also one that turns a layer later.
What the controls do too is no phase of an image: it is how this decoder treats any token there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechvlm.intervals import mean_interval
from mechvlm.measures.phases import Phases

EXCESS_COLUMNS = [
    "phase", "direction", "first_state", "last_state", "control", "change", "control_change", "excess", "low", "high",
    "exceeds",
]  # fmt: skip
MIN_EXCESS = 0.25
"""Smallest excess that counts, as a share of the widest range of a control's mean curve.
`scripts/simulate_phases.py --seed 11`: of studies whose image is one more control 0, 1 and 2 % have
a segment beyond the others, at ripples of 2, 5 and 10 % of the range. With 0 here it is 6 % of them
at ripples of 10 %."""


@dataclass(frozen=True)
class ControlExcess:
    """The phases of images' curves, held to the curves of controls of the same examples.

    Attributes:
        phases: of the images' curves, perhaps of more examples than those of the controls.
        inter: the images' curves of the examples that have controls.
        controls: by kind, the curves of a control.
    """

    phases: Phases
    inter: Float[Tensor, "state example"]
    controls: Mapping[str, Float[Tensor, "state example"]]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row for each segment and control, as `EXCESS_COLUMNS` names them.

        `change` of the images' mean curve, and `control_change`: the largest that the control's
        mean curve changes in the segment's direction between any two states from the start of the
        segment before to the end of the one after. `excess` is their difference in that direction,
        with its 95 % bootstrap interval over examples (`low`, `high`; NaN for one example).
        `exceeds`: the interval lies above 0, and the excess is as large as a turn must be,
        `Phases.min_turn` of the curve's range, and `MIN_EXCESS` of the widest control's range.

        Tested: against every pair of states. `scripts/simulate_phases.py` measures both errors.
        """
        phases, rows = self.phases, []
        enough = max(
            phases.min_turn * _range(phases.mean), *(MIN_EXCESS * _range(c.mean(-1)) for c in self.controls.values())
        )
        for i, (label, direction, (first, last)) in enumerate(
            zip(phases.labels, phases.directions, phases.intervals, strict=True)
        ):
            sign = 1 if direction == "rise" else -1
            change = self.inter[last] - self.inter[first]
            nearby = _nearby(phases.intervals, i)
            for kind, control in self.controls.items():
                start, end = _largest_rise(sign * control.mean(-1), nearby)
                control_change = control[end] - control[start]
                mean, low, high = map(float, mean_interval(sign * (change - control_change)))
                exceeds = low > 0 and mean >= enough
                rows.append(
                    (label, direction, first, last, kind, float(change.mean()), float(control_change.mean()), mean, low,
                     high, exceeds)
                )  # fmt: skip
        return pd.DataFrame(rows, columns=EXCESS_COLUMNS)

    @cached_property
    def exceeding(self) -> tuple[bool, ...]:
        """For each segment of `phases`, whether it exceeds every control."""
        frame = self.frame
        return tuple(bool(frame[frame["first_state"] == first]["exceeds"].all()) for first, _ in self.phases.intervals)

    @property
    def shows_pattern(self) -> bool:
        """Whether the curve is the paper's four phases, and each exceeds every control."""
        return self.phases.shows_pattern and all(self.exceeding)

    @property
    def n_examples(self) -> int:
        """The number of examples that have controls."""
        return self.inter.shape[1]

    @property
    def in_short(self) -> str:
        """The verdict in a few words, for a table."""
        if self.n_examples < 2 or not self.phases.n_segments:
            return "not told"
        if all(self.exceeding):
            return "beyond controls"
        return "partly the decoder's" if any(self.exceeding) else "decoder's own"

    @property
    def verdict(self) -> str:
        """What exceeds the controls, and by how much, in words."""
        if self.n_examples < 2:
            return "From one example nothing tells what exceeds the controls: read two at least, and better dozens."
        if not self.phases.n_segments:
            return self.phases.explanation
        return f"{self.sentence} {self.phases.explanation}"

    @property
    def sentence(self) -> str:
        """The verdict on the controls alone."""
        listed = f"the controls ({', '.join(self.controls)})"
        if not any(self.exceeding):
            return f"The curve is the decoder's own: none of its segments exceeds {listed}."
        phases, frame, parts = self.phases, self.frame, []
        for (first, last), direction, exceeds in zip(phases.intervals, phases.directions, self.exceeding, strict=True):
            if exceeds:
                least = frame[frame["first_state"] == first].nsmallest(1, "excess").iloc[0]
                parts.append(
                    f"the {direction} over states {first}-{last} exceeds every control, by {least.excess:.3f} "
                    f"[{least.low:.3f}, {least.high:.3f}] or more ({least.control})"
                )
            else:
                parts.append(f"the {direction} over states {first}-{last} does not exceed {listed}")
        beyond = (
            "The curve goes beyond the controls" if all(self.exceeding) else "The curve is in part the decoder's own"
        )
        start = "The paper's four phases show, each beyond the controls" if self.shows_pattern else beyond
        return f"{start}: {'; '.join(parts)}."


def _range(curve: Float[Tensor, " state"]) -> float:
    return float(curve.max() - curve.min())


def _nearby(intervals: Sequence[tuple[int, int]], i: int) -> tuple[int, int]:
    """From the start of the segment before segment `i` to the end of the one after, inclusive."""
    return intervals[max(i - 1, 0)][0], intervals[min(i + 1, len(intervals) - 1)][1]


def _largest_rise(curve: Float[Tensor, " state"], nearby: tuple[int, int]) -> tuple[int, int]:
    """The states between which a curve rises most; the same one twice where it only falls."""
    first, last = nearby
    lowest = curve[first : last + 1].cummin(0)
    end = int((curve[first : last + 1] - lowest.values).argmax())
    return first + int(lowest.indices[end]), first + end
