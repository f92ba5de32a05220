"""The report's gallery: an example's patch view, and a small picture of its heat."""

import re
from collections.abc import Iterable

import matplotlib as mpl
import numpy as np
from PIL import Image

from mechvlm.explore import GALLERY_ROOM, destinations, read_for_page
from mechvlm.figures.style import HEAT
from mechvlm.inputs.batch import ImageLike
from mechvlm.study.record import GalleryView
from mechvlm.view.example import ShownExample, match_example
from mechvlm.view.patches import patches
from mechvlm.vlm.vlm import VLM

HEAT_SIDE = 256
"""Longer side of the small pictures, in pixels."""


def read_view(vlm: VLM, image: ImageLike, prompt: str) -> GalleryView:
    """Read one example of the gallery, in one forward."""
    inputs = vlm.inputs(image, prompt)
    results = read_for_page(vlm, inputs, destinations(vlm, inputs.tokens, GALLERY_ROOM), k=5)
    shown = match_example(inputs, *results, example=None)
    token = shown.tokens.strings[shown.dest[shown.first_row]]
    return GalleryView(patches(inputs, *results).html(), _heat(shown), token, shown.first_layer)


def file_names(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The file in `views/` of each (model, example id).

    A number makes the file names unique. Model and id follow for people to read; as both may hold
    any characters, only ASCII letters and digits are kept.
    """
    names = {}
    for number, (model, example) in enumerate(keys, start=1):
        plain = [re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[-40:] for text in (model, example)]
        names[model, example] = "views/" + "-".join([f"{number:02}", *filter(None, plain)]) + ".html"
    return names


def _heat(shown: ShownExample) -> Image.Image:
    """A small copy of the first image, with the heat that the page shows first.

    Darker is more. Parts of the image that the model does not see are paler.
    """
    image = shown.pictures[0].copy()
    image.thumbnail((HEAT_SIDE, HEAT_SIDE))
    grid, heat = shown.tokens.grids[0], shown.heat(shown.first_row, shown.first_layer)[0]
    share = heat / (heat.max() or 1.0)
    # The place of each pixel on the original image, and the patch that lies there.
    left, top, right, bottom = grid.crop_box
    x = (np.arange(image.width) + 0.5) * grid.image_size[0] / image.width
    y = (np.arange(image.height) + 0.5) * grid.image_size[1] / image.height
    col, row = (
        ((x - left) / (right - left) * grid.cols).astype(int),
        ((y - top) / (bottom - top) * grid.rows).astype(int),
    )
    in_crop = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    share = share[row.clip(0, grid.rows - 1)][:, col.clip(0, grid.cols - 1)]
    veil = np.where(in_crop, 0.35, 0.8)[..., None]
    pixels = np.asarray(image) / 255 * (1 - veil) + veil
    strength = (np.where(in_crop, 0.15 + 0.7 * np.sqrt(share), 0))[..., None]
    pixels = pixels * (1 - strength) + mpl.colormaps[HEAT](share)[..., :3] * strength
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))
