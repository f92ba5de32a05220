"""What the pictures of an example show: the views of each image, apart and together.

A model may see an image several times, as a whole and in tiles. Views that do not overlap lie side
by side on one sheet; those that overlap lie on different sheets. Sheets are drawn apart, and then
together: where several views show a spot, what their tokens hold there is added up.

>>> [view.name for view in drawn_views(tokens)], [view.sheet for view in drawn_views(tokens)]
(['whole', 'tile 0,0', 'tile 0,1'], [0, 1, 1])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.errors import ViewError
from mechvlm.inputs.tokens import TokenMap
from mechvlm.inputs.views import Grid

FRAME_COLOR = (214, 0, 108)
"""The one color of heat, red, green and blue; its opacity is the share of the largest."""
BELOW_COLOR = (0, 122, 92)
"""The color of values below 0, which the color-blind can tell from `FRAME_COLOR`."""
FEW_CELLS = 14
"""A view of fewer cells along its longer side has thinner frames."""


@dataclass(frozen=True)
class DrawnView:
    """One view of one image, as a picture shows it.

    Attributes:
        image: number of the image in the prompt.
        sheet: which sheet of the image it lies on; the views of one sheet do not overlap.
        name: of the view.
        grid: where its cells lie on the image.
        positions: the positions of its tokens, -1 where a cell has none; None for the patches that
            queries read, which hold no token.
    """

    image: int
    sheet: int
    name: str
    grid: Grid
    positions: Int[Tensor, "row col"] | None


def drawn_views(tokens: TokenMap) -> list[DrawnView]:
    """All views of all images, in order; for queries each image's patches.

    Raises:
        ViewError: where nothing is known of where visual tokens lie.
    """
    if not tokens.patches:
        try:
            return [DrawnView(n, 0, "whole", grid, None) for n, grid in enumerate(tokens.grids)]
        except ValueError as error:
            raise ViewError(f"There is no picture to draw on. {error}") from error
    drawn = []
    for image, views in enumerate(tokens.views):
        sheets: list[list[Grid]] = []
        for view in views:
            free = [n for n, grids in enumerate(sheets) if not any(_overlap(view.grid, grid) for grid in grids)]
            sheet = free[0] if free else len(sheets)
            sheets[sheet:] = sheets[sheet:] or [[]]
            sheets[sheet].append(view.grid)
            drawn.append(DrawnView(image, sheet, view.name, view.grid, view.positions))
    return drawn


def drawn_positions(tokens: TokenMap) -> Int[np.ndarray, " n"]:
    """The positions of the visual tokens that pictures show: view by view, or all queries.

    Raises:
        ViewError: where nothing is known of where visual tokens lie.
    """
    cells = [view.positions.flatten() for view in drawn_views(tokens) if view.positions is not None]
    return np.concatenate([own[own >= 0].numpy() for own in cells]) if cells else tokens.image.numpy()


def added_up(
    views: Sequence[DrawnView], heats: Sequence[np.ndarray], x: Float[np.ndarray, " x"], y: Float[np.ndarray, " y"]
) -> tuple[Float[np.ndarray, "y x"], Float[np.ndarray, "y x"]]:
    """What the cells at each spot of an image hold together, and how many cells lie there.

    Args:
        views: of one image.
        heats: what each cell of each view holds, [row, col].
        x: of the spots, in pixels of the original image.
        y: likewise.
    """
    total, count = np.zeros((len(y), len(x))), np.zeros((len(y), len(x)))
    for view, heat in zip(views, heats, strict=True):
        left, top, right, bottom = view.grid.crop_box
        col = np.floor((x - left) / (right - left) * view.grid.cols).astype(int)
        row = np.floor((y - top) / (bottom - top) * view.grid.rows).astype(int)
        inside = ((row >= 0) & (row < view.grid.rows))[:, None] & ((col >= 0) & (col < view.grid.cols))
        total += np.where(inside, heat[row.clip(0, view.grid.rows - 1)][:, col.clip(0, view.grid.cols - 1)], 0)
        count += inside
    return total, count


def frames(
    views: Sequence[DrawnView],
    heats: Sequence[np.ndarray],
    x: Float[np.ndarray, " x"],
    y: Float[np.ndarray, " y"],
    top: float,
) -> Float[np.ndarray, "y x rgba"]:
    """Heat as frames around the cells, to be laid over the image: colors and opacities, 0 to 1.

    A frame's opacity is the cell's share of `top`, or the share of what several cells hold together
    at that spot; below 0 it has `BELOW_COLOR`. Inside its frame a cell is transparent: the image
    keeps its colors. Where cells overlap, the smallest has the frame. `frames.js` draws the same on
    pages.
    """
    total, _ = added_up(views, heats, x, y)
    tone = np.full(total.shape, -1)
    for view in sorted(views, key=lambda view: np.prod(_cell_size(view.grid))):
        left, top_edge, right, bottom = view.grid.crop_box
        width, height = _cell_size(view.grid)
        at_x, at_y = (x - left) / width, (y - top_edge) / height
        # Distance from the nearest edge of a cell, in parts of its shorter side.
        from_x = width * np.minimum(at_x % 1, 1 - at_x % 1) / min(width, height)
        from_y = height * np.minimum(at_y % 1, 1 - at_y % 1) / min(width, height)
        edge = np.minimum(from_y[:, None], from_x) / min(1, max(view.grid.rows, view.grid.cols) / FEW_CELLS)
        inside = ((y >= top_edge) & (y < bottom))[:, None] & ((x >= left) & (x < right))
        # 2 is the white line that sets a frame off from an image of its color, 1 the frame.
        own = np.select([edge < 0.04, edge < 0.09, edge < 0.22], [0, 2, 1], 0)
        tone = np.where((tone < 0) & inside, own, tone)
    drawn = np.zeros((*total.shape, 4))
    color = np.where((total < 0)[..., None], BELOW_COLOR, FRAME_COLOR) / 255
    drawn[..., :3] = np.where((tone == 2)[..., None], 1.0, color)
    drawn[..., 3] = np.where(tone > 0, np.abs(total) / (top or 1.0), 0)
    return drawn


def _cell_size(grid: Grid) -> tuple[float, float]:
    """Width and height of a grid's cells, in pixels of the original image."""
    left, top, right, bottom = grid.crop_box
    return (right - left) / grid.cols, (bottom - top) / grid.rows


def _overlap(a: Grid, b: Grid) -> bool:
    """Whether two grids share more than rounding: a tenth of a cell each way."""
    boxes, shapes = np.array([a.crop_box, b.crop_box]), np.array([[a.cols, a.rows], [b.cols, b.rows]])
    shared = boxes[:, 2:].min(0) - boxes[:, :2].max(0)
    cell = ((boxes[:, 2:] - boxes[:, :2]) / shapes).min(0)
    return bool((shared > cell / 10).all())
