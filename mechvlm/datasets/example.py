"""One example of a data set: an image and the captions that describe it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mechvlm.inputs.images import StoredImage


@dataclass(frozen=True)
class Example:
    """One image with its captions.

    Attributes:
        id: the same in every run and on every machine; tables use it as their key.
        image: the picture itself, or the file or table row that it is read from when needed.
        captions: descriptions of the image, by people or by a generator; at least one.
        meta: further facts that the data set knows, such as the objects of a scene.

    Example:
        >>> Example("dog-1", Path("photos/dog.jpg"), ("a dog asleep", "a dog on a sofa"))
    """

    id: str
    image: Image.Image | Path | StoredImage
    captions: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict, repr=False)
