"""Result of `contextualization_controls`: the images' curve and what of it exceeds the controls."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.headings import ALONE, n_examples, short_name
from mechvlm.figures.style import LINES, curve, hue, legend, state_axis
from mechvlm.intervals import mean_interval
from mechvlm.measures.phase_fit import fit_phases
from mechvlm.measures.phases import Phases
from mechvlm.results import Result, long_frame

CONTROL_KINDS = ("noise", "words", "text")
CONTROL_LINES = {"noise": ("#777777", ":"), "words": ("#CC79A7", "--"), "text": ("#D55E00", "-.")}
"""Color and dashes of each control's curve."""


@dataclass(frozen=True, repr=False)
class ContextualizationControlsResult(Result):
    """The curve of images beside those of other things at their positions, -1 to 1.

    Attributes:
        inter: mean cosine between image and text tokens, s(l) of eq. (1) of Wei et al. 2024.
        controls: the same with each of `kinds` at the image's positions.
        baseline: the images' anisotropy baseline, the mean cosine of image and text tokens of
            different examples; NaN with fewer than two examples.
        kinds: what stood at the image's positions.
        seed: of the controls.
        model: the model's name.
    """

    units: ClassVar[str] = "cosine"
    apart: ClassVar[str] = (
        "the baseline is that of all examples together. Give contextualization_controls all batches, as a list."
    )

    inter: Float[Tensor, "state example"]
    controls: Float[Tensor, "kind state example"]
    baseline: Float[Tensor, " state"]
    kinds: tuple[str, ...]
    seed: int
    model: str

    @cached_property
    def phases(self) -> Phases:
        """The phases of the images' curve (`fit_phases`)."""
        return fit_phases(self.inter.T.contiguous(), seed=self.seed)

    @cached_property
    def excess(self) -> pd.DataFrame:
        """Each segment of the images' curve, less what a control does over the same states.

        One row for each segment and control: `change` of the images' mean curve, `control_change`,
        their difference `excess` in the segment's direction with its 95 % bootstrap interval over
        examples (`low`, `high`), and `exceeds`: whether the interval lies above 0 and the excess is
        as large as a turn must be (`Phases.min_turn` of the curve's range).
        """
        phases, rows = self.phases, []
        enough = phases.min_turn * float(phases.mean.max() - phases.mean.min())
        for label, direction, (first, last) in zip(phases.labels, phases.directions, phases.intervals, strict=True):
            sign = 1 if direction == "rise" else -1
            change = self.inter[last] - self.inter[first]
            for kind, control in zip(self.kinds, self.controls, strict=True):
                control_change = control[last] - control[first]
                mean, low, high = map(float, mean_interval(sign * (change - control_change)))
                rows.append(
                    {
                        "phase": label, "direction": direction, "first_state": first, "last_state": last, "control": kind,
                        "change": float(change.mean()), "control_change": float(control_change.mean()), "excess": mean,
                        "low": low, "high": high, "exceeds": bool(low > 0 and mean >= enough),
                    }
                )  # fmt: skip
        columns = ["phase", "direction", "first_state", "last_state", "control", "change", "control_change", "excess"]
        return pd.DataFrame(rows, columns=[*columns, "low", "high", "exceeds"])

    @cached_property
    def exceeding(self) -> tuple[bool, ...]:
        """For each segment of `phases`, whether it exceeds every control."""
        frame = self.excess
        return tuple(bool(frame[frame["first_state"] == first]["exceeds"].all()) for first, _ in self.phases.intervals)

    @property
    def shows_pattern(self) -> bool:
        """Whether the curve is the paper's four phases, and each exceeds every control."""
        return self.phases.shows_pattern and all(self.exceeding)

    @property
    def verdict(self) -> str:
        """What exceeds the controls, and by how much, in words."""
        phases = self.phases
        if self.inter.shape[1] < 2:
            return "From one example nothing tells what exceeds the controls: read two at least, and better dozens."
        if not phases.n_segments:
            return phases.explanation
        listed = f"the controls ({', '.join(self.kinds)})"
        if not any(self.exceeding):
            return f"The curve is the decoder's own: none of its segments exceeds {listed}. {phases.explanation}"
        parts = []
        for (first, last), direction, exceeds in zip(phases.intervals, phases.directions, self.exceeding, strict=True):
            if exceeds:
                least = self.excess[self.excess["first_state"] == first].nsmallest(1, "excess").iloc[0]
                parts.append(
                    f"the {direction} over states {first}-{last} exceeds every control, by {least.excess:.3f} "
                    f"[{least.low:.3f}, {least.high:.3f}] or more ({least.control})"
                )
            else:
                parts.append(f"the {direction} over states {first}-{last} does not exceed {listed}")
        sentence = "; ".join(parts)
        beyond = (
            "The curve goes beyond the controls" if all(self.exceeding) else "The curve is in part the decoder's own"
        )
        start = "The paper's four phases show, each beyond the controls" if self.shows_pattern else beyond
        return f"{start}: {sentence}. {phases.explanation}"

    def to_frame(self) -> pd.DataFrame:
        """One row for each curve ("image", and the controls by their kind), state and example."""
        n_states, count = self.inter.shape
        values = torch.cat([self.inter[None], self.controls])
        labels = {"curve": ("image", *self.kinds), "state": range(n_states), "example": range(count)}
        return self.with_ids(long_frame(values, **labels))

    @plots()
    def plot(self, canvas: Canvas) -> None:
        """The images' curve in its band, the controls' means, and the baseline."""
        ax, last = canvas.ax, self.inter.shape[0] - 1
        curve(ax, range(last + 1), self.inter.numpy().T, LINES["inter"]._replace(label="image"))
        for kind, control in zip(self.kinds, self.controls, strict=True):
            color, dash = CONTROL_LINES[kind]
            ax.plot(
                range(last + 1), control.mean(-1).numpy(), color=hue(color), linestyle=dash, label=f"{kind} instead"
            )
        if not bool(self.baseline.isnan().all()):
            ax.plot(
                range(last + 1), np.asarray(self.baseline), color="#000000", linestyle="-", linewidth=0.8,
                label="image and text of different examples",
            )  # fmt: skip
        state_axis(ax, last)
        ax.set_ylabel("image – text similarity (mean cosine)")
        canvas.head(
            f"Contextualization and its controls, {short_name(self.model)}",
            n_examples(self.inter) + ", means; band: one standard deviation" if self.inter.shape[1] > 1 else ALONE,
        )
        legend(ax)
