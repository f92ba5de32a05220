"""Layouts and encodings by hand: single columns and tiles, odd cells, and what tells keys apart."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.family_inputs import inputs_of, record_of
from mechvlm.families.known import ARCHITECTURES
from mechvlm.inputs.coordinates import Seen
from mechvlm.inputs.encodings import is_sequence, kept_keys
from mechvlm.inputs.image_word import image_word
from mechvlm.inputs.layouts import _shrunk, find_layout
from mechvlm.inputs.views import AreaGrid, Layout, View, shows_whole

# -- layouts --


def pixels_of(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) of the centre of each pixel, [rows cols], as shares of the image."""
    x = ((torch.arange(cols) + 0.5) / cols).expand(rows, -1)
    return x, ((torch.arange(rows) + 0.5) / rows)[:, None].expand(-1, cols)


def seen(x: torch.Tensor, y: torch.Tensor, n_tokens: int, shape: tuple, size: tuple[int, int], *keys: str) -> Seen:
    return Seen(x, y, torch.ones(x.shape, dtype=torch.bool), n_tokens, shape, frozenset(keys), size)


def test_a_single_column_of_patches_is_as_wide_as_the_image():
    """40 x 120 as 8 x 24 pixels, in three patches of 8 x 8. The outermost pixels' centres lie a
    sixteenth from the edges, which the width of a single column cannot know."""
    x, y = (values.reshape(3, 1, 64) for values in pixels_of(24, 8))
    (view,) = find_layout(seen(x, y, 3, (3, 64), (40, 120), "pixel_values")).views
    assert (view.rows, view.cols, view.positions.flatten().tolist()) == (3, 1, [0, 1, 2])
    assert view.grid.box(1, 0) == pytest.approx((0, 40, 40, 80), abs=0.5)


def test_a_single_tile_has_one_line_break_at_its_end():
    x, y = (values[None] for values in pixels_of(8, 8))
    layout = find_layout(seen(x, y, 17, (1, 1, 3, 8, 8), (40, 40), "image_sizes"))
    (view,) = layout.views
    assert view.positions.tolist() == torch.arange(16).reshape(4, 4).tolist()
    assert view.grid.box(1, 2) == pytest.approx((20, 10, 30, 20), abs=0.01)


def test_tiles_are_shrunk_to_the_area_of_the_most_that_are_allowed():
    """The side shrinks by the root of the areas' ratio, if that is above 1.1."""
    assert _shrunk(16, 16, 4, 9) == (12, 12)
    assert _shrunk(9, 9, 4, 5) == (9, 9)
    assert _shrunk(16, 16, 4, None) == (16, 16)


def test_a_processors_new_settings_give_new_places():
    """64 x 64 is 2 x 2 tiles of 4 x 4 tokens. Four tiles of at most two: 8 / √2 = 5.7 rows and
    columns. The second count is Hugging Face's own, since the processor has written the tokens."""
    hf, processor = families.build("llava_onevision")
    for ratio, side in (("anyres_max_9", 8), ("anyres_max_2", 5)):
        processor.vision_aspect_ratio = ratio
        tokens = inputs_of("llava_onevision", hf, processor, families.picture(64, 64, 0), "a").tokens
        assert [(view.name, view.rows, view.cols) for view in tokens.views[0]] == [
            ("whole", 4, 4), ("mosaic", side, side),
        ]  # fmt: skip
        assert len(tokens.image) == 16 + side * (side + 1)
        assert len(tokens.without_place) == side


@pytest.mark.parametrize(
    ("area", "whole"),
    [
        ((0, 0, 80, 40), True), ((8, 0, 80, 40), True), ((9.5, 0, 80, 40), False), ((0, 4, 80, 40), True),
        ((0, 4.9, 80, 40), False), ((0, 0, 72, 40), True), ((0, 0, 69, 40), False), ((0, 0, 80, 36), True),
        ((0, 0, 80, 34), False), ((-9, -3, 90, 44), True),
    ],
)  # fmt: skip
def test_the_whole_image_lacks_half_a_cell_at_most(area, whole):
    """Four rows and four columns on 80 x 40: a cell is about 20 x 10."""
    assert shows_whole(AreaGrid(4, 4, (80, 40), tuple(map(float, area)))) is whole


def test_a_cell_without_a_token_has_no_position():
    grid = AreaGrid(2, 2, (20, 20), (0.0, 0.0, 20.0, 20.0))
    layout = Layout(3, (20, 20), (View("whole", grid, torch.tensor([[0, -1], [2, 1]])),))
    (view,) = layout.placed(torch.tensor([7, 9, 12]))
    assert view.positions.tolist() == [[7, -1], [12, 9]]


# -- encodings --


def test_pixels_are_no_sequence_though_they_look_like_one():
    """Three tokens, and one image of three channels: both begin with [1 3]."""
    processor = SimpleNamespace(image_processor=SimpleNamespace(model_input_names=["pixel_values"]))
    ids = torch.zeros(1, 3, dtype=torch.long)
    encoding = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 4, 4), "token_type_ids": ids, "sizes": ids[:, :2]}
    found = {key for key in encoding if is_sequence(key, encoding, processor, ())}
    assert found == {"input_ids", "token_type_ids"}
    assert is_sequence("sizes", encoding, processor, ("sizes",))


def test_the_forward_gets_no_labels_and_nothing_that_it_does_not_take():
    encoding = {key: torch.zeros(1) for key in ("input_ids", "labels", "pixel_values", "num_crops")}
    assert set(kept_keys(encoding, ARCHITECTURES["LlavaForConditionalGeneration"])) == {"input_ids", "pixel_values"}


def test_a_word_belongs_to_its_image_token():
    """One processor for two models: what stands for an image in one may not in the other."""
    hf, processor = families.build("internvl")
    record = replace(record_of("internvl", hf), image_word=None)
    assert image_word(record, hf.config, processor).text == families.FAMILIES["internvl"].word
    hf.config.image_token_id = 7
    with pytest.raises(mv.InputError, match=r"No word makes InternVLProcessor put the image token .* \(7\)"):
        image_word(record, hf.config, processor)
