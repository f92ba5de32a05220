"""How the visual tokens of an image tile what its processor returned.

`find_layout` knows three ways, and takes the one that the shapes and the number of tokens allow:

1. patches: the processor returns the image cut into patches; a token is one of them, or a square
   of s x s, which follow each other or lie in the image's rows (Qwen-VL, Gemma 4);
2. one tile, or several with equally many tokens each (Gemma 3, Pixtral, InternVL, Idefics 3);
3. the whole image, and then all tiles put together without their padding, with a token for a line
   break after each row (LLaVA-NeXT, LLaVA-OneVision).

Anything else has no place, and says why. Where the pixels lie comes from a coordinate image
(`mechvlm.inputs.coordinates`), so a box is right wherever the processor put the pixels.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.inputs.coordinates import Seen, fit_line
from mechvlm.inputs.views import AreaGrid, Layout, View, shows_whole

Size = tuple[int, int]
Line = tuple[float, float]
"""(slope, offset) of a coordinate, as `fit_line` returns it."""

MOST_PER_SIDE = 128
"""Tokens along the side of a tile; more are not looked for."""


def find_layout(seen: Seen, token_shape: Size = (1, 1), most_tiles: int | None = None) -> Layout:
    """The layout of the tokens of one image.

    Args:
        seen: what the processor made of a coordinate image of the same size.
        token_shape: (height, width) of what a token covers of a tile, up to a factor: (1, 4) where
            it is four patches side by side.
        most_tiles: with line breaks: tiles put together are shrunk to the area of so many.
    """
    n_pieces, n, views = len(seen.x), seen.n_tokens, None
    if not n_pieces:
        views = None
    elif "image_sizes" in seen.keys and len(seen.shape) == 5:
        views = _with_line_breaks(seen, most_tiles)
    else:
        if n_pieces >= n:
            views = _patches(seen)
        if views is None and n % n_pieces == 0:
            views = _tiles(seen, token_shape)
    if views is not None:
        return Layout(n, seen.image_size, views)
    reason = (
        f"Where this model's visual tokens lie is not known: its processor returned pixels {list(seen.shape)} for {n} tokens, "
        "and mechvlm knows no order in which they tile them. They have no places."
    )
    return Layout(n, seen.image_size, reason=reason)


# -- patches ---------------------------------------------------------------------------------------


def _patches(seen: Seen) -> tuple[View, ...] | None:
    """One view of tokens that are patches, or squares of patches."""
    real = seen.inside.flatten(1).any(1)  # the others fill up the tensor
    x, y, inside = (values[real].flatten(1) for values in (seen.x, seen.y, seen.inside))
    left, top = ((value * inside).sum(1) / inside.sum(1) for value in (x, y))
    col, n_cols = _ranks(left)
    row, n_rows = _ranks(top)
    n, side = seen.n_tokens, math.isqrt(len(x) // max(seen.n_tokens, 1))
    if len(x) != n * side**2 or len(x) != n_rows * n_cols or n_rows % side or n_cols % side:
        return None
    rows, cols = n_rows // side, n_cols // side
    together = (row // side * cols + col // side).equal(torch.arange(n).repeat_interleave(side**2))
    if not together and not (row * n_cols + col).equal(torch.arange(len(x))):
        return None
    (ax, bx), (ay, by) = _line_over(left, col, x), _line_over(top, row, y)
    width, height = seen.image_size
    area = (bx * width, by * height, (ax * n_cols + bx) * width, (ay * n_rows + by) * height)
    return (View("whole", AreaGrid(rows, cols, seen.image_size, area), torch.arange(n).reshape(rows, cols)),)


def _ranks(values: Float[Tensor, " n"]) -> tuple[Int[Tensor, " n"], int]:
    """The number of each value among the distinct ones, and how many these are."""
    ordered, order = values.sort()
    gaps = ordered.diff()
    steps = gaps > max(1e-4, 0.2 * float(gaps.max())) if len(gaps) else gaps.bool()
    ranks = torch.zeros(len(values), dtype=torch.long)
    ranks[order[1:]] = steps.cumsum(0)
    return ranks, int(steps.sum()) + 1


def _line_over(centres: Float[Tensor, " n"], ranks: Int[Tensor, " n"], values: Float[Tensor, "n value"]) -> Line:
    """The line over the columns (or rows) of patches, from their centres."""
    n = int(ranks.max()) + 1
    means = torch.stack([centres[ranks == number].mean() for number in range(n)])
    if n > 1:
        return fit_line(means, torch.ones(n, dtype=torch.bool))
    # A single column: evenly spread values have a variance of width² / 12.
    width = math.sqrt(12 * float(values.double().var(1, unbiased=False).mean()))
    return width, float(means[0]) - width / 2


# -- tiles -----------------------------------------------------------------------------------------


def _tiles(seen: Seen, token_shape: Size) -> tuple[View, ...] | None:
    """Views of tiles that have equally many tokens each, in reading order."""
    n_tiles, height, width = seen.x.shape
    n = seen.n_tokens // n_tiles
    shape = _rows_and_cols(n, height / token_shape[0], width / token_shape[1])
    lines = [_lines(seen, tile) for tile in range(n_tiles)]
    if shape is None or None in lines:
        return None
    grids = [_area_grid(shape, seen, pair, (0, 0, width, height)) for pair in lines if pair is not None]
    whole = [shows_whole(grid) for grid in grids]
    first = whole.index(True) if any(whole) else 0
    names = _tile_names(grids, first) if any(whole) or n_tiles > 1 else ["whole"]
    numbers = torch.arange(seen.n_tokens).reshape(n_tiles, *shape)
    views = [View(*parts) for parts in zip(names, grids, numbers, strict=True)]
    return (views[first], *views[:first], *views[first + 1 :])


def _rows_and_cols(n: int, height: float | int, width: float | int) -> Size | None:
    """The rows and columns of n equal cells as wide as high; None where they do not fit."""
    rows = round(math.sqrt(n * height / width))
    if rows < 1 or n % rows or abs(rows * width / (n // rows * height) - 1) > 1e-6:
        return None
    return rows, n // rows


def _lines(seen: Seen, tile: int) -> tuple[Line, Line] | None:
    """The lines of x over a tile's columns and of y over its rows.

    None for a tile of padding, and where no lines say where its pixels were: it was turned, say.
    """
    inside = seen.inside[tile]
    lines = []
    for values, axis in ((seen.x[tile], 0), (seen.y[tile], 1)):
        counts = inside.sum(axis)
        if (counts > 0).sum() < 2:
            return None
        slope, offset = fit_line((values * inside).sum(axis) / counts.clamp(min=1), counts > 0)
        at = slope * (torch.arange(len(counts)) + 0.5) + offset
        off = (values - (at if axis == 0 else at[:, None])).abs()[inside].mean()
        if slope <= 0 or off > 0.1 * slope * len(counts) + 1 / 255:
            return None
        lines.append((slope, offset))
    return lines[0], lines[1]


def _area_grid(shape: Size, seen: Seen, lines: tuple[Line, Line], part: tuple[float | int, ...]) -> AreaGrid:
    """A grid over a part of the pixels, (left, top, right, bottom)."""
    (width, height), ((ax, bx), (ay, by)), (left, top, right, bottom) = seen.image_size, lines, part
    area = (ax * left + bx) * width, (ay * top + by) * height, (ax * right + bx) * width, (ay * bottom + by) * height
    return AreaGrid(*shape, seen.image_size, area)


def _tile_names(grids: list[AreaGrid], whole: int) -> list[str]:
    """A name for each tile: "whole", "thumbnail" for a whole that comes after tiles, "tile 0,1"."""
    others = [grid.area for number, grid in enumerate(grids) if number != whole or not shows_whole(grid)]
    lefts, tops = (_distinct([area[axis] for area in others]) for axis in (0, 1))
    names = []
    for number, grid in enumerate(grids):
        if number == whole and shows_whole(grid):
            names.append("thumbnail" if number else "whole")
        else:
            row, col = (_nearest(edges, grid.area[axis]) for edges, axis in ((tops, 1), (lefts, 0)))
            names.append(f"tile {row},{col}")
    return names if len(set(names)) == len(names) else [f"part {number}" for number in range(len(names))]


def _distinct(values: list[float]) -> list[float]:
    """The values without those that are a pixel or less beyond another."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value - kept[-1] > 2:
            kept.append(value)
    return kept


def _nearest(values: list[float], value: float) -> int:
    return min(range(len(values)), key=lambda number: abs(values[number] - value))


# -- line breaks -----------------------------------------------------------------------------------


def _with_line_breaks(seen: Seen, most_tiles: int | None) -> tuple[View, ...] | None:
    """The whole image, and then the tiles put together, with a line break after each row.

    A single tile has one line break, at its end.
    """
    n_tiles, height, width = seen.x.shape
    base = _lines(seen, 0)
    if base is None or height != width:
        return None
    if n_tiles == 1:
        shape = _rows_and_cols(seen.n_tokens - 1, height, width)
        return shape and (_whole(seen, shape[0], base),)
    for down, across in _arrangements(seen):
        if (lines := _mosaic_lines(seen, down, across)) is None:
            continue
        for side in range(1, MOST_PER_SIDE + 1):
            cut = _unpadded(seen.image_size, down * side, across * side)
            rows, cols = down * side - 2 * cut[0], across * side - 2 * cut[1]
            shape = _shrunk(rows, cols, side, most_tiles)
            if side**2 + shape[0] * (shape[1] + 1) != seen.n_tokens:
                continue
            size = height / side  # of a token, in pixels of the tiles
            part = (cut[1] * size, cut[0] * size, (cut[1] + cols) * size, (cut[0] + rows) * size)
            grid = _area_grid(shape, seen, lines, part)
            numbers = torch.arange(shape[0] * (shape[1] + 1)).reshape(shape[0], -1)[:, :-1] + side**2
            return _whole(seen, side, base), View("mosaic", grid, numbers)
    return None


def _whole(seen: Seen, side: int, lines: tuple[Line, Line]) -> View:
    """The view of the first tile, of side x side tokens."""
    height, width = seen.x.shape[1:]
    grid = _area_grid((side, side), seen, lines, (0, 0, width, height))
    return View("whole", grid, torch.arange(side**2).reshape(side, side))


def _arrangements(seen: Seen) -> Iterator[Size]:
    """The (rows, columns) in which the tiles after the first could be put together."""
    n = len(seen.x) - 1
    return ((down, n // down) for down in range(1, n + 1) if n % down == 0)


def _mosaic_lines(seen: Seen, down: int, across: int) -> tuple[Line, Line] | None:
    """The lines over all tiles put together; None where the tiles do not lie so."""
    height, width = seen.x.shape[1:]
    lines = {tile - 1: pair for tile in range(1, len(seen.x)) if (pair := _lines(seen, tile)) is not None}
    if not lines:
        return None
    together = []
    for axis, side in ((0, width), (1, height)):
        slope = sum(pair[axis][0] for pair in lines.values()) / len(lines)
        places = [divmod(tile, across)[1 - axis] for tile in lines]
        offsets = [pair[axis][1] - slope * side * place for pair, place in zip(lines.values(), places, strict=True)]
        if max(offsets) - min(offsets) > 0.25 * slope * side:
            return None
        together.append((slope, sum(offsets) / len(offsets)))
    return together[0], together[1]


def _unpadded(image_size: Size, rows: int, cols: int) -> Size:
    """(rows, columns) of tokens that are cut off at each side, as padding.

    transformers' rule: the image keeps its shape and fills the tiles in one direction.
    """
    width, height = image_size
    if width / height > cols / rows:
        return (rows - int(round(height * cols / width, 7))) // 2, 0
    return 0, (cols - int(round(width * rows / height, 7))) // 2


def _shrunk(rows: int, cols: int, side: int, most_tiles: int | None) -> Size:
    """Rows and columns after LLaVA-OneVision's shrinking to the area of `most_tiles` tiles."""
    ratio = math.sqrt(rows * cols / (most_tiles * side**2)) if most_tiles else 1.0
    return (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)
