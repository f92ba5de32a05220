"""New axes beside those that are there, which share the room that these had."""

from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec, SubplotSpec


def above(ax: Axes, share: float) -> Axes:
    """New axes over `ax`, `share` as high as it, on the same x: they part the room that `ax` had."""
    grid = _room(ax).subgridspec(2, 1, height_ratios=(share, 1))
    ax.set_subplotspec(grid[1])
    return ax.figure.add_subplot(grid[0], sharex=ax)


def beside(ax: Axes, share: float) -> Axes:
    """New axes to the right of `ax`, `share` as wide as it, on the same y: they part the room that `ax` had."""
    grid = _room(ax).subgridspec(1, 2, width_ratios=(1, share))
    ax.set_subplotspec(grid[0])
    return ax.figure.add_subplot(grid[1], sharey=ax)


def _room(ax: Axes) -> SubplotSpec:
    """The cell of the grid in which `ax` stands; where it was put by hand, one around it."""
    at = ax.get_position()
    edges = {"left": at.x0, "right": at.x1, "bottom": at.y0, "top": at.y1}
    return ax.get_subplotspec() or GridSpec(1, 1, figure=ax.figure, **edges)[0]  # type: ignore[arg-type]
