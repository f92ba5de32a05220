"""Pages of single tokens, which CircuitsVis draws (Nanda and Cooney 2022), and their maps.

Its JavaScript comes from the installed package: nothing is fetched.

1. A page holds its units (units.py), their values and its own words as one JSON.
2. tokens.js lays out the page as the patch view lays out its own, and calls CircuitsVis.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechvlm.view.page import View, page_script, to_json
from mechvlm.view.units import TokenUnits

TOKEN_SCRIPTS = ("places", "unpack", "frames", "elements", "image", "words", "tokens")
"""The page's scripts: places, numbers, heat, what pages are made of, images, words; the page."""
MORE = {
    "start": None, "first": 0, "step": "", "steps": [0], "heads": [""], "values": None, "patterns": None, "lens": None,
    "whyImage": "The stronger a patch's frame, the larger its value; inside, the image is as it is.",
}  # fmt: skip
"""What a page holds where a view says nothing else."""


def token_page(
    units: TokenUnits, title: str, why: str, preview: Callable[[], bytes], height: int, instead: str = "", **data
) -> View:
    """The page of a view.

    Args:
        units: what it shows, and where.
        title: its title, without the model's name.
        why: one sentence on what is seen.
        preview: draws the picture of the page, a PNG.
        height: of the frame in a notebook, in pixels, without the image and the tokens.
        instead: what to choose when the page is too large.
        data: what tokens.js draws; `MORE` has the rest.

    Raises:
        ViewError: when an image is gone, a value is NaN or infinite, or the page is too large.
    """
    page = {**MORE, **units.page(), "title": title, "why": why, **data}
    if not units.cells:
        page["whyImage"] = "No token has a place on the image: each may read all of it."
    body = f'<article class="view token-view"><script type="application/json">{to_json(page)}</script></article>'
    folder, model = files("mechvlm.view"), units.inputs.model
    return View(
        f"{title}, {model}" if model else title, body, (bundle(), page_script(TOKEN_SCRIPTS)),
        tuple((folder / f"{name}.css").read_text("utf-8") for name in ("views", "tokens")), preview,
        height=height + _height(page), **({"instead": instead} if instead else {}),
    )  # fmt: skip


def _height(page: dict[str, Any]) -> int:
    """Pixels that the image and the tokens take at a notebook's width of about 900, estimated."""
    words = sum(24 + 8 * min(len(unit["piece"]), 20) for unit in page["units"] if unit["kind"] != "image")
    tall = [410 * height / width for width, height in (image["size"] for image in page["images"])]
    return 150 + max(90 + round(min(480, max(tall, default=0))), 130 + 36 * -(-words // 440))


@lru_cache
def bundle() -> str:
    """CircuitsVis's JavaScript, as installed, without the reference to its source map."""
    spec = find_spec("circuitsvis")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("CircuitsVis is not installed: pip install circuitsvis")
    source = Path(spec.submodule_search_locations[0], "dist", "cdn", "iife.js").read_text(encoding="utf-8")
    return re.sub(r"\n//# sourceMappingURL=.*", "", source)


def rounded(values: torch.Tensor) -> list:
    """The values with four significant digits: enough for a tooltip, in half the bytes."""
    x = values.detach().cpu().double().numpy()
    scale = 10.0 ** (3 - np.floor(np.log10(np.where(x == 0, 1, np.abs(x)))))
    return (np.round(x * scale) / scale).tolist()
