"""Legends that cover no data: the axes grow upwards, and the legend stands above the data."""

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import AutoLocator

MOST_SHARE = 0.7
"""Of the axes' height, for a legend. A taller one covers data, so a figure should be larger."""


class RoomyLegend(Legend):
    """A legend for which the axes are as much higher as it needs, whenever they are drawn.

    Attributes:
        data: the limits of y without the legend.
        shown: the limits that it set; where the user sets others, these stay.
    """

    data: tuple[float, float]
    shown: tuple[float, float]

    def make_room(self) -> None:
        """Move the upper limit of y to where the legend ends above the data."""
        if self.axes.get_ylim() != self.shown:
            return
        # The values' words stand above the data, and the legend above them.
        words = max((text.get_window_extent().height for text in self.axes.texts), default=0.0)
        (low, high), share = self.data, (self.get_window_extent().height + words) / self.axes.bbox.height
        self.axes.set_ylim(low, low + (high - low) / (1 - min(share, MOST_SHARE)))
        self.shown = self.axes.get_ylim()


class DataLocator(AutoLocator):
    """Ticks along the data alone, not beside the legend above them."""

    def __init__(self, legend: RoomyLegend):
        super().__init__()
        self.legend = legend

    def __call__(self) -> list[float]:
        """The ticks that the axis would have without the legend, less those beyond the data."""
        if self.legend.axes.get_ylim() != self.legend.shown:
            return list(super().__call__())
        low, high = self.legend.data
        return [tick for tick in self.tick_values(low, high) if tick <= high]


def legend_above(ax: Axes) -> None:
    """A legend in the upper end of the axes, over no data, in as many columns as have room."""
    handles, labels = ax.get_legend_handles_labels()
    labels = [textwrap.fill(label, 24) for label in labels]
    looks: dict[str, Any] = {
        "loc": "upper left", "handlelength": 1.8, "columnspacing": 1.0, "borderaxespad": 0.2, "frameon": False,
    }  # fmt: skip
    # The layout will make the axes a bit narrower.
    room = 0.85 * ax.bbox.width
    for columns in range(len(labels), 0, -1):
        legend = ax.legend(handles, labels, ncols=columns, **looks)
        if legend.get_window_extent().width <= room:
            break
    # Where it is wider than its axes, they would be laid out the narrower for it.
    legend.set_in_layout(False)
    legend.__class__ = RoomyLegend
    assert isinstance(legend, RoomyLegend)
    legend.data = legend.shown = ax.get_ylim()
    legend.make_room()
    ax.yaxis.set_major_locator(DataLocator(legend))


def make_room(figure: Figure) -> None:
    """Let every `RoomyLegend` of a figure have its room."""
    for legend in figure.findobj(RoomyLegend):
        legend.make_room()  # type: ignore[attr-defined]
