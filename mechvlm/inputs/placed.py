"""Where visual tokens lie on their images: the part of a `TokenMap` that knows rows and columns."""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.inputs.views import MEMORY, Grid, Layout, Place, View, shows_whole


class Placed:
    """Visual tokens at positions `image`, which lie on their images as `layouts` say."""

    ids: Int[Tensor, " pos"]
    layouts: tuple[Layout, ...]

    @cached_property
    def image(self) -> Int[Tensor, " n"]:
        """Positions of the visual tokens of all images, in order."""
        raise NotImplementedError

    @cached_property
    def images(self) -> tuple[Int[Tensor, " n"], ...]:
        """Positions of the visual tokens, one tensor per image."""
        return self.image.split([layout.n_tokens for layout in self.layouts])

    @cached_property
    def views(self) -> tuple[tuple[View, ...], ...]:
        """The model's looks at each image, with the positions of their tokens.

        The first of an image shows the whole of it, where one does. Queries have no view.

        >>> [(view.name, view.rows, view.cols) for view in tokens.views[0]]
        [('whole', 24, 24), ('mosaic', 48, 36)]
        """
        return tuple(layout.placed(own) for layout, own in zip(self.layouts, self.images, strict=True))

    @property
    def is_memory(self) -> bool:
        """Whether the image is a memory beside the sequence, so that no token is visual."""
        return any(layout.reason == MEMORY for layout in self.layouts)

    @property
    def patches(self) -> bool:
        """True if visual tokens have places: each is a patch, or a group of patches, of a view.

        False for queries, which read the whole image.
        """
        return all(layout.views for layout in self.layouts)

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Each image's grid: that of its first view, which shows the whole image.

        For queries it is the grid of the patches that they read.

        Raises:
            ValueError: where an image has no such grid.
        """
        return tuple(self._grid_of(image) for image in range(len(self.layouts)))

    @cached_property
    def without_place(self) -> Int[Tensor, " n"]:
        """Positions of the visual tokens that have no place: line breaks between rows, queries."""
        placed = [view.positions.flatten() for views in self.views for view in views]
        return self.image[~torch.isin(self.image, torch.cat(placed))] if placed else self.image

    @cached_property
    def whole_cells(self) -> Int[Tensor, "pos 3"]:
        """(image, row, col) of each position in the view of the whole image; -1 where it is none.

        All are -1 for queries, and where the image is a memory.
        """
        cells = torch.full((len(self.ids), 3), -1)
        for image, views in enumerate(() if self.is_memory else self.views):
            for grid in (view.positions for view in views[:1]):  # queries have no view
                row, col = (grid >= 0).nonzero(as_tuple=True)
                cells[grid[row, col]] = torch.stack([torch.full_like(row, image), row, col], 1)
        return cells

    def position(self, row: int, col: int, image: int = 0, view: int | str = 0) -> int:
        """The position of the visual token at a row and a column.

        Args:
            row: in the view's grid.
            col: likewise.
            image: which image of the prompt.
            view: number or name of the view; 0 shows the whole image.

        Raises:
            ValueError: where visual tokens have no places, as queries.
            IndexError: for an image or a view that does not exist, a row or column outside the
                grid, or a cell without a token.
        """
        views = self._views(image)
        numbers = [n for n, own in enumerate(views) if view in (n, own.name)]
        if not numbers:
            names = ", ".join(f"{n} ({own.name})" for n, own in enumerate(views))
            raise IndexError(f"View {view!r} was asked for; image {image} has the views {names}.")
        shown = views[numbers[0]]
        shown.grid.check_cell(row, col)
        position = int(shown.positions[row, col])
        if position < 0:
            raise IndexError(f"row {row}, col {col} of the view {shown.name!r} holds no token.")
        return position

    def place(self, position: int) -> Place | None:
        """Where the visual token at a position lies; None for one without a place.

        >>> tokens.place(40)
        Place(image=0, view='whole', row=1, col=3, box=(42.0, 14.0, 56.0, 28.0))

        Raises:
            ValueError: when the position holds no visual token.
        """
        if position in self._cells:
            image, view, row, col = self._cells[position]
            shown = self.views[image][view]
            return Place(image, shown.name, row, col, shown.grid.box(row, col))
        if not (self.image == position).any():
            raise ValueError(f"Position {position} holds no visual token; they are at {self.image.tolist()}.")
        return None

    def cell(self, position: int) -> tuple[int, int, int]:
        """(image, row, col) of the patch at a position, in the view that shows the whole image.

        Raises:
            ValueError: where visual tokens have no places, as queries, the position holds no visual
                token, or it lies in another view or in none: `place` says where.
        """
        for image in range(len(self.layouts)):
            self._views(image)
        place = self.place(position)
        if place is None:
            raise ValueError(f"Position {position} holds a visual token without a place, such as a line break.")
        if place.view != (first := self.views[place.image][0].name):
            raise ValueError(
                f"Position {position} lies in the view {place.view!r} of image {place.image}, not in {first!r}: "
                "tokens.place(position) gives its row and column there."
            )
        return place.image, place.row, place.col

    def pos_in_box(
        self, box: Sequence[float | int], image: int = 0, covered: float = 0.5, margin: int = 0
    ) -> Int[Tensor, " n"]:
        """Positions of the patches that lie in a box, in all views of the image.

        Args:
            box: (left, top, right, bottom) in pixels of the original image.
            image: which image of the prompt.
            covered: share of a patch's area that must lie in the box.
            margin: neighbours of these patches, up to so many patches away (diagonals as well), are
                included too.

        Raises:
            ValueError: where visual tokens have no places, as queries.
            IndexError: for an image that does not exist.
        """
        views = self._views(image)
        positions = torch.cat([view.positions[view.grid.inside(box, covered, margin)] for view in views])
        return positions[positions >= 0].sort().values

    @cached_property
    def _cells(self) -> dict[int, tuple[int, int, int, int]]:
        """(image, view, row, col) of each position that has a place."""
        cells = {}
        for image, views in enumerate(self.views):
            for number, view in enumerate(views):
                for row, col in (view.positions >= 0).nonzero().tolist():
                    cells[int(view.positions[row, col])] = (image, number, row, col)
        return cells

    def _views(self, image: int) -> tuple[View, ...]:
        """The views of one image, if its visual tokens have places."""
        if not 0 <= image < len(self.layouts):
            raise IndexError(f"Image {image} was asked for; the prompt holds {len(self.layouts)}.")
        if not self.views[image]:
            raise ValueError(self.layouts[image].reason)
        return self.views[image]

    def _grid_of(self, image: int) -> Grid:
        layout = self.layouts[image]
        if not layout.views:
            if layout.grid is None:
                raise ValueError(f"{layout.reason} The grid of the vision encoder's patches is not known here.")
            return layout.grid
        if len(layout.views) > 1 and not shows_whole(layout.views[0].grid):
            raise ValueError(
                f"The model sees image {image} in {len(layout.views)} parts and never as a whole, so it has no one grid: take "
                "tokens.views."
            )
        return layout.views[0].grid
