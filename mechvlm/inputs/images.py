"""Opens images of every mode as RGB, or says why one cannot be used."""

from dataclasses import dataclass, field
from io import BufferedReader, BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mechvlm.errors import InputError

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded. 100 megapixels are 300 MB as RGB."""


@dataclass(frozen=True)
class StoredImage:
    """An image in a row of a table of the library `datasets`.

    Its bytes are read each time they are needed, and not kept.
    """

    table: Any = field(repr=False)
    row: int
    column: str

    def open(self, mode: str = "rb") -> BytesIO | BufferedReader:
        """The image's file, open in binary as by `Path.open("rb")`.

        Raises:
            InputError: when the row holds no image.
        """
        value = self.table[self.row][self.column]
        value = value if isinstance(value, dict) else {"bytes": value}
        if value.get("bytes"):
            return BytesIO(value["bytes"])
        if value.get("path"):
            return Path(value["path"]).open("rb")
        raise InputError(f"Row {self.row} holds no image in {self.column!r}.")


ImageLike = Image.Image | str | PathLike | StoredImage


def open_image(image: ImageLike) -> Image.Image:
    """The image in RGB, rotated as its EXIF data says, with white behind transparent pixels.

    Raises:
        InputError: when the file is missing, empty, truncated or no image, when the image has more
            than `MAX_PIXELS` pixels or none, or when its range of values is unknown (modes I and
            F).
    """
    if isinstance(image, str) and "://" in image:
        raise InputError(f"The image {image!r} is an address: fetch it first, and give the file.")
    if isinstance(image, Image.Image):
        try:
            return _to_rgb(image, "given")
        except OSError as error:  # PIL reads the pixels only now, and the file is truncated
            raise InputError(f"The image given cannot be read ({error}). Is its file whole?") from error
    name = f"of row {image.row}" if isinstance(image, StoredImage) else str(Path(image))
    try:
        file = image.open() if isinstance(image, StoredImage) else _existing(Path(image))
        # PIL's own guard against decompression bombs has a lower limit and only warns. `_to_rgb`
        # refuses instead, before anything is decoded.
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(file) as opened:
                return _to_rgb(opened, name)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"The image {name} cannot be read ({error}). Is it whole, and an image?") from error


def _existing(path: Path) -> Path:
    """The path itself, if it is a file with content."""
    if not path.is_file():
        raise InputError(f"No image at {path}: " + ("it is a folder." if path.is_dir() else "there is no such file."))
    if path.stat().st_size == 0:
        raise InputError(f"The image {path} is empty (0 bytes). Fetch it again.")
    return path


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"The image {name} has {width} x {height} = {width * height:,} pixels; at most {MAX_PIXELS:,} are read. "
            "Make it smaller first: the model sees a few hundred pixels a side."
        )
    if width * height == 0:
        raise InputError(f"The image {name} is {width} x {height}: it has no pixels.")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        # `convert` would clip at 255 instead of scaling: nearly everything would be white.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise InputError(
            f"The image {name} has mode {upright.mode}, whose range of values is unknown. Scale it to 0..255 and convert it to "
            "mode L or RGB first."
        )
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        # `convert` alone would show whatever colours the transparent pixels happen to hold.
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright).convert("RGB")
    return upright.convert("RGB")
