"""Boxes of patches, held against the pixels that real image processors make."""

import copy
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BlipImageProcessor, CLIPImageProcessor, LlavaImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.inputs.grids import _margin, check_resize, patch_grid
from mechvlm.view.units import cell_units

# Where torchvision is installed, `CLIPImageProcessor` and `LlavaImageProcessor` resize by it.
KINDS = sorted(
    {CLIPImageProcessor, LlavaImageProcessor, CLIPImageProcessorPil, LlavaImageProcessorPil}, key=lambda c: c.__name__
)
SIZES = [
    {"shortest_edge": 40},
    {"shortest_edge": 40, "longest_edge": 55},
    {"height": 37, "width": 61},
    {"max_height": 50, "max_width": 31},
]
NEAREST = 0
side = st.integers(1, 130)
middle = st.integers(10, 130)


def seen(processor, image: Image.Image) -> np.ndarray:
    """The processor's pixels [height width], of the red channel."""
    return processor(image, return_tensors="pt")["pixel_values"][0, 0].numpy()


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS), size=st.tuples(middle, side), resize=st.sampled_from([None, *SIZES]),
    crop=st.one_of(st.none(), st.tuples(st.integers(5, 90), st.integers(5, 90))), pad=st.booleans(),
    pad_size=st.sampled_from([None, {"height": 700, "width": 680}]), corners=st.tuples(side, side, side, side),
)  # fmt: skip
def test_every_pixel_that_the_processor_makes_lies_in_its_box(kind, size, resize, crop, pad, pad_size, corners):
    """A rectangle's pixels are where the boxes say, of patches of one pixel, in every order.

    With the nearest neighbour as the filter, a pixel shows what lies under the middle of its box.
    """
    processor = kind(
        do_resize=resize is not None, size=resize or {"shortest_edge": 40}, do_center_crop=crop is not None,
        crop_size={"height": crop[0], "width": crop[1]} if crop else None, do_pad=pad, pad_size=pad_size,
        resample=NEAREST, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    width, height = size
    (left, right), (top, bottom) = (
        sorted(c % (width + 1) for c in corners[:2]),
        sorted(c % (height + 1) for c in corners[2:]),
    )
    pixels = np.zeros((height, width, 3), np.uint8)
    try:
        check_resize(size, processor)
    except mv.InputError:
        with pytest.raises(ValueError, match="height and width must be > 0"):
            seen(processor, Image.fromarray(pixels))
        return
    black = seen(processor, Image.fromarray(pixels))
    pixels[top:bottom, left:right] = 255
    lit = seen(processor, Image.fromarray(pixels)) != black
    if pad and kind in (CLIPImageProcessor, CLIPImageProcessorPil) and crop and pad_size:
        with pytest.raises(mv.InputError, match="made 680 x 700 pixels"):
            patch_grid(size, processor, lit.shape, 1)
        return
    left_edge, top_edge, right_edge, bottom_edge = patch_grid(size, processor, lit.shape, 1).crop_box
    rows, cols = lit.shape
    x = (left_edge + (np.arange(cols) + 0.5) * (right_edge - left_edge) / cols)[None]
    y = (top_edge + (np.arange(rows) + 0.5) * (bottom_edge - top_edge) / rows)[:, None]
    expected = (x > left) & (x < right) & (y > top) & (y < bottom)
    on_an_edge = np.minimum(abs(x - left), abs(x - right)) < 1e-3
    on_an_edge = on_an_edge | (np.minimum(abs(y - top), abs(y - bottom)) < 1e-3)
    assert (lit == expected)[~on_an_edge].all()


def square(pixels: int = 96) -> LlavaImageProcessor:
    """The image processor of the original LLaVA, with tiny-llava's size and colors."""
    return LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def padding_vlm():
    """tiny-llava, whose images are padded to squares."""
    vlm = mv.load("tiny-llava")
    processor = copy.deepcopy(vlm.processor)
    processor.image_processor = square()
    return mv.load(vlm.hf, processor)


def test_boxes_of_a_padded_image_by_hand(padding_vlm):
    """300 x 100 lies at y 100 of a square of 300; 8 x 8 patches are 37.5 pixels wide each."""
    image = Image.new("RGB", (300, 100))
    image.paste("white", (0, 0, 50, 100))
    inputs = padding_vlm.inputs(image, "Describe the scene.")
    tokens, grid = inputs.tokens, inputs.tokens.grids[0]
    assert (grid.square, grid.resized, grid.crop, grid.corner) == (True, (96, 96), (0, 0), (0, 100))
    assert grid.box(3, 0) == (0, 12.5, 37.5, 50)
    assert grid.box(0, 7) == (262.5, -100, 300, -62.5), "padding lies outside the image"
    assert grid.crop_box == (0, -100, 300, 200)
    assert grid.visible_box == (0, 0, 300, 100)
    tall = padding_vlm.inputs(Image.new("RGB", (100, 300)), "Describe the scene.").tokens.grids[0]
    assert (tall.crop_box, tall.visible_box) == ((-100, 0, 200, 300), (0, 0, 100, 300))
    assert grid.inside((0, 0, 50, 100)).nonzero().tolist() == [[3, 0], [4, 0]]
    assert tokens.pos_in_box((0, 0, 50, 100)).tolist() == [tokens.position(3, 0), tokens.position(4, 0)]
    light = inputs.encoding["pixel_values"][0].mean(0).unflatten(0, (8, 12)).unflatten(2, (8, 12)).mean((1, 3))
    assert (light > 0.9).nonzero().tolist() == [[3, 0], [4, 0]]


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (77, 90), (96, 96), (31, 200)])
def test_patches_of_a_padded_image_hold_what_was_painted_in_their_boxes(padding_vlm, size):
    """With the model's own filter: what is painted in a box lights up its patch."""
    grid = padding_vlm.inputs(Image.new("RGB", size), "a").tokens.grids[0]
    for row, col in [(3, 3), (4, 4), (5, 3)]:
        left, top, right, bottom = grid.box(row, col)
        y, x = np.mgrid[: size[1], : size[0]] + 0.5
        painted = np.zeros((size[1], size[0], 3), np.uint8)
        painted[(x > left) & (x < right) & (y > top) & (y < bottom)] = 255
        dark, light = (
            padding_vlm.inputs(Image.fromarray(p), "a").encoding["pixel_values"][0].mean(0)
            for p in (0 * painted, painted)
        )
        light = (light - dark).unflatten(0, (8, 12)).unflatten(2, (8, 12)).sum((1, 3))
        assert int(light.argmax()) == row * 8 + col
        assert light[row, col] > 0.7 * light.sum()


def test_views_show_the_padding_around_the_image(padding_vlm):
    inputs = padding_vlm.inputs(noise_image(0, (300, 100)), "Describe the scene.")
    lens, norms = mv.read(padding_vlm, inputs, mv.LogitLens(), mv.NormAttention(dst="last"))
    page = mv.view.patches(inputs, lens, norms).body
    crop = json.loads(re.search(r'"crop": ?(\[.*?\])', page)[1])
    assert crop == [0, -100, 300, 200]
    units, _, _ = cell_units(inputs, 0, None)
    boxes = {view["name"]: view["crop"] for view in units.views}
    assert boxes["r0c0"] == [0, -100, 37.5, -62.5], "the cells above the image are drawn too"
    plain = mv.load("tiny-llava", check=False)
    units, _, _ = cell_units(plain.inputs(noise_image(0, (300, 100)), "a"), 0, None)
    assert units.views[0]["crop"] == pytest.approx([100, 0, 112.5, 12.5]), "of a cut image those that the model sees"


def test_an_object_on_a_padded_image_is_ablated_where_it_lies(padding_vlm):
    """All of its patches, and no other, are replaced; a box in the padding is refused."""
    inputs = padding_vlm.inputs([noise_image(i, (300, 100)) for i in range(2)], "Describe the scene.")
    tokens = inputs.token_maps[0]
    ablated = mv.object_ablation(padding_vlm, inputs, [(0, 0, 50, 100)] * 2, "red", margins=(0,), draws=2)
    assert ablated.n_tokens.flatten().tolist() == [len(tokens.pos_in_box((0, 0, 50, 100)))] * 2
    with pytest.raises(mv.InputError, match=r"is not on the image as the model sees it, \(0, 0, 300, 100\)"):
        mv.object_ablation(padding_vlm, inputs, [(10, -60, 50, -20)] * 2, "red", margins=(0,), draws=2)


def test_a_strip_that_would_be_padded_to_a_huge_square_is_refused():
    with pytest.raises(mv.InputError, match=r"20000 x 1: so narrow .* 20000 x 20000 = 400,000,000 pixels"):
        check_resize((20_000, 1), square())


class Rotating(CLIPImageProcessorPil):
    do_rotate = True


class Resizing(CLIPImageProcessorPil):
    def resize(self, image, size, **kwargs):
        return super().resize(image, size, **kwargs)[:, :, ::-1]


class Splitting:
    """An image processor that shares no code with transformers'."""

    do_resize = False

    def preprocess(self, images):
        return images


@pytest.mark.parametrize(
    ("processor", "by"),
    [(Rotating(), "do_rotate"), (Resizing(), "resize"), (Splitting(), "preprocess")],
    ids=["rotates", "its own resize", "its own class"],
)
def test_other_ways_to_move_pixels_are_refused(processor, by):
    kind = type(processor).__name__
    with pytest.raises(mv.InputError, match=rf"The image processor {kind} moves pixels by {by}, .* cannot be placed"):
        patch_grid((80, 60), processor, (224, 224), 14)


def test_an_unknown_size_is_refused():
    processor = BlipImageProcessor()
    processor.size = {"longest_edge": 40}
    with pytest.raises(mv.InputError, match=r"resizes by \{'longest_edge': 40\}: mechvlm knows shortest_edge"):
        check_resize((80, 60), processor)


def test_boxes_are_finite_for_every_grid(padding_vlm):
    grid = padding_vlm.inputs(noise_image(0, (1, 90)), "a").tokens.grids[0]
    assert torch.isfinite(grid.boxes()).all()
    assert float(grid.covered(grid.crop_box).min()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("backend", "resized", "cropped", "start"),
    [("torchvision", 5, 8, -1), ("pil", 5, 8, -2), ("torchvision", 8, 5, 1), ("pil", 8, 5, 1), (None, 4, 8, -2)],
)
def test_where_a_crop_starts_by_hand(backend, resized, cropped, start):
    """torchvision rounds the padding at the left down, Pillow's processors up."""
    assert _margin(resized, cropped, SimpleNamespace(backend=backend)) == start
