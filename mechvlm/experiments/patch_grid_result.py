"""The result of `patch_grid`: how much of the clean metric each activation brings back."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechvlm.experiments.head_ablation_result import map_note, mark_sure
from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.headings import answer_label, short_name
from mechvlm.figures.style import SIGNED, color_bar, heatmap, number_ticks, text
from mechvlm.figures.token_axis import name_columns
from mechvlm.intervals import Interval, mean_interval
from mechvlm.results import Result, long_frame

AGREE = 1e-5
"""Share of the larger value below which two values of a metric differ by rounding alone."""


@dataclass(frozen=True, repr=False)
class PatchGridResult(Result):
    """A metric of corrupted examples with one clean activation at a time put in.

    Attributes:
        m_clean, m_corrupted: the metric of the clean and of the corrupted example.
        m_patched: that of the corrupted one with one clean activation.
        columns: names of the columns: tokens or groups of positions, or with at="z" the heads "0"
            to n_heads - 1.
        at: the patched site. With "resid_pre" entry l is state l, which layer l reads; else it is
            what layer l wrote.
        positions: with at="z" the positions that heads are patched at, by name; else empty.
        metric: the metric, in words.
        answers, versus: the answers' tokens on the clean and on the corrupted example, as text.
        model: the model's name.
    """

    units: ClassVar[str] = "share of the metric brought back (0 corrupted, 1 clean)"
    per_example: ClassVar[tuple[str, ...]] = ("answers", "versus")

    m_clean: Float[Tensor, " example"]
    m_corrupted: Float[Tensor, " example"]
    m_patched: Float[Tensor, "layer column example"]
    columns: tuple[str, ...]
    at: str
    positions: str
    metric: str
    answers: tuple[str, ...]
    versus: tuple[str, ...]
    model: str

    @property
    def alike(self) -> Bool[Tensor, " example"]:
        """Whether clean and corrupted have the same metric, up to rounding."""
        most = torch.maximum(self.m_clean.abs(), self.m_corrupted.abs())
        return (self.m_clean - self.m_corrupted).abs() <= AGREE * most

    @property
    def restored(self) -> Float[Tensor, "layer column example"]:
        """(m_patched - m_corrupted) / (m_clean - m_corrupted); NaN where the two agree."""
        difference = torch.where(self.alike, torch.nan, self.m_clean - self.m_corrupted)
        return (self.m_patched - self.m_corrupted) / difference

    @property
    def interval(self) -> Interval:
        """The mean of `restored` over examples [layer column] with its 95 % bootstrap interval."""
        return mean_interval(self.restored.movedim(-1, 0))

    def strongest(self, top: int = 10) -> pd.DataFrame:
        """The cells that bring back most, the strongest first; equal ones by layer and column.

        Args:
            top: how many.

        Returns:
            One row per cell: layer, column, restored (the mean over examples), low and high (its
            95 % bootstrap interval).

        Raises:
            ValueError: for fewer than one cell.
        """
        if top < 1:
            raise ValueError(f"top={top} was asked for: at least 1 cell.")
        mean, low, high = (values.flatten() for values in self.interval)
        order = mean.nan_to_num(-torch.inf).argsort(descending=True, stable=True)[:top]
        n = len(self.columns)
        table = {"layer": (order // n).tolist(), "column": [self.columns[int(i) % n] for i in order]}
        values = {"restored": mean, "low": low, "high": high}
        return pd.DataFrame(table | {name: column[order].numpy() for name, column in values.items()})

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, column and example: m_patched, m_clean, m_corrupted and restored."""
        n_layers, _, n = self.m_patched.shape
        labels = {"layer": range(n_layers), "column": self.columns, "example": range(n)}
        frame = long_frame(self.m_patched, **labels).rename(columns={"value": "m_patched"})
        for name in ("m_clean", "m_corrupted"):
            frame[name] = getattr(self, name).numpy()[frame["example"]]
        return self.with_ids(frame.assign(restored=long_frame(self.restored, **labels)["value"]))

    @plots(lambda self, **_: self._size)
    def plot(self, canvas: Canvas) -> None:
        """A map of the mean shares [layer column], with a dot where the interval leaves out 0."""
        interval = self.interval
        n_layers, n_columns = interval.mean.shape
        most = float(np.nanmax(np.abs(interval.mean.numpy()), initial=1.0))
        ax = canvas.ax
        mesh = heatmap(ax, interval.mean.numpy(), range(n_layers), cmap=SIGNED, vmin=-most, vmax=most)
        mark_sure(ax, interval)
        if self.at == "z":
            number_ticks(ax.xaxis, range(n_columns))
            ax.set_xlabel(f"head, its z patched at {'all positions' if self.positions == 'all' else self.positions}")
        else:
            name_columns(ax, range(n_columns), [text(column, 16) for column in self.columns])
            ax.set_xlabel(f"position whose {self.at} was patched")
        color_bar(ax, mesh, "share brought back (0 corrupted, 1 clean)")
        canvas.head(self._title(), map_note(self.restored))

    @property
    def _size(self) -> tuple[float, float]:
        n_layers, n_columns, _ = self.m_patched.shape
        return min(5.6 + (0.14 if self.at == "z" else 0.22) * n_columns, 12), min(2.4 + 0.2 * n_layers, 8)

    def _title(self) -> str:
        looks_at = {"logit difference": (self.answers, self.versus), "probability": (self.answers, ())}.get(self.metric)
        label = f", {answer_label(*looks_at)}" if looks_at else ""
        return f"Patching {self.at}, {short_name(self.model)}: {self.metric}{label}"
