"""What a page of single tokens shows: its units, and the images beside them.

A unit is a token, or a cell of the image that holds several patches. Those with a place are drawn
on the image, the others stand as words beside it.

1. `token_units` makes a unit of each token, `cell_units` one of each cell.
2. `TokenUnits.page` writes them as the page's scripts read them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.prompts import prompt_text
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.inputs.views import Box
from mechvlm.view import packing
from mechvlm.view.drawn import BELOW_COLOR, FRAME_COLOR, drawn_views
from mechvlm.view.match import load_image
from mechvlm.view.pooling import PATCH_SIGN, Pool, cell_boxes, cell_names, pool_shape, token_groups


@dataclass(frozen=True)
class TokenUnits:
    """The units of one example in the sequence's order, and where they lie on its images.

    Attributes:
        inputs: the inputs.
        example: which of the batch.
        positions: the positions of each unit.
        pieces: what each unit is called: a token's text, a cell's row and column.
        kinds: "token", "query", "line break", "cell", "view", or "image" for a patch by itself.
        views: of the images, as patches.js counts them.
        cells: the unit in each cell of the views, one after the other; -1 for none.
    """

    inputs: Inputs
    example: int
    positions: tuple[tuple[int, ...], ...]
    pieces: tuple[str, ...]
    kinds: tuple[str, ...]
    views: tuple[dict, ...]
    cells: tuple[int, ...]

    @property
    def tokens(self) -> TokenMap:
        return self.inputs.token_maps[self.example]

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """The example's original images.

        Raises:
            ViewError: when one is gone.
        """
        return [load_image(self.inputs, self.example, number) for number in range(len(self.tokens.layouts))]

    def page(self) -> dict[str, Any]:
        """The units and the images as the page's scripts read them.

        Raises:
            ViewError: when an image is gone.
        """
        answer = set(self.tokens.answer.tolist())
        return {
            "model": self.inputs.model,
            "question": prompt_text(self.inputs.prompts[self.example]).strip(),
            "images": [{"src": packing.data_url(image), "size": list(image.size)} for image in self.pictures],
            "views": list(self.views),
            "cells": list(self.cells),
            "units": [
                {"piece": piece, "kind": kind, "at": own[0] if len(own) == 1 else None}
                for piece, kind, own in zip(self.pieces, self.kinds, self.positions, strict=True)
            ],
            "answer": [number for number, own in enumerate(self.positions) if own[0] in answer],
            "color": list(FRAME_COLOR),
            "negative": list(BELOW_COLOR),
        }


def token_units(inputs: Inputs, example: int) -> TokenUnits:
    """A unit for each token that is not padding."""
    tokens = inputs.token_maps[example]
    positions = tokens.all.tolist()
    unit_of = {position: number for number, position in enumerate(positions)}
    drawn = drawn_views(tokens) if tokens.patches else []
    on_image = {p for view in drawn if view.positions is not None for p in view.positions.flatten().tolist()}
    has_queries = not tokens.patches and not tokens.is_memory
    number_of = {p: i for own in tokens.images for i, p in enumerate(own.tolist())} if has_queries else {}
    pieces, kinds = [], []
    for position in positions:
        visual = tokens.modality[position] == Modality.IMAGE
        is_query, is_break = visual and not tokens.patches, visual and tokens.patches and position not in on_image
        kinds.append("query" if is_query else "line break" if is_break else "image" if visual else "token")
        pieces.append(f"q{number_of[position]}" if is_query else "\n" if is_break else tokens.strings[position])
    cells = [
        unit_of[p] if p >= 0 else -1
        for view in drawn
        if view.positions is not None
        for p in view.positions.flatten().tolist()
    ]
    views = [
        _view(view.image, view.sheet, view.name, view.grid.rows, view.grid.cols, view.grid.crop_box) for view in drawn
    ]
    own = tuple((p,) for p in positions)
    return TokenUnits(inputs, example, own, tuple(pieces), tuple(kinds), tuple(views), tuple(cells))


def cell_units(inputs: Inputs, example: int, pool: Pool) -> tuple[TokenUnits, list[str], Float[Tensor, "group pos"]]:
    """A unit for each text token and each cell of the image.

    Returns:
        The units, their names, and `member` as `token_groups` gives it.
    """
    tokens = inputs.token_maps[example]
    names, member = token_groups(tokens, pool)
    positions = tuple(tuple(row.nonzero()[:, 0].tolist()) for row in member)
    cell_of = cell_names(tokens, pool)
    unit_of = {name: number for number, name in enumerate(names) if cell_of.get(positions[number][0]) == name}
    pieces, kinds = [], []
    for name, own in zip(names, positions, strict=True):
        if own[0] not in cell_of:
            kinds.append("token")
            pieces.append(tokens.strings[own[0]])
            continue
        place = tokens.place(own[0])
        is_cell = place is not None and place.view == tokens.views[place.image][0].name
        kinds.append("query" if not tokens.patches else "cell" if is_cell else "view")
        pieces.append(name.removeprefix(PATCH_SIGN))
    down, across = pool_shape(tokens, pool)
    views, cells = [], []
    for image, grid in enumerate(tokens.grids) if tokens.patches else ():
        prefix = PATCH_SIGN if len(tokens.grids) == 1 else f"{PATCH_SIGN}{image}:"
        for row, col, box in cell_boxes(grid, down, across):
            views.append({**_view(image, 0, f"r{row}c{col}", 1, 1, box), "cells": max(down, across)})
            cells.append(unit_of[f"{prefix}r{row}c{col}"])
    units = TokenUnits(inputs, example, positions, tuple(pieces), tuple(kinds), tuple(views), tuple(cells))
    return units, names, member


def _view(image: int, sheet: int, name: str, rows: int, cols: int, box: Box) -> dict[str, Any]:
    return {"image": image, "sheet": sheet, "name": name, "rows": rows, "cols": cols, "crop": list(box)}
