"""What every data set yields: an image and the captions that describe it."""

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
        id: stable over runs and machines; tables are keyed by it.
        image: the picture itself, or the file or row it is read from when it is needed.
        captions: what people (or a generator) say of it; at least one.
        meta: what the data set knows beyond that (a scene's objects, say).
    """

    id: str
    image: Image.Image | Path | StoredImage
    captions: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict, repr=False)
