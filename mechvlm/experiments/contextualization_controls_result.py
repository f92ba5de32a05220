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
from mechvlm.figures.legends import legend_above
from mechvlm.figures.style import LINES, curve, hue, state_axis
from mechvlm.measures.control_excess import ControlExcess
from mechvlm.measures.phase_fit import fit_phases
from mechvlm.measures.phases import Phases
from mechvlm.results import Result, long_frame

CONTROL_KINDS = ("noise", "words", "text")
CONTROL_LINES = {"noise": ("#8C6D31", (0, (1, 1))), "words": ("#CC79A7", "--"), "text": ("#7B4FA3", "-.")}
"""Color and dashes of each control's curve."""
CONTROL_NAMES = {
    "noise": "noise with the visual tokens' mean and covariance", "words": "random words", "text": "running text",
}  # fmt: skip


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
    def _held(self) -> ControlExcess:
        return ControlExcess(self.phases, self.inter, dict(zip(self.kinds, self.controls, strict=True)))

    @property
    def excess(self) -> pd.DataFrame:
        """Each segment of the images' curve, less what a control does nearby.

        One row for each segment and control, as `mechvlm.measures.control_excess` describes them:
        `change`, `control_change`, `excess` with `low` and `high`, and `exceeds`.
        """
        return self._held.frame

    @property
    def exceeding(self) -> tuple[bool, ...]:
        """For each segment of `phases`, whether it exceeds every control."""
        return self._held.exceeding

    @property
    def shows_pattern(self) -> bool:
        """Whether the curve is the paper's four phases, and each exceeds every control."""
        return self._held.shows_pattern

    @property
    def verdict(self) -> str:
        """What exceeds the controls, and by how much, in words."""
        return self._held.verdict

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
                range(last + 1), np.asarray(self.baseline), color=hue("#000000"), linestyle="-", linewidth=0.8,
                label="different examples",
            )  # fmt: skip
        state_axis(ax, last)
        ax.set_ylabel("image – text similarity (mean cosine)")
        canvas.head(
            f"Contextualization and its controls, {short_name(self.model)}",
            n_examples(self.inter) + ", means; band: one standard deviation" if self.inter.shape[1] > 1 else ALONE,
        )
        legend_above(ax)
