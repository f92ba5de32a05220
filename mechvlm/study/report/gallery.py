"""One example to explore, as the report's gallery and `mechvlm view` show it: its patch view, and a small picture of it."""

import re
from collections.abc import Iterable

import matplotlib as mpl
import numpy as np
from PIL import Image

from mechvlm.explore import GALLERY_ROOM, destinations, read_for_page
from mechvlm.figures.style import HEAT
from mechvlm.inputs.batch import ImageLike
from mechvlm.study.record import Shown
from mechvlm.view.example import Seen, see
from mechvlm.view.patches import patches
from mechvlm.vlm.vlm import VLM

HEAT_SIDE = 256
"""Longer side of the small pictures, in pixels."""


def show(vlm: VLM, image: ImageLike, prompt: str) -> Shown:
    """One example of the gallery, in one forward."""
    inputs = vlm.inputs(image, prompt)
    results = read_for_page(vlm, inputs, destinations(vlm, inputs.tokens, GALLERY_ROOM), k=5)
    seen = see(inputs, *results, example=None)
    token = seen.tokens.strings[seen.dest[seen.start]]
    return Shown(patches(inputs, *results).html(), _heat(seen), token, seen.layer)


def file_names(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """For each (model, example id) a file of its own in `views/`: the number makes it so, the rest is for people.

    Names and ids may hold anything; of them only ASCII letters and digits are left.
    """
    names = {}
    for number, (model, example) in enumerate(keys, start=1):
        plain = [re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[-40:] for text in (model, example)]
        names[model, example] = "views/" + "-".join([f"{number:02}", *filter(None, plain)]) + ".html"
    return names


def _heat(seen: Seen) -> Image.Image:
    """The heat that the page shows first, on its (first) image made small."""
    image = seen.pictures[0].copy()
    image.thumbnail((HEAT_SIDE, HEAT_SIDE))
    grid, heat = seen.tokens.grids[0], seen.heat(seen.start, seen.layer)[0]
    share = heat / (heat.max() or 1.0)
    # Each pixel's place on the original image, and the patch that lies there.
    left, top, right, bottom = grid.crop_box
    x = (np.arange(image.width) + 0.5) * grid.image_size[0] / image.width
    y = (np.arange(image.height) + 0.5) * grid.image_size[1] / image.height
    col, row = (
        ((x - left) / (right - left) * grid.cols).astype(int),
        ((y - top) / (bottom - top) * grid.rows).astype(int),
    )
    sees = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    share = share[row.clip(0, grid.rows - 1)][:, col.clip(0, grid.cols - 1)]
    veil = np.where(sees, 0.35, 0.8)[..., None]
    pixels = np.asarray(image) / 255 * (1 - veil) + veil
    strength = (np.where(sees, 0.15 + 0.7 * np.sqrt(share), 0))[..., None]
    pixels = pixels * (1 - strength) + mpl.colormaps[HEAT](share)[..., :3] * strength
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))
