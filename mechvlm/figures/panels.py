"""New axes beside axes that exist: both share the room that the first ones had."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.axes._secondary_axes import SecondaryAxis
from matplotlib.gridspec import GridSpec, GridSpecBase, SubplotSpec

TOP, PANEL = "mechvlm-top", "mechvlm_panel"


class TopAxis(SecondaryAxis):
    """An axis whose words take height in a layout, as those of a title do, and no width."""

    def get_tightbbox(self, renderer=None, **options):
        """The box of the axis, with its name taken as narrow."""
        return super().get_tightbbox(renderer, **options | {"for_layout_only": True})


def beneath(ax: Axes, share: float) -> Axes:
    """New axes under `ax`, `share` times as high, on the same x axis; `ax` shrinks for it."""
    return _second(ax, _spec(ax).subgridspec(2, 1, height_ratios=(1, share)), sharex=ax)


def beside(ax: Axes, share: float) -> Axes:
    """New axes right of `ax`, `share` times as wide, on the same y axis; `ax` shrinks for it."""
    return _second(ax, _spec(ax).subgridspec(1, 2, width_ratios=(1, share)), sharey=ax)


def _second(ax: Axes, grid: GridSpecBase, **shared: Axes) -> Axes:
    """New axes in the second cell of a grid, whose first cell `ax` takes; both are one panel."""
    ax.set_subplotspec(grid[0])
    new = ax.figure.add_subplot(grid[1], **shared)
    setattr(new, PANEL, ax)
    return new


def panel_of(ax: Axes) -> Axes:
    """The axes whose title stands over these: themselves, or those that they were put beside."""
    return getattr(ax, PANEL, ax)


def top_axis(ax: Axes) -> Any:  # a SecondaryAxis, which is no Axes to matplotlib
    """A second x axis at the top of `ax`, for names of spans and a note; the same at every call.

    matplotlib keeps the title above it, also one that is set later.
    """
    for child in ax.child_axes:
        if child.get_gid() == TOP:
            return child
    top = ax.secondary_xaxis("top", functions=(_same, _same))
    top.__class__ = TopAxis
    top.set_gid(TOP)
    top.set_xticks([])
    top.spines[:].set_visible(False)
    return top


def _same(x: Any) -> Any:
    """Of a figure that can be pickled: matplotlib's own default is a lambda."""
    return x


def _spec(ax: Axes) -> SubplotSpec:
    """The grid cell of `ax`; for axes placed by hand, a new cell of the same extent."""
    at = ax.get_position()
    edges = {"left": at.x0, "right": at.x1, "bottom": at.y0, "top": at.y1}
    return ax.get_subplotspec() or GridSpec(1, 1, figure=ax.figure, **edges)[0]  # type: ignore[arg-type]
