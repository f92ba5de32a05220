"""A sequence in fewer parts: text tokens one by one, the image pooled into cells."""

import base64
import io
import re
from html import escape

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.errors import ViewError
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import TokenMap
from mechvlm.view.match import image_of

IMAGE = "▦"
"""Stands for a patch among the tokens."""

Pool = int | tuple[int, int] | None
"""How the image is pooled: rows x cols of cells, n for n x n (of queries: n groups), None for every patch by itself."""


def readable(piece: str) -> str:
    """A tokenizer's piece as people read it: `▁` and `Ġ` as the space they mean, byte pieces and controls by name.

    >>> readable("▁dog"), readable("<0x0A>"), readable("▁"), readable("<s>"), readable("a\\u2028b")
    (' dog', '⏎', '␣', '<s>', 'aU+2028b')
    """
    byte = re.fullmatch(r"<0x([0-7][0-9A-F])>", piece)  # from 0x80 on, a byte is no character by itself
    text = chr(int(byte[1], 16)) if byte else piece
    text = text.translate({ord("▁"): " ", ord("Ġ"): " ", ord("Ċ"): "⏎", ord("\n"): "⏎", ord("\t"): "⇥"})
    if not text.strip(" "):
        return "␣" * len(text)
    # Joiners belong to the script or emoji that they stand in; everything else unseen could hide or turn what follows.
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else f"U+{ord(c):04X}" for c in text)


def shape_of(tokens: TokenMap, pool: Pool) -> tuple[int, int]:
    """The cells of each image, as (rows, cols); groups of queries stand in one row.

    Raises:
        ViewError: for a pooling that these inputs do not have.
    """
    if not tokens.patches:
        n = len(tokens.image)
        if isinstance(pool, tuple) or not 1 <= (n if pool is None else pool) <= n:
            raise ViewError(f"pool={pool} was asked for; these {n} visual tokens are queries: choose 1 to {n} groups.")
        return 1, n if pool is None else pool
    rows, cols = min(g.rows for g in tokens.grids), min(g.cols for g in tokens.grids)
    shape = (rows, cols) if pool is None else (pool, pool) if isinstance(pool, int) else pool
    if len(shape) != 2 or not (1 <= shape[0] <= rows and 1 <= shape[1] <= cols):
        raise ViewError(f"pool={pool} was asked for; the image has {rows} x {cols} patches: choose at most so many.")
    return shape


def cells(tokens: TokenMap, pool: Pool) -> dict[int, str]:
    """The cell that each visual token lies in: position to name, such as `▦r0c1` or, of queries, `q4–7`."""
    down, across = shape_of(tokens, pool)
    found = {}
    for image, positions in enumerate(tokens.images):
        name = IMAGE if len(tokens.images) == 1 else f"{IMAGE}{image}:"
        for i, position in enumerate(positions.tolist()):
            if tokens.patches:
                grid = tokens.grids[image]
                row, col = divmod(i, grid.cols)
                found[position] = f"{name}r{row * down // grid.rows}c{col * across // grid.cols}"
            else:
                n = len(positions)
                first, last = (-(-(i * across // n + step) * n // across) for step in (0, 1))
                found[position] = f"q{first}" if last == first + 1 else f"q{first}–{last - 1}"
    return found


def groups(tokens: TokenMap, pool: Pool) -> tuple[list[str], Float[Tensor, "group pos"]]:
    """The parts of a sequence in its order, padding left out: their names, and 1 where a position belongs to one."""
    cell = cells(tokens, pool)
    found: dict[int | str, list[int]] = {}
    for position in tokens.all.tolist():
        found.setdefault(cell.get(position, position), []).append(position)
    member = torch.zeros(len(found), len(tokens))
    for row, positions in enumerate(found.values()):
        member[row, positions] = 1
    return [key if isinstance(key, str) else readable(tokens.strings[key]) for key in found], member


def pooled(
    values: Float[Tensor, "*map pos pos"], member: Float[Tensor, "group pos"]
) -> Float[Tensor, "*map group group"]:
    """[dest, src] between groups: summed over a group's sources, the mean of its destinations.

    So a row of attention weights still sums to 1, and a group of patches counts for all that they are given.
    """
    return (member / member.sum(1, keepdim=True)) @ values @ member.T


def cell_map(inputs: Inputs, example: int, pool: Pool) -> str:
    """HTML: the example's images with their cells and these cells' names. Empty for queries, which have no place.

    Raises:
        ViewError: when an image is gone.
    """
    tokens = inputs.token_maps[example]
    if not tokens.patches:
        return ""
    down, across = shape_of(tokens, pool)
    figures = []
    for number, grid in enumerate(tokens.grids):
        picture = image_of(inputs, example, number).copy()
        picture.thumbnail((480, 480))
        file = io.BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=80)
        source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        width, height = grid.image_size
        thick = max(width, height) / 240
        drawn = [f'<image href="{source}" width="{width}" height="{height}" preserveAspectRatio="none"/>']
        edges_y = [-(-r * grid.rows // down) for r in range(down + 1)]
        edges_x = [-(-c * grid.cols // across) for c in range(across + 1)]
        for r in range(down):
            for c in range(across):
                left, top, _, _ = grid.box(edges_y[r], edges_x[c])
                _, _, right, bottom = grid.box(edges_y[r + 1] - 1, edges_x[c + 1] - 1)
                drawn.append(
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
                    f'fill="none" stroke="#fff" stroke-opacity=".8" stroke-width="{thick:.2f}"/>'
                )
                if down * across <= 64:
                    size = min((right - left) / 4, (bottom - top) / 2.5, width / 12)
                    drawn.append(
                        f'<text x="{(left + right) / 2:.1f}" y="{(top + bottom) / 2:.1f}" font-size="{size:.1f}" '
                        f'stroke-width="{size / 8:.2f}">r{r}c{c}</text>'
                    )
        caption = f"image {number}" if len(tokens.grids) > 1 else "image"
        if len(tokens.grids) > 1:
            caption += f": {IMAGE}{number}:r0c0 is its top left cell"
        figures.append(
            f'<figure class="cells"><svg viewBox="0 0 {width} {height}" role="img">{"".join(drawn)}</svg>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return "".join(figures)


def line(tokens: TokenMap) -> list[str]:
    """The tokens one after the other; patches are dots, and lines end where rows of the image do."""
    labels = {p: readable(tokens.strings[p]) for p in tokens.all.tolist()}
    for image, positions in enumerate(tokens.images):
        width = tokens.grids[image].cols
        for i, p in enumerate(positions.tolist()):
            labels[p] = (" · " if tokens.patches else f" q{i}") + "\n" * (tokens.patches and (i + 1) % width == 0)
        before, last = int(positions[0]) - 1, int(positions[-1])
        if before in labels:
            labels[before] += "\n" * (not labels[before].endswith("\n"))
        labels[last] += "\n" * (not labels[last].endswith("\n"))
    return list(labels.values())


def rows_of(tokens: TokenMap, positions: list[int]) -> tuple[list[str], list[list[int]]]:
    """Names of rows of a result's points, and the points in each: rows of patches where these are all there."""
    n = len(positions)
    if tokens.patches and positions == tokens.image.tolist():
        names, rows, start = [], [], 0
        for image, grid in enumerate(tokens.grids):
            for row in range(grid.rows):
                names.append(f"row {row}" if len(tokens.grids) == 1 else f"image {image}, row {row}")
                rows.append(list(range(start, start + grid.cols)))
                start += grid.cols
        return names, rows
    size = 8 if n > 8 else -(-n // 2)  # two rows at least: of a single one, CircuitsVis shows one column
    rows = [list(range(start, min(start + size, n))) for start in range(0, n, size)]
    names = []
    for points in rows:
        there = [positions[i] for i in points]
        run = len(there) > 2 and there[-1] - there[0] == len(there) - 1
        names.append("positions " + (f"{there[0]} to {there[-1]}" if run else ", ".join(map(str, there))))
    return names, rows
