"""One example to explore, as the report's gallery and `mechvlm view` show it: its patch view, and a small picture of it."""

import re
from collections.abc import Iterable

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from mechvlm.inputs import ImageLike, Inputs
from mechvlm.probes.logit_lens import LogitLens
from mechvlm.probes.norm_attention import NormAttention
from mechvlm.probes.query_reading import QueryReading
from mechvlm.reading import read
from mechvlm.study.study import Shown
from mechvlm.tokens import TokenMap
from mechvlm.view.packing import ROWS
from mechvlm.view.page import View
from mechvlm.view.patches import patches
from mechvlm.view.plots import HEAT
from mechvlm.view.seen import Seen, see
from mechvlm.vlm import VLM

PAGE = 16_000_000
"""Characters that the rows of all destinations may take up on a page of its own: 28 of them at 7B."""
SHELF = 4_000_000
"""The same, on each of the gallery's pages: 7 destinations at 7B, all of them for a small model."""
SIDE = 256
"""Longer side of the small pictures, in pixels."""


def destinations(vlm: VLM, tokens: TokenMap, room: int = PAGE) -> Int[Tensor, " dest"]:
    """The positions that can have read the image and can be picked on its page: text after it, and the last position.

    Where `room` (characters) does not hold the rows of all, the last ones: a row takes at most four characters for each
    layer, head and source, and hardly more than `mechvlm.view.packing.ROWS`.
    """
    positions = torch.cat([tokens.text[tokens.text > tokens.image[0]], torch.tensor([tokens.last])]).unique()
    each = min(ROWS, 4 * vlm.n_layers * vlm.n_heads * len(tokens))
    return positions[-max(1, room // each) :]


def patch_view(vlm: VLM, inputs: Inputs, dest: Int[Tensor, " dest"], k: int = 5) -> View:
    """The patch view of one example, read in one forward: `dest` can be picked, each patch reads as its `k` likeliest tokens."""
    return patches(inputs, *_results(vlm, inputs, dest, k))


def show(vlm: VLM, image: ImageLike, prompt: str) -> Shown:
    """One example of the gallery, in one forward."""
    inputs = vlm.inputs(image, prompt)
    results = _results(vlm, inputs, destinations(vlm, inputs.tokens, SHELF), k=5)
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


def _results(vlm: VLM, inputs: Inputs, dest: Int[Tensor, " dest"], k: int) -> tuple:
    """lens, norms, and where visual tokens are queries, where each reads (else None)."""
    queries = [] if inputs.tokens.patches else [QueryReading()]
    found = read(vlm, inputs, LogitLens(k=k), NormAttention(dst=dest.tolist()), *queries)
    return *found, *[None] * (3 - len(found))


def _heat(seen: Seen) -> Image.Image:
    """The heat that the page shows first, on its (first) image made small."""
    image = seen.pictures[0].copy()
    image.thumbnail((SIDE, SIDE))
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
