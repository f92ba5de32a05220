"""Inputs without symmetry: grids that are not square, groups of 2, 1 and 3 images, odd crops."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from helpers.images import noise_image
from helpers.uneven import ending_vlm, image_groups, token_map, wide_vlm
from mechvlm.inputs.grids import PatchGrid, patch_grid


@pytest.fixture(scope="module")
def groups(llava_vlm):
    """Three prompts of 2, 1 and 3 images."""
    return llava_vlm.inputs(image_groups(), ["what is this", "a", "describe the scene"])


@pytest.mark.parametrize("row", range(3))
def test_a_row_keeps_the_images_of_its_own_prompt(llava_vlm, groups, row):
    alone = llava_vlm.inputs([image_groups()[row]], groups.prompts[row])
    item = groups[row]
    assert torch.equal(item.encoding["pixel_values"], alone.encoding["pixel_values"])
    assert torch.equal(item.encoding["input_ids"], alone.encoding["input_ids"])
    assert torch.equal(groups[row - 3].encoding["pixel_values"], alone.encoding["pixel_values"])
    assert [list(picture.get_flattened_data())[:5] for picture in item.images[0]] == [
        list(picture.get_flattened_data())[:5] for picture in alone.images[0]
    ]
    assert [len(positions) for positions in item.tokens.images] == [16] * (2, 1, 3)[row]


def test_each_image_of_a_group_has_positions_of_its_own(groups):
    tokens = groups.token_maps[2]
    first, second, third = tokens.images
    assert torch.equal(torch.cat([first, second, third]), tokens.image)
    assert tokens.cell(int(third[6])) == (2, 1, 2)
    assert tokens.position(1, 2, image=2) == int(third[6])
    for image in (3, -1):
        with pytest.raises(IndexError, match=f"Image {image} was asked for; the prompt holds 3"):
            tokens.position(0, 0, image=image)


# -- 3 rows and 5 columns --


def test_cells_and_positions_of_a_wide_grid():
    tokens = wide_vlm().inputs(noise_image(0, (140, 84)), "what is this").tokens
    (grid,) = tokens.grids
    assert (grid.rows, grid.cols) == (3, 5)
    assert len(tokens.image) == 15
    first = int(tokens.image[0])
    assert tokens.position(1, 2) == first + 7
    assert tokens.cell(first + 7) == (0, 1, 2)
    assert tokens.cell(first + 14) == (0, 2, 4)
    with pytest.raises(IndexError, match="row 3, col 0 is outside the grid of 3 rows x 5 cols"):
        tokens.position(3, 0)
    with pytest.raises(IndexError, match="row 0, col 5 is outside"):
        tokens.position(0, 5)


def test_boxes_of_a_wide_grid_hold_their_pixels():
    """White pixels in a patch's box lie in that patch of what the model gets."""
    vlm, size = wide_vlm(), (150, 97)
    grid = vlm.inputs(Image.new("RGB", size), "a").tokens.grids[0]
    for row, col in [(0, 0), (0, 4), (1, 3), (2, 1)]:
        left, top, right, bottom = grid.box(row, col)
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        y, x = np.mgrid[: size[1], : size[0]] + 0.5
        pixels[(x > left) & (x < right) & (y > top) & (y < bottom)] = 255
        got = vlm.inputs(Image.fromarray(pixels), "a").encoding["pixel_values"][0].mean(0)
        light = (got - got.min()).unflatten(0, (3, 14)).unflatten(2, (5, 14)).sum((1, 3))
        assert int(light.argmax()) == row * 5 + col
        assert light[row, col] > 0.7 * light.sum()
    assert torch.equal(grid.boxes()[2, 1], torch.tensor(grid.box(2, 1)))
    assert grid.boxes().shape == (3, 5, 4)
    assert grid.crop_box == (*grid.box(0, 0)[:2], *grid.box(2, 4)[2:])


PLAIN = PatchGrid(rows=3, cols=5, patch=14, image_size=(140, 84), resized=(70, 42), crop=(0, 0))
"""Each patch is 28 x 28 pixels of the original."""


def test_shares_of_a_wide_grid_by_hand():
    covered = PLAIN.covered((28, 14, 70, 56))  # columns 1 and half of 2; row 1 and half of row 0
    want = torch.zeros(3, 5)
    want[0, 1], want[0, 2], want[1, 1], want[1, 2] = 0.5, 0.25, 1, 0.5
    torch.testing.assert_close(covered, want)


def test_exactly_half_covered_lies_inside():
    assert PLAIN.inside((28, 0, 42, 28)).nonzero().tolist() == [[0, 1]]
    assert PLAIN.inside((28, 0, 41.9, 28)).nonzero().tolist() == []
    assert PLAIN.inside((28, 0, 35, 28), covered=0.25).nonzero().tolist() == [[0, 1]]


def test_a_margin_grows_to_all_sides_and_diagonals_within_the_grid():
    inside = PLAIN.inside((84, 28, 112, 56), margin=1)  # row 1, column 3
    assert inside.nonzero().tolist() == [[row, col] for row in range(3) for col in range(2, 5)]
    corner = PLAIN.inside((0, 0, 28, 28), margin=2)
    assert corner.nonzero().tolist() == [[row, col] for row in range(3) for col in range(3)]
    with pytest.raises(ValueError, match="margin of -1"):
        PLAIN.inside((0, 0, 28, 28), margin=-1)


def test_positions_in_a_box_of_the_second_image():
    tokens = token_map("s" + "i" * 30 + "tt", (PLAIN, PLAIN))
    assert tokens.pos_in_box((84, 28, 112, 56)).tolist() == [1 + 8]
    assert tokens.pos_in_box((84, 28, 112, 56), image=1).tolist() == [1 + 15 + 8]


# -- crops whose margins are odd --


def brightest(processor, size: tuple[int, int], at: tuple[int, int]) -> tuple[int, int]:
    """(x, y) of the brightest pixel that the processor makes of one white pixel at `at`."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[at[1], at[0]] = 255
    tensor = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0].sum(0)
    y, x = divmod(int(tensor.argmax()), tensor.shape[1])
    return x, y


@pytest.mark.parametrize("size", [(71, 43), (70, 43), (75, 42), (73, 49), (61, 42), (63, 39)])
def test_an_odd_margin_is_cut_where_transformers_cuts_it(size):
    """Without a resize every pixel can be followed; the last two are smaller than the crop."""
    processor = CLIPImageProcessor(do_resize=False, crop_size={"height": 42, "width": 70})
    grid = patch_grid(size, processor, (42, 70), 14)
    assert (grid.rows, grid.cols) == (3, 5)
    at = (37, 29)
    x, y = brightest(processor, size, at)
    row, col = y // 14, x // 14
    left, top, _, _ = grid.box(row, col)
    assert (at[0] - left, at[1] - top) == (x % 14, y % 14)


# -- prompts that end in a special token --


def test_last_is_the_last_position_and_last_text_is_not():
    vlm = ending_vlm()
    inputs = vlm.inputs([noise_image(0), noise_image(1)], ["what is this", "a"])
    for tokens in inputs.token_maps:
        assert tokens.strings[-1] == "</s>"
        assert tokens.last == len(tokens) - 1
        assert tokens.last_text == len(tokens) - 2
        assert tokens.select("last").tolist() == [len(tokens) - 1]
        assert tokens.select("last_text").tolist() == [len(tokens) - 2]
        assert tokens.last not in tokens.question
        assert tokens.last_text in tokens.question
        together = torch.cat([tokens.image, tokens.question, torch.tensor([tokens.last])]).sort().values
        assert torch.equal(together, tokens.all)


def test_every_kind_of_position_by_hand():
    tokens = token_map("..stiiitsts", (PLAIN,))
    assert tokens.all.tolist() == list(range(2, 11))
    assert tokens.image.tolist() == [4, 5, 6]
    assert tokens.text.tolist() == [3, 7, 9]
    assert tokens.special.tolist() == [2, 8, 10]
    assert tokens.question.tolist() == [2, 3, 7, 8, 9]
    assert (tokens.last, tokens.last_text, tokens.last_image) == (10, 9, 6)
    ends_in_text = token_map("sit")
    assert ends_in_text.question.tolist() == [0]


def test_answers_are_read_at_the_last_position_even_if_it_is_special():
    vlm = ending_vlm()
    inputs = vlm.inputs([noise_image(0), noise_image(1)], ["what is this", "a"])
    with torch.no_grad():
        want = [int(vlm.hf(**inputs[row].encoding).logits[0, -1].argmax()) for row in range(2)]
    assert vlm.next_tokens(inputs).tolist() == want
