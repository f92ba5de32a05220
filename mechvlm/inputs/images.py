"""Opening images, and following one through its processor: resize, centre crop, patches."""

from dataclasses import dataclass, field
from io import BufferedReader, BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mechvlm.errors import InputError

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: 100 megapixels, 300 MB as RGB."""


@dataclass(frozen=True)
class StoredImage:
    """An image in a row of a table (of the library `datasets`): its file's bytes, read when they are needed and not kept."""

    table: Any = field(repr=False)
    row: int
    column: str

    def open(self, mode: str = "rb") -> BytesIO | BufferedReader:
        """The image's file, in binary as `Path.open("rb")` gives it.

        Raises:
            InputError: where the row holds no image.
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
    """The image in RGB, turned as its EXIF data says.

    Raises:
        InputError: when the file is missing, empty, truncated or no image, or has more than `MAX_PIXELS` pixels.
    """
    if isinstance(image, str) and "://" in image:
        raise InputError(f"The image {image!r} is an address: fetch it first, and give the file.")
    if isinstance(image, Image.Image):
        try:
            return _rgb(image, "given")
        except OSError as error:  # opened lazily, and truncated
            raise InputError(f"The image given cannot be read ({error}). Is its file whole?") from error
    name = f"of row {image.row}" if isinstance(image, StoredImage) else str(Path(image))
    try:
        file = image.open() if isinstance(image, StoredImage) else _there(Path(image))
        # PIL's own guard against decompression bombs sits lower and only warns; ours below refuses.
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(file) as opened:
                return _rgb(opened, name)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"The image {name} cannot be read ({error}). Is it whole, and an image?") from error


def _there(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"No image at {path}: " + ("it is a folder." if path.is_dir() else "there is no such file."))
    if path.stat().st_size == 0:
        raise InputError(f"The image {path} is empty (0 bytes). Fetch it again.")
    return path


def _rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"The image {name} has {width} x {height} = {width * height:,} pixels; at most {MAX_PIXELS:,} are read. "
            "Make it smaller first: the model sees a few hundred pixels a side."
        )
    if width * height == 0:
        raise InputError(f"The image {name} is {width} x {height}: it has no pixels.")
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I;16"):
        # `convert` would clip at 255 instead of scaling: nearly everything would be white.
        turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
    elif turned.mode in ("I", "F"):
        raise InputError(
            f"The image {name} has mode {turned.mode}, whose range of values is unknown. Scale it to 0..255 and convert it to "
            "mode L or RGB first."
        )
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        # White under transparency: `convert` alone would show whatever colour the hidden pixels happen to hold.
        turned = turned.convert("RGBA")
        ground = Image.new("RGBA", turned.size, "white")
        return Image.alpha_composite(ground, turned).convert("RGB")
    return turned.convert("RGB")
