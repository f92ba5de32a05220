"""Pages of single tokens as tests read them: results with hostile text, the screen's pixels."""

import io
import re
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import mechvlm as mv
from helpers.images import noise_image

HOSTILE = [
    "<script>window.ran = 1; alert(1)</script>", "</script>", "<img src=x onerror='window.ran = 1'>", '"quoted"', "'single'",
    "a\u2028b", "<s>", "&lt;", "שלום עולם", "👩\u200d🚀", "<!--", "\u202eturned", "{{7*7}}", "`${1}`", "\\", "<image>",
]  # fmt: skip


def hostile_results(llava_vlm):
    """Inputs with hostile text tokens, a lens with hostile words, and all attention."""
    inputs = llava_vlm.inputs(noise_image(0, (90, 60)), "what is this and that and more and yet more of it")
    tokens = inputs.tokens
    places = [int(tokens.special[0]), *tokens.text.tolist()][: len(HOSTILE)]
    assert len(places) == len(HOSTILE)
    strings = list(tokens.strings)
    for place, piece in zip(places, HOSTILE, strict=True):
        strings[place] = piece
    inputs = replace(inputs, token_maps=(replace(tokens, strings=tuple(strings)),))
    lens, norms = mv.read(llava_vlm, inputs, mv.LogitLens(k=3), mv.NormAttention(dst="all pairs"))
    words = tuple((i, HOSTILE[n % len(HOSTILE)]) for n, (i, _) in enumerate(lens.vocabulary))
    return inputs, replace(lens, vocabulary=words), norms


def views(read) -> dict[str, mv.view.View]:
    inputs, lens, norms = read
    values = torch.linspace(-1, 2, len(inputs.tokens))
    return {
        "attention": mv.view.attention(inputs, norms, 2, pool=2, heads=[0, 1]),
        "raw attention": mv.view.attention(inputs, norms, 2, pool=2, heads=[0, 1], measure="weight"),
        "tokens": mv.view.tokens(inputs, values, name=HOSTILE[0]),
        "attention_row": mv.view.attention_row(inputs, norms, inputs.tokens.last),
        "topk": mv.view.topk(inputs, lens),
    }


def opened(open_page, view, width: int = 1280, scheme: str = "light"):
    phone = {"has_touch": True, "is_mobile": True} if width < 500 else {}
    page = open_page(view, viewport={"width": width, "height": 1000}, color_scheme=scheme, **phone)
    page.wait_for_selector(".token-view:not([data-ready])", state="detached", timeout=60_000)
    return page


def pixels(locator) -> np.ndarray:
    """The pixels of an element, or of the part of a page in the window, [y, x, rgb]."""
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB")).astype(int)


def shown(text: str) -> str:
    """Text on the page without invisible characters."""
    return text.replace("\u2060", "").replace("\xa0", " ").strip()


def plain(text: str) -> str:
    """A token as the page shows it, without what cannot be seen."""
    return shown(re.sub("[\u2028\u202e·]", "", text.replace("\n", "⏎").replace("␣", " ")))
