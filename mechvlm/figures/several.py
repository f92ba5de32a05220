"""Several results in one figure, as a paper shows them."""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechvlm.figures.canvas import Size, new_figure

TEXT_WIDTH = 7.0
"""Of a page of two columns, in inches."""
LEAST_WIDTH, ROW_HEIGHT = 3.2, 2.9
"""Of a panel with its labels, in inches."""
STACKED = 1.5
"""How many times as high a row is where a plot has one panel above another."""


def grid(
    results: Sequence[Any],
    columns: int | None = None,
    figsize: Size | None = None,
    titles: Sequence[str | bool | None] | None = None,
) -> Figure:
    """Draw several results side by side in a new figure, row by row.

    >>> fig = mv.figures.grid([lens, lambda ax: norms.plot(ax, on="image")], figsize=(7, 2.6))
    >>> fig.savefig("figure_2.pdf")    # letters are TrueType

    Args:
        results: what has a `plot`; or functions that draw on the axes they are given.
        columns: panels in a row; by default as many as have 3.2 inches each.
        figsize: (width, height) in inches; by default 7 wide and 2.9 for each row, more where a
            plot has panels one above the other.
        titles: of the results' panels, as `title` of `plot`.

    Returns:
        The pyplot figure; `fig.axes` holds the panels.

    Raises:
        ValueError: for no result, less than one column, or another number of titles than results.
    """
    results = list(results)
    titles = [None] * len(results) if titles is None else list(titles)
    if not results or (columns is not None and columns < 1) or len(titles) != len(results):
        raise ValueError(
            f"grid() was given {len(results)} results, {len(titles)} titles and columns={columns}: give at least one result, "
            "a title for each or none at all, and one column or more."
        )
    width = TEXT_WIDTH if figsize is None else figsize[0]
    columns = columns or max(1, min(len(results), int(width / LEAST_WIDTH)))
    rows = ceil(len(results) / columns)
    stacked = [getattr(getattr(result, "plot", None), "stacked", False) for result in results]
    heights = [STACKED if any(stacked[i * columns : (i + 1) * columns]) else 1 for i in range(rows)]
    with new_figure((width, ROW_HEIGHT * sum(heights)) if figsize is None else figsize) as figure:
        cells = figure.add_gridspec(rows, columns, height_ratios=heights)
        for number, (result, title) in enumerate(zip(results, titles, strict=True)):
            _draw(result, figure.add_subplot(cells[number]), title)
    return figure


def _draw(result: Any, ax: Axes, title: str | bool | None) -> None:
    plot: Callable | None = getattr(result, "plot", None)
    if plot is not None:
        plot(ax, title=title)
    elif callable(result):
        result(ax)
    else:
        raise TypeError(f"grid() draws results and functions of axes, not {type(result).__name__}.")
