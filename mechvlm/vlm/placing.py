"""Whether visual tokens lie where their layout says, told by the model itself.

A layout follows from what the processor returns. A model may still mix its patches before they
enter the decoder: a resampler's tokens read the whole image. So an unknown class is asked:

1. All attention before the decoder is silenced. A token's state then depends on its own pixels.
2. The upper left quarter of an image is changed.
3. The states of tokens that lie within it must change, and of those that lie outside must not.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mechvlm.errors import ModelError
from mechvlm.families.record import Architecture, part
from mechvlm.families.recording import attention_through, tensors_of
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.build import build_inputs

PICTURE = (96, 64)
"""Width and height of the image."""
BLUR = 6
"""Pixels around the quarter's edge that resizing blurs."""
LEAST = 1e-4
"""A smaller change of a state is rounding."""
SHARE, COARSE_SHARE = 0.15, 0.5
"""The largest change of a token that lies outside, as a share of the largest of all; and where all
tokens are so coarse that the blur reaches them."""


class _ReachedError(Exception):
    """The decoder is reached, and need not run."""


def with_checked_places(hf: Any, processor: Any, record: Architecture) -> Architecture:
    """The record; with `visual_tokens="unplaced"` where tokens do not lie as their layout says.

    Costs two forwards of everything before the decoder.
    """
    if record.visual_tokens != "cells" or lie_as_laid_out(hf, processor, record):
        return record
    return replace(record, visual_tokens="unplaced")


def lie_as_laid_out(hf: Any, processor: Any, record: Architecture) -> bool:
    """Whether the states of visual tokens follow the pixels of their boxes."""
    pixels = np.random.default_rng(0).integers(0, 256, (PICTURE[1], PICTURE[0], 3), dtype=np.uint8)
    other = pixels.copy()
    other[: PICTURE[1] // 2, : PICTURE[0] // 2] = 255 - other[: PICTURE[1] // 2, : PICTURE[0] // 2]
    before, after = (
        build_inputs(Image.fromarray(image), "a", record=record, config=hf.config, processor=processor)
        for image in (pixels, other)
    )
    tokens = before.tokens
    if not tokens.patches or not torch.equal(tokens.ids, after.tokens.ids):
        return False
    with torch.no_grad(), attention_through(_silent):
        old, new = (_entering(hf, record, inputs) for inputs in (before, after))
    change = (new - old).abs().amax(-1)
    most = float(change[tokens.image].max())
    boxes = {p: place.box for p in tokens.image.tolist() if (place := tokens.place(p)) is not None}
    if most < LEAST:  # nothing of the image enters without attention
        return False
    for edge, share in ((BLUR, SHARE), (0, COARSE_SHARE)):
        outside = [p for p, box in boxes.items() if box[0] >= PICTURE[0] / 2 + edge or box[1] >= PICTURE[1] / 2 + edge]
        inside = [p for p, box in boxes.items() if box[2] <= PICTURE[0] / 2 - edge and box[3] <= PICTURE[1] / 2 - edge]
        if outside:
            return bool((change[outside] < share * most).all()) and bool((change[inside] > LEAST).all())
    return False


def _silent(run: Callable) -> Callable:
    def attend(module, q, k, v, *args, **kwargs):
        return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None

    return attend


def _entering(hf: Any, record: Architecture, inputs: Inputs) -> Tensor:
    """The states that enter the decoder's first layer, [pos d_model]."""
    states: list[Tensor] = []

    def keep(module, args, kwargs):
        states.append(next(t for t in tensors_of([args, kwargs]) if t.is_floating_point()).detach().clone())
        raise _ReachedError

    hook = part(hf, record.layers)[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        hf(**{
            key: value.to(hf.device, hf.dtype if value.is_floating_point() else None)
            for key, value in inputs.encoding.items()
        })  # fmt: skip
    except _ReachedError:
        return states[0].reshape(len(inputs.tokens), -1).float().cpu()
    finally:
        hook.remove()
    raise ModelError(f"The forward of {type(hf).__name__} ended without its decoder's first layer, {record.layers}.0.")
