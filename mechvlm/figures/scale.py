"""A color scale that a few large cells do not take from all others.

A decoder with an attention sink writes a norm of 150 at one position and 1 at the others. On a
scale up to 150 the others would all look like 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap

from mechvlm.figures.style import HEAT
from mechvlm.figures.token_axis import runs_of

FEW = 0.1
"""The share of the cells that may lie beyond the scale."""
FAR = 10
"""How often the largest value is that of the rest where the scale is clipped."""
MOST_RUNS = 3
"""Runs of rows that a sentence names."""
BEYOND = "#009E73"
"""The color of cells beyond the scale, which is no shade of it."""


class Scale(NamedTuple):
    """A scale from 0 on, and the cells beyond it.

    Attributes:
        most: the value of the darkest color.
        values: what is drawn [row column].
        beyond: the cells of larger values [row column].
    """

    most: float
    values: np.ndarray
    beyond: np.ndarray

    @property
    def extend(self) -> str:
        """For the color bar: an arrow where cells lie beyond."""
        return "max" if self.beyond.any() else "neither"

    @property
    def colors(self) -> Colormap:
        """The color map, with a color of its own for cells beyond."""
        return mpl.colormaps[HEAT].with_extremes(over=BEYOND)

    def sentence(self, rows: Sequence[int], name: Callable[[int], str], row: str = "layer") -> str:
        """The cells beyond, such as "beyond the scale (green): <s> in layers 2–30, up to 150".

        It is "" where there are none.

        Args:
            rows: numbers of the rows.
            name: gives a column's name by its number.
            row: what a row is called.
        """
        if not self.beyond.any():
            return ""
        columns, most = np.flatnonzero(self.beyond.any(0)).tolist(), self.values[self.beyond].max()
        in_row = [bool(row.any()) for row in self.beyond]
        runs, n_rows = [(first, last) for first, last, has_any in runs_of(in_row) if has_any], sum(in_row)
        where = ", ".join(str(rows[a]) if a == b else f"{rows[a]}–{rows[b]}" for a, b in runs)
        where = f"{row}{'s' * (n_rows > 1)} {where}" if len(runs) <= MOST_RUNS else f"{n_rows} of {len(rows)} {row}s"
        named = ", ".join(map(name, columns)) if len(columns) <= 3 else f"{int(self.beyond.sum())} cells"
        return f"beyond the scale (green): {named} in {where}, up to {most:.3g}"


def clipped(values: np.ndarray) -> Scale:
    """The scale of values from 0 on: to the largest, or where a few are far beyond, to the rest.

    Of the values that are not 0, the rest are the lower nine tenths. Where the largest is more than
    10 times all of these, the scale ends at the largest value up to twice theirs.
    """
    known = values[np.isfinite(values) & (values > 0)]
    if not len(known):
        return Scale(1.0, values, np.zeros(values.shape, dtype=bool))
    rest = np.quantile(known, 1 - FEW, method="lower")
    most = known.max()
    if most > FAR * rest:
        most = known[known <= 2 * rest].max()
    return Scale(float(most), values, np.nan_to_num(values) > most)
