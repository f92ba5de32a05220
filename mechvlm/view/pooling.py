"""A sequence's tokens as a view shows them: text tokens one by one, the image pooled into cells.

A cell is a rectangle of patches. With several images each has its own cells; queries, which have no
place on the image, are pooled into groups of neighbours instead.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.errors import ViewError
from mechvlm.inputs.tokens import TokenMap
from mechvlm.inputs.views import Box, Grid

PATCH_SIGN = "▦"
"""Stands for a patch or a cell among the tokens."""

Pool = int | tuple[int, int] | None
"""How an image is pooled: (rows, cols) of cells, n for n x n cells (for queries: n groups), or None
for every patch or query by itself."""


def readable(piece: str) -> str:
    """A token's text as people see it: signs for line breaks, tabs and bare spaces.

    Other control characters become their numbers.

    >>> readable(" dog"), readable("\\n"), readable(" "), readable("<s>"), readable("a\\u2028b")
    (' dog', '⏎', '␣', '<s>', 'aU+2028b')
    """
    text = piece.translate({ord("\n"): "⏎", ord("\t"): "⇥"})
    if not text.strip(" "):
        return "␣" * len(text)
    # Joiners belong to their script or emoji. Other invisible characters could hide or reverse the
    # text after them.
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else f"U+{ord(c):04X}" for c in text)


def pool_shape(tokens: TokenMap, pool: Pool) -> tuple[int, int]:
    """The cells of each image, as (rows, cols); n groups of queries are (1, n).

    Raises:
        ViewError: when these inputs have fewer patches or queries.
    """
    if not tokens.patches:
        n = len(tokens.image)
        if isinstance(pool, tuple) or not 1 <= (n if pool is None else pool) <= n:
            raise ViewError(f"pool={pool} was asked for; these {n} visual tokens are queries: choose 1 to {n} groups.")
        return 1, n if pool is None else pool
    rows, cols = min(g.rows for g in tokens.grids), min(g.cols for g in tokens.grids)
    shape = (rows, cols) if pool is None else (pool, pool) if isinstance(pool, int) else pool
    if len(shape) != 2 or not (1 <= shape[0] <= rows and 1 <= shape[1] <= cols):
        raise ViewError(
            f"pool={pool} was asked for; the image has {rows} x {cols} patches: choose at most that many cells."
        )
    return shape


def cell_names(tokens: TokenMap, pool: Pool) -> dict[int, str]:
    """Each visual token's cell, position to name: `▦r0c1`, or `q4–7` for a group of queries.

    The cells are those of the view of the whole image; every other view is one cell, `▦mosaic`, and
    so are an image's tokens without a place, `▦breaks`.
    """
    down, across = pool_shape(tokens, pool)
    names = {}
    for image, positions in enumerate(tokens.images):
        prefix = PATCH_SIGN if len(tokens.images) == 1 else f"{PATCH_SIGN}{image}:"
        n = len(positions)
        for i, position in enumerate(positions.tolist()):
            if not tokens.patches:
                first, end = (-(-(i * across // n + step) * n // across) for step in (0, 1))
                names[position] = f"q{first}" if end == first + 1 else f"q{first}–{end - 1}"
                continue
            place, whole = tokens.place(position), tokens.views[image][0]
            if place is None or place.view != whole.name:
                names[position] = prefix + ("breaks" if place is None else place.view)
            else:
                names[position] = f"{prefix}r{place.row * down // whole.rows}c{place.col * across // whole.cols}"
    return names


def token_groups(tokens: TokenMap, pool: Pool) -> tuple[list[str], Float[Tensor, "group pos"]]:
    """The text tokens and cells of a sequence in their order, without padding.

    Returns:
        Their names, and `member` [group, pos]: 1 where a position belongs to a group, else 0.
    """
    names = cell_names(tokens, pool)
    groups: dict[int | str, list[int]] = {}  # by cell name, or by position for a token of its own
    for position in tokens.all.tolist():
        groups.setdefault(names.get(position, position), []).append(position)
    member = torch.zeros(len(groups), len(tokens), dtype=torch.float32)
    for row, positions in enumerate(groups.values()):
        member[row, positions] = 1
    return [key if isinstance(key, str) else readable(tokens.strings[key]) for key in groups], member


def pool_attention(
    values: Float[Tensor, "*map pos pos"], member: Float[Tensor, "group pos"]
) -> Float[Tensor, "*map group group"]:
    """Maps [dest, src] between groups: a sum over a group's sources, a mean over its destinations.

    So a row of attention weights still sums to 1, and a group of patches counts with all of the
    attention that its patches get.
    """
    return (member / member.sum(1, keepdim=True)) @ values @ member.T


def cell_boxes(grid: Grid, down: int, across: int) -> Iterator[tuple[int, int, Box]]:
    """Each cell's row and column, and where it lies: (left, top, right, bottom) in original pixels.

    A cell holds the patches that `cell_names` gives to it, the last one in each direction as many
    as are left.
    """
    # Each cell's first row and column of patches, as `cell_names` divides them.
    edges_y = [-(-r * grid.rows // down) for r in range(down + 1)]
    edges_x = [-(-c * grid.cols // across) for c in range(across + 1)]
    for r in range(down):
        for c in range(across):
            left, top, _, _ = grid.box(edges_y[r], edges_x[c])
            _, _, right, bottom = grid.box(edges_y[r + 1] - 1, edges_x[c + 1] - 1)
            yield r, c, (left, top, right, bottom)


def position_rows(tokens: TokenMap, positions: list[int]) -> tuple[list[str], list[list[int]]]:
    """A result's positions in rows, as (names of the rows, indices into `positions` in each).

    Where they are all visual tokens and have places, rows are the rows of the views, and those
    without a place stand in the last row; otherwise eight in a row.
    """
    n = len(positions)
    names: list[str] = []
    rows: list[list[int]] = []
    if tokens.patches and positions == tokens.image.tolist():
        point = {position: number for number, position in enumerate(positions)}
        for image, views in enumerate(tokens.views):
            for view in views:
                prefix = f"image {image}, " * (len(tokens.views) > 1) + f"{view.name}, " * (len(views) > 1)
                for row, of_row in enumerate(view.positions.tolist()):
                    names.append(f"{prefix}row {row}")
                    rows.append([point[position] for position in of_row if position >= 0])
        if len(tokens.without_place):
            names.append("line breaks")
            rows.append([point[position] for position in tokens.without_place.tolist()])
        return names, rows
    # At least two rows: of a single one, CircuitsVis would show one column.
    size = 8 if n > 8 else -(-n // 2)
    rows = [list(range(start, min(start + size, n))) for start in range(0, n, size)]
    for points in rows:
        row_positions = [positions[i] for i in points]
        first, last = row_positions[0], row_positions[-1]
        is_run = len(points) > 2 and last - first == len(points) - 1
        names.append("positions " + (f"{first} to {last}" if is_run else ", ".join(map(str, row_positions))))
    return names, rows
