"""Which pixels of an image each visual token owns, told by the model alone.

With all attention before the decoder silenced, a state that enters the decoder depends on the
pixels of its own token only. One column or row of the image is changed at a time: the states that
change own pixels of it. Nothing here knows a processor, a vision encoder or a layout.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

SHARE = 0.15
"""Of the largest change of a token: smaller ones are the blur of a resize."""


BATCH = 16


class Stop(Exception):
    """The states are there: the decoder need not run."""


def silent(module, query, key, value, *args, **kwargs):
    """An attention that reads nothing."""
    return torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


@contextmanager
def silenced(hf) -> Iterator[None]:
    """No attention of the model reads anything."""
    table = AttentionInterface._global_mapping
    files = {module.__module__: vars(sys.modules[module.__module__]) for module in map(type, hf.modules())}
    own = [names for names in files.values() if "eager_attention_forward" in names]
    saved, eager = table["sdpa"], [names["eager_attention_forward"] for names in own]
    table["sdpa"] = silent
    for names in own:
        names["eager_attention_forward"] = silent
    try:
        yield
    finally:
        table["sdpa"] = saved
        for names, function in zip(own, eager, strict=True):
            names["eager_attention_forward"] = function


def first_layer(hf) -> torch.nn.Module:
    """The first layer of the decoder."""
    decoder = hf.get_decoder()
    while not hasattr(decoder, "layers") and not hasattr(decoder, "h"):  # the model around it
        decoder = getattr(decoder, "decoder", None) or decoder.model
    return (decoder.layers if hasattr(decoder, "layers") else decoder.h)[0]


def entering(hf, encoding: dict[str, Tensor]) -> Tensor:
    """The states that enter the decoder, [example pos d_model]."""
    states = []

    def keep(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])
        raise Stop

    hook = first_layer(hf).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            hf(**encoding)
    except Stop:
        return states[0].reshape(*encoding["input_ids"].shape, -1)
    finally:
        hook.remove()
    raise AssertionError("the decoder was not reached")


def owned(hf, encode, pixels: np.ndarray, visual: Tensor) -> list[tuple[float, float, float, float] | None]:
    """The box of pixels that each visual token owns, (left, top, right, bottom); None without any.

    Args:
        hf: the model.
        encode: images to the arguments of the model's forward.
        pixels: the image [height width 3].
        visual: positions of the visual tokens.
    """
    height, width = pixels.shape[:2]
    with silenced(hf):
        base = entering(hf, encode([Image.fromarray(pixels)]))[:, visual]

        def changed(index) -> Image.Image:
            other = pixels.copy()
            other[index] = 255 - other[index]
            return Image.fromarray(other)

        def changes(images: list[Image.Image]) -> Tensor:
            """How much each token changes with each image [token image]."""
            batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
            states = [entering(hf, encode(batch))[:, visual] for batch in batches]
            return (torch.cat(states) - base).abs().amax(-1).T

        cols = changes([changed(np.s_[:, col]) for col in range(width)])
        rows = changes([changed(np.s_[row]) for row in range(height)])
    boxes = []
    for across, down in zip(cols, rows, strict=True):
        if across.max() < 1e-5:
            boxes.append(None)
            continue
        (left, right), (top, bottom) = (_span(change) for change in (across, down))
        boxes.append((left, top, right, bottom))
    return boxes


def _span(change: Tensor) -> tuple[float, float]:
    large = (change > SHARE * change.max()).nonzero()[:, 0]
    return float(large[0]), float(large[-1]) + 1
