"""Where on the original image the pixels lie that a processor returns: shown by coordinate images.

An image whose gray values ARE its coordinates is sent through the processor. What comes back says
of each pixel where it was, whatever the processor resized, cropped, padded or cut up; no setting of
it is read.

1. Four images of one size go through: gray rises to the right, gray rises downwards, white, black.
2. (value - black) / (white - black) undoes the normalization: what is left is the coordinate, from
   0 to 1. Where white and black agree, there is padding.
3. Eight bits are coarse, so straight lines are fitted over many pixels: x = slope * index + offset.

>>> seen = look((60, 44), 1, "<image>", processor, image_token)
>>> seen.x.shape, seen.n_tokens    # one piece of [32 32] pixels, and the tokens that it becomes
(torch.Size([1, 32, 32]), 16)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

EDGE = 2
"""Pixels at the end of a line that no fit uses: a resize bends the line there."""


@dataclass(frozen=True)
class Seen:
    """What the processor made of one image.

    A piece is a tile of pixels, [row col], or one patch, [1 value].

    Attributes:
        x, y: of each pixel of each piece: where it lies on the image, 0 (left, top) to 1.
        inside: True where it shows the image, False on padding.
        n_tokens: how many visual tokens the image becomes.
        shape: of the pixels as the processor returned them.
        keys: names of all that it returned.
        image_size: (width, height) of the image.
    """

    x: Float[Tensor, "piece row col"]
    y: Float[Tensor, "piece row col"]
    inside: Bool[Tensor, "piece row col"]
    n_tokens: int
    shape: tuple[int, ...]
    keys: frozenset[str]
    image_size: tuple[int, int]


def look(size: tuple[int, int], n_images: int, text: str, processor, image_token: int) -> Seen:
    """What the processor makes of an image of this size.

    There are no pieces where it returns no pixels, or packs those of several images into one.

    Args:
        size: (width, height).
        n_images: how many such images stand in the prompt: some processors cut up single ones only.
        text: the prompt.
        processor: the Hugging Face processor.
        image_token: id of the visual tokens.
    """
    width, height = size
    right, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    encodings = [_send(gray, n_images, text, processor) for gray in (right, down, np.ones_like(right), 0 * right)]
    white, black = encodings[2:]
    keys = [k for k, v in white.items() if v.is_floating_point() and not torch.equal(v, black[k])]
    n_tokens = int((white["input_ids"] == image_token).sum()) // n_images
    shape = tuple(white[keys[0]].shape) if keys else ()
    if not keys or len(_pieces(white[keys[0]])) % n_images:
        none = torch.empty(0, 1, 1)
        return Seen(none, none, none.bool(), n_tokens, shape, frozenset(white), size)
    x, y, light, dark = (_pieces(encoding[keys[0]].float()) for encoding in encodings)
    n_pieces = len(x) // n_images
    x, y, light, dark = (values[:n_pieces] for values in (x, y, light, dark))
    span = light - dark
    inside = span.abs() > 0.25 * span.abs().max()
    span = torch.where(inside, span, 1)
    return Seen((x - dark) / span, (y - dark) / span, inside, n_tokens, shape, frozenset(white), size)


def _send(gray: np.ndarray, n_images: int, text: str, processor) -> dict[str, Any]:
    """The encoding of n images of these gray values, 0 to 1."""
    image = Image.fromarray(np.rint(255 * gray).astype(np.uint8)).convert("RGB")
    images = [image] if n_images == 1 else [[image] * n_images]
    return dict(processor(images=images, text=[text], return_tensors="pt"))


def _pieces(pixels: Tensor) -> Float[Tensor, "piece row col"]:
    """The pixels as pieces: the first channel of tiles, or patches, whose channels lie mixed."""
    if pixels.ndim >= 4 and pixels.shape[-3] == 3:
        return pixels[..., 0, :, :].reshape(-1, *pixels.shape[-2:])
    if pixels.ndim >= 4 and pixels.shape[-1] == 3:
        return pixels[..., 0].reshape(-1, *pixels.shape[-3:-1])
    return pixels.reshape(-1, 1, pixels.shape[-1])


def fit_line(values: Float[Tensor, " n"], inside: Bool[Tensor, " n"]) -> tuple[float, float]:
    """(slope, offset) with value = slope * (index + 1/2) + offset, by least squares over `inside`.

    >>> fit_line(torch.tensor([0.125, 0.375, 0.625, 0.875]), torch.ones(4, dtype=torch.bool))
    (0.25, 0.0)
    """
    numbers = inside.nonzero()[:, 0]
    if len(numbers) > 4 * EDGE:
        numbers = numbers[EDGE:-EDGE]
    at, value = numbers.double() + 0.5, values[numbers].double()
    spread = at - at.mean()
    slope = float((spread * value).sum() / (spread**2).sum()) if len(numbers) > 1 else 0.0
    return slope, float(value.mean() - slope * at.mean())
