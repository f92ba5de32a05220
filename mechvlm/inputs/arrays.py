"""Arrays and tensors become images, where their layout and range leave no doubt."""

import numpy as np
from PIL import Image
from torch import Tensor

from mechvlm.errors import InputError

CHANNELS = (1, 3, 4)
"""Grey, RGB, and RGB with transparency."""


def array_image(array: np.ndarray | Tensor) -> Image.Image:
    """An array of pixels as an image of mode L, RGB or RGBA.

    >>> array_image(np.zeros((60, 80, 3), np.uint8)).size
    (80, 60)

    Args:
        array: [height width] or [height width channel]; a tensor also [channel height width], where
            only one of its ends can be the channels. One, three or four channels; uint8 in 0..255,
            or floats in 0..1.

    Raises:
        InputError: for another shape, dtype or range, or an array without pixels.
    """
    named = f"The {'tensor' if isinstance(array, Tensor) else 'array'} of shape {tuple(array.shape)}"
    if 0 in array.shape:
        raise InputError(f"{named} holds no pixels.")
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = _channels_last(array, named)
        values = (array.float() if array.is_floating_point() else array).numpy()
    else:
        values = array
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in CHANNELS):
        advice = ""
        if values.ndim == 4:
            advice = " Four axes are several images, list(array), or a video: give one of its frames."
        elif values.ndim == 3 and values.shape[0] in CHANNELS:
            advice = " Its channels come first: give array.transpose(1, 2, 0)."
        raise InputError(f"{named} is no image: it must be [height width] or [height width 3 or 4].{advice}")
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    return Image.fromarray(_bytes(values, named))


def _channels_last(tensor: Tensor, named: str) -> Tensor:
    """The tensor as [height width channel], if only one of its ends can be the channels."""
    if tensor.ndim != 3 or tensor.shape[0] not in CHANNELS:
        return tensor
    if tensor.shape[2] in CHANNELS:
        raise InputError(
            f"{named} has channels first or last, and both could be meant: give an array [height width 3], or an image."
        )
    return tensor.permute(1, 2, 0)


def _bytes(values: np.ndarray, named: str) -> np.ndarray:
    """The values as uint8 in 0..255."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if not np.issubdtype(values.dtype, np.floating):
        raise InputError(f"{named} has dtype {values.dtype}: pixels are uint8 in 0..255, or floats in 0..1.")
    least, most = float(values.min()), float(values.max())
    if not (least >= 0 and most <= 1):  # NaN is refused too
        raise InputError(
            f"{named} holds floats from {least:.3g} to {most:.3g}: pixels are floats in 0..1, or uint8 in 0..255. Undo a "
            "normalization, or divide by the largest value that a pixel can have."
        )
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)
