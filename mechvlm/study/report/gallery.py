"""The report's gallery: an example's patch view, and a small picture of its heat."""

import re
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image

from mechvlm.errors import InputError
from mechvlm.explore import GALLERY_ROOM, destinations, read_for_page
from mechvlm.inputs.answer import Answer
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.images import ImageLike
from mechvlm.study.record import GalleryView
from mechvlm.view.drawn import added_up, frames
from mechvlm.view.example import Pick, ShownExample, match_example
from mechvlm.view.patches import patches
from mechvlm.view.stage import VEIL
from mechvlm.vlm.vlm import VLM

HEAT_SIDE = 256
"""Longer side of the small pictures, in pixels."""


def read_view(vlm: VLM, inputs: Inputs) -> GalleryView:
    """Read one example of the gallery, prompt and answer, in one forward.

    The small picture shows what the prompt's last token reads, which wrote the answer's first.
    """
    last = int(inputs.tokens.prompt[-1])
    dest = destinations(vlm, inputs.tokens, GALLERY_ROOM)
    results = read_for_page(vlm, inputs, torch.cat([dest, torch.tensor([last])]).unique(), k=5)
    shown = match_example(inputs, *results, example=None)
    page = patches(inputs, *results).html()
    return GalleryView(page, _heat(shown, Pick((last,))), shown.tokens.strings[last], shown.first_layer)


def page_inputs(vlm: VLM, image: ImageLike, prompt: str, answer: Answer) -> Inputs:
    """What a page of the gallery is read from: prompt and answer.

    It is the prompt alone, with a warning, where the answer cannot be read back: a model may write
    its image token.
    """
    try:
        return answer.inputs
    except InputError as error:
        warnings.warn(f"{error} Its patch view in the gallery shows the prompt alone.", stacklevel=2)
        return vlm.inputs(image, prompt)


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


def _heat(shown: ShownExample, pick: Pick) -> Image.Image:
    """A small copy of the first image, with the heat of a pick at the layer shown first.

    The stronger a frame, the more was read there. Parts that the model does not see are paler.
    """
    image = shown.pictures[0].copy()
    image.thumbnail((HEAT_SIDE, HEAT_SIDE))
    heats = shown.heat(pick, shown.first_layer)
    views, heats = zip(*[(v, h) for v, h in zip(shown.views, heats, strict=True) if v.image == 0], strict=True)
    # The place of each pixel on the original image, and what the cells there hold.
    width, height = shown.pictures[0].size
    x = (np.arange(image.width) + 0.5) * width / image.width
    y = (np.arange(image.height) + 0.5) * height / image.height
    heat, seen = added_up(views, heats, x, y)
    veil = np.where(seen > 0, 0, VEIL)[..., None]
    pixels = np.asarray(image) / 255 * (1 - veil) + veil
    drawn = frames(views, heats, x, y, float(heat.max()))
    pixels = pixels * (1 - drawn[..., 3:]) + drawn[..., :3] * drawn[..., 3:]
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))
