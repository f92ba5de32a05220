"""Where the visual tokens of an image lie on it.

A model sees an image once or several times: as a whole, and then perhaps in tiles. Each time is a
`View`, whose tokens are the cells of a grid. All views of an image are its `Layout`.

>>> whole = View("whole", grid, torch.arange(6).view(2, 3))
>>> layout = Layout(6, image_size=(60, 40), views=(whole,))

Tokens that lie in no view have no place on the image: line breaks, and queries, each of which reads
the whole image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the original image, x to the right and y down."""

QUERIES = (
    "This model's visual tokens are queries: each reads the whole image and has no place on it. mechvlm.query_reading gives "
    "a map [query, row, col] of where each one reads, where they come from a Q-Former."
)
"""Why queries have no place."""

UNPLACED = (
    "Where this model's visual tokens lie is not known: its states do not follow the pixels where they would tile the image, so "
    "that each may read more of it."
)
"""Why tokens of a model that was asked have no place."""

MEMORY = "This model's image is a memory that its cross-attention layers read: no position of the sequence holds a visual token."
"""Why there are no visual tokens."""


class Grid:
    """Cells in rows and columns that lie on the original image.

    A box is in pixels of the ORIGINAL image, so that it can be drawn on it. A cell of padding has
    its box outside the image: left or top below 0, or right or bottom beyond its size.

    Attributes:
        rows, cols: number of rows and of columns.
        image_size: (width, height) of the original image.
    """

    rows: int
    cols: int
    image_size: tuple[int, int]

    def box(self, row: int, col: int) -> Box:
        """One cell's (left, top, right, bottom) in original pixels.

        Raises:
            IndexError: for a row or column outside the grid.
        """
        raise NotImplementedError

    def check_cell(self, row: int, col: int) -> None:
        """Raises IndexError for a row or column outside the grid."""
        if not (0 <= row < self.rows and 0 <= col < self.cols):
            raise IndexError(f"row {row}, col {col} is outside the grid of {self.rows} rows x {self.cols} cols.")

    @property
    def crop_box(self) -> Box:
        """The part that the cells cover, (left, top, right, bottom) in original pixels.

        It reaches beyond the image where the processor pads.
        """
        (left, top, _, _), (_, _, right, bottom) = self.box(0, 0), self.box(self.rows - 1, self.cols - 1)
        return left, top, right, bottom

    @property
    def visible_box(self) -> Box:
        """The part of the image that the model sees: `crop_box` without padding."""
        (left, top, right, bottom), (width, height) = self.crop_box, self.image_size
        return max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))

    def boxes(self) -> Float[Tensor, "row col 4"]:
        """All cells' boxes, (left, top, right, bottom) in original pixels."""
        boxes = [[self.box(r, c) for c in range(self.cols)] for r in range(self.rows)]
        return torch.tensor(boxes, dtype=torch.float32)

    def covered(self, box: Sequence[float | int]) -> Float[Tensor, "row col"]:
        """Share of each cell's area, 0 to 1, that lies inside a box given in original pixels."""
        b = self.boxes()
        width = (b[..., 2].clamp(max=box[2]) - b[..., 0].clamp(min=box[0])).clamp(min=0)
        height = (b[..., 3].clamp(max=box[3]) - b[..., 1].clamp(min=box[1])).clamp(min=0)
        return width * height / ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]))

    def inside(self, box: Sequence[float | int], covered: float = 0.5, margin: int = 0) -> Bool[Tensor, "row col"]:
        """Which cells lie in a box.

        Args:
            box: (left, top, right, bottom) in original pixels.
            covered: share of a cell's area that must lie in the box.
            margin: neighbours of these cells, up to so many cells away (diagonals as well), are
                counted too.

        Raises:
            ValueError: for a margin below 0.
        """
        if margin < 0:
            raise ValueError(f"A margin of {margin} patches was asked for; it must be 0 or more.")
        is_covered = (self.covered(box) >= covered).float()[None]
        return torch.nn.functional.max_pool2d(is_covered, 2 * margin + 1, stride=1, padding=margin)[0] > 0


@dataclass(frozen=True)
class AreaGrid(Grid):
    """A grid of equal cells over an area of the image, as a coordinate image shows it.

    >>> AreaGrid(2, 3, (60, 40), (0.0, 0.0, 60.0, 40.0)).box(1, 2)
    (40.0, 20.0, 60.0, 40.0)

    Attributes:
        rows, cols: number of rows and of columns.
        image_size: (width, height) of the original image.
        area: what all cells cover together, (left, top, right, bottom) in original pixels; beyond
            the image where the processor pads.
    """

    rows: int
    cols: int
    image_size: tuple[int, int]
    area: Box

    def box(self, row: int, col: int) -> Box:
        """One cell's (left, top, right, bottom) in original pixels; see `Grid.box`."""
        self.check_cell(row, col)
        left, top, right, bottom = self.area
        width, height = (right - left) / self.cols, (bottom - top) / self.rows
        return left + col * width, top + row * height, left + (col + 1) * width, top + (row + 1) * height


@dataclass(frozen=True)
class View:
    """One look of the model at an image: the whole of it, or a part.

    Attributes:
        name: "whole", "tile 0,1" (row and column of the tile), "mosaic" (tiles put together),
            "thumbnail" (the whole after tiles).
        grid: where its tokens lie.
        positions: of its tokens, -1 where a cell has none: in the sequence for a view of a
            `TokenMap`, among the image's own tokens for a view of a `Layout`.
    """

    name: str
    grid: Grid
    positions: Int[Tensor, "row col"]

    @property
    def rows(self) -> int:
        """Number of rows of tokens."""
        return self.grid.rows

    @property
    def cols(self) -> int:
        """Number of columns of tokens."""
        return self.grid.cols


@dataclass(frozen=True)
class Place:
    """Where one visual token lies.

    Attributes:
        image: number of the image in the prompt.
        view: name of the view.
        row, col: in the view's grid.
        box: (left, top, right, bottom) in pixels of the original image.
    """

    image: int
    view: str
    row: int
    col: int
    box: Box


@dataclass(frozen=True)
class Layout:
    """The visual tokens of one image.

    Attributes:
        n_tokens: how many there are.
        image_size: (width, height) of the original image.
        views: the model's looks at the image; one that shows the whole is first. Empty where no
            token has a place.
        grid: the grid of the vision encoder's patches, where tokens are queries that read them;
            None where it is not known.
        reason: why no token has a place; "" where they have.
    """

    n_tokens: int
    image_size: tuple[int, int]
    views: tuple[View, ...] = ()
    grid: Grid | None = None
    reason: str = ""

    def placed(self, positions: Int[Tensor, " n"]) -> tuple[View, ...]:
        """The views with the positions in a sequence that its tokens have, in order."""
        return tuple(
            replace(view, positions=torch.where(view.positions < 0, -1, positions[view.positions.clamp(min=0)]))
            for view in self.views
        )


def one_grid(grid: Grid) -> Layout:
    """The layout of tokens that are the cells of one grid, in reading order."""
    n = grid.rows * grid.cols
    return Layout(n, grid.image_size, (View("whole", grid, torch.arange(n).reshape(grid.rows, grid.cols)),))


def shows_whole(grid: Grid) -> bool:
    """Whether a grid covers the whole image, up to a cell's half at each edge."""
    (left, top, right, bottom), (width, height) = grid.crop_box, grid.image_size
    x, y = (right - left) / grid.cols / 2, (bottom - top) / grid.rows / 2
    return left <= x and top <= y and right >= width - x and bottom >= height - y
