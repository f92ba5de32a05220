"""Whether tokens lie where their layout says, asked of the model: of every family, known or not."""

from dataclasses import replace

import pytest

import mechvlm as mv
from helpers import families
from mechvlm.families.known import architecture_of
from mechvlm.vlm.placing import lie_as_laid_out, with_checked_places

NOT_TILES = {
    "emu3": "codes, each of which comes from a wide part of the image",
    "deepseek_vl_hybrid": "a convolution reads across the patches",
}
"""Families whose tokens do not own the pixels that they would tile, beside queries."""


@pytest.mark.parametrize("name", families.cases(memories=False))
def test_the_models_states_say_whether_tokens_tile_the_image(name):
    hf, processor = families.build(name)
    try:
        record = mv.load(hf, processor, check=False).record
    except mv.ModelError as error:
        pytest.skip(f"it is refused: {error}")
    tiles = record.visual_tokens in ("patches", "cells") and name not in NOT_TILES
    assert lie_as_laid_out(hf, processor, replace(record, visual_tokens="cells")) == tiles


def test_queries_that_fill_a_square_get_no_places():
    """Sixteen queries of one tile could be a 4 x 4 grid, by their number alone."""
    hf, processor = families.build("idefics2")
    record = replace(mv.load(hf, processor).record, visual_tokens="cells")
    assert with_checked_places(hf, processor, record).visual_tokens == "unplaced"
    assert architecture_of("Idefics2ForConditionalGeneration").visual_tokens == "queries"


def test_tokens_without_a_place_say_why():
    vlm = mv.load(*families.build("llava"))
    tokens = vlm.inputs(families.picture(60, 44, seed=0), "a").tokens
    assert tokens.patches
    hf, processor = families.build("llava")
    unplaced = mv.load(hf, processor)
    unplaced.record = replace(unplaced.record, visual_tokens="unplaced")
    tokens = unplaced.inputs([families.picture(60, 44, seed=0)], "a").tokens
    assert not tokens.patches
    assert tokens.without_place.tolist() == tokens.image.tolist()
    with pytest.raises(ValueError, match="states do not follow the pixels"):
        tokens.pos_in_box((0, 0, 20, 20))
