"""New axes beside axes that exist: both share the room that the first ones had."""

from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec, SubplotSpec


def above(ax: Axes, share: float) -> Axes:
    """New axes over `ax`, `share` times as high, on the same x axis; `ax` shrinks for it."""
    grid = _spec(ax).subgridspec(2, 1, height_ratios=(share, 1))
    ax.set_subplotspec(grid[1])
    return ax.figure.add_subplot(grid[0], sharex=ax)


def beside(ax: Axes, share: float) -> Axes:
    """New axes right of `ax`, `share` times as wide, on the same y axis; `ax` shrinks for it."""
    grid = _spec(ax).subgridspec(1, 2, width_ratios=(1, share))
    ax.set_subplotspec(grid[0])
    return ax.figure.add_subplot(grid[1], sharey=ax)


def _spec(ax: Axes) -> SubplotSpec:
    """The grid cell of `ax`; for axes placed by hand, a new cell of the same extent."""
    at = ax.get_position()
    edges = {"left": at.x0, "right": at.x1, "bottom": at.y0, "top": at.y1}
    return ax.get_subplotspec() or GridSpec(1, 1, figure=ax.figure, **edges)[0]  # type: ignore[arg-type]
