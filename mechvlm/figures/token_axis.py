"""Axes along tokens: a name for each column that has room, and marks over the image's span."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import Formatter, Locator
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from mechvlm.figures.panels import top_axis

T = TypeVar("T")
IMAGE_MARK = "#0072B2"


class RoomyLocator(Locator):
    """Ticks at given places, as many of them as upright words have room for when they are drawn."""

    def __init__(self, places):
        self.places = np.asarray(places, dtype=float)

    def __call__(self) -> list[float]:
        """The places, the first one and each that is far enough from the one before."""
        axis: Any = self.axis
        low, high = sorted(axis.get_view_interval())
        # matplotlib counts three letters' heights a tick; an upright word takes a bit over one.
        apart = (high - low) / max(2.3 * axis.get_tick_space(), 1)
        kept: list[float] = []
        for place in self.places:
            if not kept or place - kept[-1] >= apart:
                kept.append(float(place))
        return kept

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """The same for any view."""
        return self()


class PlaceNames(Formatter):
    """Names of places, by the places."""

    def __init__(self, names: dict[float, str]):
        self.names = names

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The name of a place, "" of any other."""
        return self.names.get(float(x), "")


def name_columns(ax: Axes, places, names: Sequence[str]) -> None:
    """Write names under columns, upright, as many of them as have room."""
    ax.xaxis.set_major_locator(RoomyLocator(places))
    ax.xaxis.set_major_formatter(PlaceNames(dict(zip(map(float, places), names, strict=True))))
    ax.tick_params(axis="x", rotation=90, labelsize="small", length=2)


def mark_spans(ax: Axes, spans: Sequence[tuple[float, float, str]]) -> None:
    """Mark spans of columns (left, right, name) by a strip on top of the axes, with their names."""
    if not spans:
        return
    # x in columns of the map, y in inches above it.
    above = ax.figure.dpi_scale_trans + ScaledTranslation(0, 1, ax.transAxes)  # type: ignore[arg-type]
    strip = blended_transform_factory(ax.transData, above)
    for left, right, _ in spans:
        ax.add_patch(
            Rectangle((left, 0.02), right - left, 0.05, transform=strip, clip_on=False, color=IMAGE_MARK, linewidth=0)
        )
    top = top_axis(ax)
    top.set_xticks([(left + right) / 2 for left, right, _ in spans], [name for *_, name in spans])
    top.tick_params(axis="x", length=0, pad=6, labelsize="small", labelcolor=IMAGE_MARK)


def column_edges(kinds: Sequence[str]) -> np.ndarray:
    """The borders of a map's columns, one more than there are sources.

    Visual tokens are narrow: together they take at most half of the width, so that text is legible.
    """
    visual = np.array([kind == "image" for kind in kinds])
    others = max(int((~visual).sum()), 8)
    return np.concatenate([[0], np.where(visual, min(1.0, others / max(visual.sum(), 1)), 1.0).cumsum()])


def runs_of(kinds: Sequence[T]) -> Iterator[tuple[int, int, T]]:
    """Each run of equal kinds: (first, last, kind), both included."""
    first = 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[first]:
            yield first, i - 1, kinds[first]
            first = i
