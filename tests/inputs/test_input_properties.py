"""What always holds of grids and token maps, for images of any size and any crop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPImageProcessor

from helpers.uneven import token_map
from mechvlm.inputs.grids import PatchGrid, patch_grid

PATCH = 14
sides = st.integers(1, 400)


@st.composite
def grids(draw) -> PatchGrid:
    """The grid of a processor that resizes the short side and crops the middle."""
    rows, cols, edge = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 120))
    pixels = (rows * PATCH, cols * PATCH)
    processor = CLIPImageProcessor(
        size={"shortest_edge": edge}, crop_size=dict(zip(("height", "width"), pixels, strict=True)),
        do_resize=draw(st.booleans()),
    )  # fmt: skip
    return patch_grid((draw(sides), draw(sides)), processor, pixels, PATCH)


@given(grids())
def test_boxes_tile_the_crop(grid):
    """Neighbours share an edge, and all boxes together are the crop."""
    boxes = grid.boxes().double()
    assert boxes.shape == (grid.rows, grid.cols, 4)
    close = {"rtol": 1e-4, "atol": 1e-2}
    torch.testing.assert_close(boxes[:, 1:, 0], boxes[:, :-1, 2], **close)
    torch.testing.assert_close(boxes[1:, :, 1], boxes[:-1, :, 3], **close)
    area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sum()
    left, top, right, bottom = grid.crop_box
    assert float(area) == pytest.approx((right - left) * (bottom - top), rel=1e-3)
    # The middle of the crop is the middle of the image, to a pixel of the resized one.
    for i, (first, last) in enumerate(((left, right), (top, bottom))):
        scale = grid.image_size[i] / grid.resized[i]
        assert abs((first + last) / 2 - grid.image_size[i] / 2) <= scale


@given(grids(), st.lists(st.floats(-50, 450), min_size=4, max_size=4), st.integers(0, 3))
def test_shares_and_margins(grid, corners, margin):
    box = (min(corners[::2]), min(corners[1::2]), max(corners[::2]), max(corners[1::2]))
    covered = grid.covered(box)
    assert ((covered >= 0) & (covered <= 1 + 1e-4)).all()
    left, top, right, bottom = grid.crop_box
    everything = grid.covered((left - 1, top - 1, right + 1, bottom + 1))
    torch.testing.assert_close(everything, torch.ones_like(everything), rtol=0, atol=1e-4)
    inside, grown = grid.inside(box), grid.inside(box, margin=margin)
    assert (grown | ~inside).all(), "a margin loses no patch"
    for row, col in grown.nonzero().tolist():
        near = inside[max(0, row - margin) : row + margin + 1, max(0, col - margin) : col + margin + 1]
        assert near.any(), "a patch of the margin has a covered one near"
    assert bool(grown.any()) == bool(inside.any())


@st.composite
def maps(draw):
    """A token map of any order, with any number of images of one size."""
    rows, cols, images = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    grid = PatchGrid(rows, cols, PATCH, (cols * 20, rows * 30), (cols * PATCH, rows * PATCH), (0, 0))
    kinds = ["i" * (rows * cols)] * images
    for text in draw(st.lists(st.text("st", min_size=0, max_size=4), min_size=images + 1, max_size=images + 1)):
        kinds.insert(draw(st.integers(0, len(kinds))), text)
    return token_map("." * draw(st.integers(0, 3)) + "".join(kinds), (grid,) * images)


@given(maps())
def test_every_position_once(tokens):
    together = torch.cat([tokens.image, tokens.question, torch.tensor([tokens.last])])
    assert sorted(set(together.tolist())) == tokens.all.tolist()
    assert torch.cat([tokens.image, tokens.text, tokens.special]).sort().values.tolist() == tokens.all.tolist()
    assert torch.equal(torch.cat(tokens.images), tokens.image)
    assert tokens.last == len(tokens) - 1


@given(maps())
def test_cells_and_positions_undo_each_other(tokens):
    for position in tokens.image.tolist():
        image, row, col = tokens.cell(position)
        assert tokens.position(row, col, image) == position
    grid = tokens.grids[0]
    for image in range(len(tokens.grids)):
        for row, col in ((0, grid.cols - 1), (grid.rows - 1, 0)):
            middle = grid.box(row, col)
            assert tokens.pos_in_box(middle, image).tolist() == [tokens.position(row, col, image)]


@given(maps(), st.data())
def test_a_selection_by_number_is_itself(tokens, data):
    numbers = data.draw(st.lists(st.sampled_from(tokens.all.tolist()), min_size=1))
    assert tokens.select(numbers).tolist() == numbers
    for name in ("image", "all"):
        assert torch.equal(tokens.select(name), getattr(tokens, name))
