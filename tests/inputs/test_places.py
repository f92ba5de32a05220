"""Where visual tokens lie, against an oracle that knows no processor: `helpers.owners`."""

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.family_inputs import inputs_of, record_of
from helpers.owners import entering, owned, silenced

SIZES = [
    (60, 44),
    pytest.param((40, 90), marks=pytest.mark.families),
    pytest.param((64, 64), marks=pytest.mark.families),
]
LIMIT = 1.7
"""Pixels between a box's centre and the oracle's."""
BLURRED = ("got_ocr2", "lfm3_vl", "deepseek_vl_hybrid")
"""Families whose vision parts have convolutions after the patches: a token owns more than its box,
which must lie within that."""
UNKNOWN = ("emu3", "minicpm_v", "hunyuan_vl")
"""Families whose tokens tile the image in an order that mechvlm does not know."""
CODES = ("chameleon",)
"""Families whose tokens are codes: few pixels change one, and convolutions blur which."""


@pytest.fixture(scope="module", params=families.cases(memories=False))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(name):
    return families.build(name)


def gray_noise(width: int, height: int) -> np.ndarray:
    """Pixels [height width 3] that stay within 0..255 when they are inverted."""
    return np.random.default_rng(0).integers(60, 196, (height, width, 3)).astype(np.uint8)


def visible(box, size) -> tuple[float, float, float, float] | None:
    """The part of a box that lies on the image, or None."""
    left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    return (left, top, right, bottom) if right > left and bottom > top else None


@pytest.mark.parametrize("size", SIZES)
def test_boxes_hold_the_pixels_that_the_token_owns(name, built, size):
    if name in UNKNOWN:
        assert not inputs_of(name, *built, families.picture(*size, 0), "what").tokens.patches
        return
    if name in CODES:
        pytest.skip("the oracle cannot tell")
    pixels = gray_noise(*size)
    inputs = inputs_of(name, *built, pixels, "what")
    tokens = inputs.tokens

    def encode(images):
        return inputs_of(name, *built, images, ["what"] * len(images)).encoding

    oracle = owned(built[0], encode, pixels, tokens.image)
    assert tokens.patches == any(box is not None for box in oracle)
    for position, box in zip(tokens.image.tolist(), oracle, strict=True):
        place = tokens.place(position)
        shown = None if place is None else visible(place.box, size)
        if not (name in BLURRED and shown is None):  # the blur reaches tokens of padding
            assert (shown is None) == (box is None), (position, place, box)
        if shown is not None and box is not None:
            if name in BLURRED and shown is not None and box is not None:
                assert all(own >= around - LIMIT for own, around in zip(shown[:2], box[:2], strict=True)), (place, box)
                assert all(own <= around + LIMIT for own, around in zip(shown[2:], box[2:], strict=True)), (place, box)
                continue
            for first, last in ((0, 2), (1, 3)):
                apart = abs(shown[first] + shown[last] - box[first] - box[last]) / 2
                assert apart < LIMIT, (position, place, box)


def test_every_visual_token_has_one_place_or_none(name, built):
    tokens = inputs_of(name, *built, families.picture(60, 44, 0), "what").tokens
    placed = {}
    for view in tokens.views[0]:
        for row in range(view.rows):
            for col in range(view.cols):
                position = tokens.position(row, col, view=view.name)
                assert position not in placed
                placed[position] = (view.name, row, col)
    assert sorted([*placed, *tokens.without_place.tolist()]) == tokens.image.tolist()
    for position, where in placed.items():
        place = tokens.place(position)
        assert (place.view, place.row, place.col) == where
    assert all(tokens.place(position) is None for position in tokens.without_place.tolist())
    if not tokens.patches:
        with pytest.raises(ValueError, match=r"queries|not known"):
            tokens.pos_in_box((0, 0, 20, 20))
        return
    box = (10, 5, 45, 30)
    inside = []
    for position in placed:
        left, top, right, bottom = tokens.place(position).box
        part = visible((left - 10, top - 5, right - 10, bottom - 5), (35, 25))
        share = 0 if part is None else (part[2] - part[0]) * (part[3] - part[1]) / ((right - left) * (bottom - top))
        inside += [position] * (share >= 0.5)
    assert tokens.pos_in_box(box).tolist() == sorted(inside)


def test_two_images_have_their_own_tokens(name, built):
    """A state that enters the decoder changes with the image whose token it is, and no other."""
    if families.FAMILIES[name].images == 1 or name in ("got_ocr2", *UNKNOWN, *CODES):
        pytest.skip("it takes one image")
    pair = [gray_noise(60, 44), gray_noise(40, 90)]
    if record_of(name, built[0]).visual_tokens == "queries":
        pytest.skip("queries read with attention alone")
    both = inputs_of(name, *built, [pair], "what")
    tokens = both.tokens
    assert [layout.image_size for layout in tokens.layouts] == [(60, 44), (40, 90)]
    with silenced(built[0]):
        before = entering(built[0], both.encoding)[0]
        for image in (0, 1):
            other = [255 - pixels if number == image else pixels for number, pixels in enumerate(pair)]
            after = entering(built[0], inputs_of(name, *built, [other], "what").encoding)[0]
            changed = set(((after - before).abs().amax(-1) > 1e-5).nonzero()[:, 0].tolist())
            placed = set(tokens.images[image].tolist()) - set(tokens.without_place.tolist())
            size = tokens.layouts[image].image_size
            # A resize after padding blurs the image into it, so more may change than show it.
            assert {p for p in placed if visible(tokens.place(p).box, size)} <= changed <= placed


# -- values by hand --------------------------------------------------------------------------------


def test_line_breaks_by_hand():
    """60 x 44 fills the width of 2 x 2 tiles, 8 x 8 tokens: 44 / 60 x 8 = 5.87 rows, so that one is
    cut at the top and one at the bottom. 16 tokens, and 6 rows of 8 and a line break. The image is
    resized to 64 x 47 and lies 8 pixels, one token, below the top: 48 / 47 of it are covered."""
    built = families.build("llava_next")
    tokens = inputs_of("llava_next", *built, families.picture(60, 44, 0), "what").tokens
    whole, mosaic = tokens.views[0]
    assert (whole.name, whole.rows, whole.cols, mosaic.name, mosaic.rows, mosaic.cols) == (
        "whole",
        4,
        4,
        "mosaic",
        6,
        8,
    )
    start = int(tokens.image[0])
    assert len(tokens.image) == 16 + 6 * 9
    assert tokens.position(0, 0) == start
    assert tokens.position(5, 7, view="mosaic") == start + 16 + 5 * 9 + 7
    assert tokens.without_place.tolist() == [start + 16 + row * 9 + 8 for row in range(6)]
    assert mosaic.grid.crop_box == pytest.approx((0, 0, 60, 44 * 48 / 47), abs=0.1)
    assert tokens.grids == (whole.grid,)
    assert tokens.cell(start + 5) == (0, 1, 1)
    with pytest.raises(ValueError, match=r"lies in the view 'mosaic' of image 0, not in 'whole': tokens\.place"):
        tokens.cell(start + 16)
    with pytest.raises(ValueError, match="without a place, such as a line break"):
        tokens.cell(start + 16 + 8)
    with pytest.raises(IndexError, match=r"View 'tile' was asked for; image 0 has the views 0 \(whole\), 1 \(mosaic\)"):
        tokens.position(0, 0, view="tile")


def test_tiles_by_hand():
    """40 x 90 becomes two tiles, one above the other, and a thumbnail after them: 4 tokens each."""
    built = families.build("internvl")
    tokens = inputs_of("internvl", *built, families.picture(40, 90, 0), "what").tokens
    views = tokens.views[0]
    assert [view.name for view in views] == ["thumbnail", "tile 0,0", "tile 1,0"]
    numbers = [(view.positions - tokens.image[0]).tolist() for view in views]
    assert numbers == [[[8, 9], [10, 11]], [[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    boxes = [(0, 0, 40, 90), (0, 0, 40, 45), (0, 45, 40, 90)]
    for view, box in zip(views, boxes, strict=True):
        assert view.grid.crop_box == pytest.approx(box, abs=0.3)


def test_merged_windows_by_hand():
    """60 x 44 is resized to 64 x 48: 6 x 8 patches of 8 pixels, and 2 x 2 of them to a token."""
    built = families.build("qwen2_5_vl")
    tokens = inputs_of("qwen2_5_vl", *built, families.picture(60, 44, 0), "what").tokens
    (view,) = tokens.views[0]
    assert (view.name, view.rows, view.cols) == ("whole", 3, 4)
    assert tokens.place(int(tokens.image[6])).box == pytest.approx((30, 44 / 3, 45, 88 / 3), abs=0.3)


def test_boxes_by_formula_and_by_a_coordinate_image_agree():
    """LLaVA's square and CLIP's crop, which `grids.patch_grid` follows setting by setting."""
    hf, processor = families.build("llava")
    for size in ((60, 44), (40, 90), (200, 61)):
        image = families.picture(*size, 0)
        known = inputs_of("llava", hf, processor, image, "a", visual_tokens="patches").tokens.grids[0]
        shown = inputs_of("llava", hf, processor, image, "a", visual_tokens="cells").tokens.grids[0]
        assert isinstance(known, mv.PatchGrid)
        assert not isinstance(shown, mv.PatchGrid)
        assert torch.allclose(known.boxes(), shown.boxes(), atol=0.02 * max(size))


# -- real sizes ------------------------------------------------------------------------------------

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
REAL = {
    # 600 / 1000 x 48 = 28.8 rows, so 10 of 48 are cut at the top and at the bottom.
    "llava_next": ((1000, 600), 576 + 28 * 49, [(24, 24), (28, 48)], "mosaic"),
    # 1008 x 588 in patches of 14, 2 x 2 to a token.
    "qwen2_5_vl": ((1000, 600), 36 * 21, [(21, 36)], "whole"),
    "qwen3_vl": ((1000, 600), 31 * 19, [(19, 31)], "whole"),  # 992 x 608 in patches of 16
    "internvl": ((896, 448), 3 * 256, [(16, 16)] * 3, "tile 0,1"),
    "gemma3": ((1000, 600), 256, [(16, 16)], "whole"),
    "paligemma": ((1000, 600), 1024, [(32, 32)], "whole"),
    "idefics3": ((1456, 1092), 13 * 169, [(13, 13)] * 13, "tile 2,3"),
    "pixtral": ((1000, 600), 38 * 63, [(38, 63)], "whole"),
    "mistral3": ((1000, 600), 22 * 36, [(22, 36)], "whole"),
}
"""Size of an image; by hand: its tokens, the rows and columns of the views, and a view's name."""


def real_processor(name: str):
    """A family's processor with the settings of its published checkpoints."""
    processor = families.FAMILIES[name].make()[1]
    images = processor.image_processor
    if name == "llava_next":
        images.size, images.crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}
        images.image_grid_pinpoints, processor.patch_size = PINPOINTS, 14
    elif name.startswith("qwen"):
        images.patch_size = 14 if name == "qwen2_5_vl" else 16
        images.size = {"shortest_edge": 56**2, "longest_edge": 28**2 * 1280}
    elif name == "internvl":
        images.size, images.max_patches, processor.image_seq_length = {"height": 448, "width": 448}, 12, 256
    elif name == "gemma3":
        images.size, processor.image_seq_length = {"height": 896, "width": 896}, 256
        words = processor.tokenizer
        processor.full_image_sequence = f"{words.boi_token}{words.image_token * 256}{words.eoi_token}"
    elif name == "paligemma":
        images.size, processor.image_seq_length = {"height": 448, "width": 448}, 1024
    elif name == "idefics3":
        images.size, images.max_image_size = {"longest_edge": 4 * 364}, {"longest_edge": 364}
        processor.image_seq_len = 169
    elif name == "pixtral":
        images.size, images.patch_size, processor.patch_size = {"longest_edge": 1024}, 16, 16
    elif name == "mistral3":
        images.size, images.patch_size, processor.patch_size = {"longest_edge": 1540}, 28, 14
    return processor


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in families.SIX else pytest.mark.families) for n in REAL]
)
def test_counts_at_the_real_resolution(name):
    size, n, shapes, named = REAL[name]
    hf = families.build(name)[0]
    hf.config.get_text_config().max_position_embeddings = 8192
    tokens = inputs_of(name, hf, real_processor(name), families.picture(*size, 0), "what").tokens
    views = tokens.views[0]
    assert len(tokens.image) == n
    assert [(view.rows, view.cols) for view in views] == shapes
    assert named in [view.name for view in views]
    boxes = torch.cat([view.grid.boxes().flatten(0, 1) for view in views])
    together = [*boxes[:, :2].amin(0).tolist(), *boxes[:, 2:].amax(0).tolist()]
    half = max(views[0].grid.box(0, 0)[2:])  # a mosaic's first and last rows may hold padding
    assert together == pytest.approx((0, 0, *size), abs=1 if len(views) != 2 else half)
