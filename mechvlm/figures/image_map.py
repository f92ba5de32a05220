"""A number and a word of each patch, where the patch lies on the image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from mechvlm.figures.fitted import write_in_cell
from mechvlm.figures.style import no_ticks

OVER_PICTURE = 0.6
"""Opacity of a heat that lies over the picture itself."""


def on_grid(values: np.ndarray, cells: np.ndarray, image: int = 0) -> np.ndarray:
    """Values [position] as a grid [row col] of one image; NaN for a cell without a position.

    Args:
        values: a number of each position.
        cells: (image, row, col) of each position; -1 where it is no patch [position 3].
        image: which image of the prompt.

    Raises:
        ValueError: where no position is a patch of that image.
    """
    own = cells[:, 0] == image
    if not own.any():
        raise ValueError(f"No position that was read is a patch of image {image}, so there is nothing to lay on it.")
    rows, cols = cells[own, 1], cells[own, 2]
    grid = np.full((rows.max() + 1, cols.max() + 1), np.nan)
    grid[rows, cols] = values[own]
    return grid


def image_map(
    ax: Axes,
    heat: np.ndarray,
    picture: Any = None,
    area: Sequence[float] | None = None,
    words: Mapping[tuple[int, int], str] | None = None,
    **looks,
):
    """Draw a heat [row col] as the patches lie, over the picture where it is given.

    Args:
        ax: where to draw.
        heat: NaN is left blank.
        picture: the image, anything that `Axes.imshow` takes.
        area: what the heat covers, (left, top, right, bottom) in pixels of the picture.
        words: by (row, col), in the cells that have room for them.
        looks: further arguments of `Axes.imshow`, such as cmap and vmax.

    Returns:
        The heat's image, for a color bar.
    """
    rows, cols = heat.shape
    left, top, right, bottom = (0, 0, cols, rows) if picture is None or area is None else area
    if picture is not None:
        width, height = picture.size
        ax.imshow(picture, extent=(0, width, height, 0), origin="upper")
    mesh = ax.imshow(
        heat, extent=(left, right, bottom, top), origin="upper", interpolation="nearest",
        alpha=None if picture is None else OVER_PICTURE, **looks,
    )  # fmt: skip
    wide, high = (right - left) / cols, (bottom - top) / rows
    for (row, col), word in (words or {}).items():
        dark = float(mesh.norm(heat[row, col])) > 0.6  # type: ignore[arg-type]
        write_in_cell(
            ax, left + (col + 0.5) * wide, top + (row + 0.5) * high, word, (wide, high), may_be_cut=True,
            fontsize="xx-small", color="white" if dark else "#222222",
        )  # fmt: skip
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    no_ticks(ax)
    return mesh
