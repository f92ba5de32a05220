"""The boxes of what a figure shows in words, and which of them overlap or leave it."""

from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SLACK = 1.0
"""Pixels by which boxes may touch: a letter's box is larger than its ink."""


def ticks_of(axis: Axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low - 1e-9 <= tick.get_loc() <= high + 1e-9]


def words_of(ax: Axes) -> list[Text]:
    """Titles, names of axes and ticks, of the axes and of those at their top."""
    texts = [ax.title]
    for own in (ax, *ax.child_axes):
        for axis in (own.xaxis, own.yaxis):
            texts += [axis.label, *ticks_of(axis)] if axis.get_visible() else []
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def boxes_of(figure: Figure) -> list[tuple[str, Bbox]]:
    """(words, box) of every title, name, tick and legend, as they are drawn."""
    figure.draw_without_rendering()
    boxes = []
    for ax in figure.axes:
        boxes += [(text.get_text(), text.get_window_extent()) for text in words_of(ax)]
        if ax.get_legend() is not None:
            boxes.append(("a legend", ax.get_legend().get_window_extent()))
    return boxes


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """The words whose boxes overlap."""
    return [(a, b) for (a, one), (b, other) in combinations(boxes_of(figure), 2) if _overlap(one, other)]


def _overlap(one: Bbox, other: Bbox) -> bool:
    both = Bbox.intersection(one, other)
    return both is not None and both.width > SLACK and both.height > SLACK


def outside(figure: Figure) -> list[str]:
    """The words that leave the figure."""
    whole = figure.bbox
    return [
        words
        for words, box in boxes_of(figure)
        if box.x0 < whole.x0 - SLACK
        or box.x1 > whole.x1 + SLACK
        or box.y0 < whole.y0 - SLACK
        or box.y1 > whole.y1 + SLACK
    ]


def covered(figure: Figure) -> list[str]:
    """The axes whose legend stands over a point of a line, an interval's end, a bar or a value."""
    figure.draw_without_rendering()
    names = []
    for ax in figure.axes:
        if ax.get_legend() is None:
            continue
        legend = ax.get_legend().get_window_extent()
        lines = [ax.transData.transform(line.get_xydata()) for line in ax.lines if line.get_transform() == ax.transData]
        lines += [
            ax.transData.transform(s) for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments()
        ]
        boxes = [patch.get_window_extent() for patch in ax.patches if patch.get_data_transform() == ax.transData]
        boxes += [text.get_window_extent() for text in ax.texts]
        is_over = any(legend.count_contains(points) for points in lines) or any(_overlap(legend, box) for box in boxes)
        names += [ax.get_title() or ax.get_ylabel()] if is_over else []
    return names


def smallest(figure: Figure) -> float:
    """The shortest side of any panel in inches, color bars and the like left out."""
    boxes = [ax.get_window_extent() for ax in figure.axes if ax.get_label() != "<colorbar>"]
    return min(min(box.width, box.height) for box in boxes) / figure.dpi
