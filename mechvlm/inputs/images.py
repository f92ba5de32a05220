"""Opens images of every mode as RGB, or says why one cannot be used."""

import os
from dataclasses import dataclass, field
from io import BufferedReader, BytesIO, TextIOBase
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.inputs.arrays import array_image

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


@runtime_checkable
class BinaryFile(Protocol):
    """A file open in binary: what `open(path, "rb")` returns, or `io.BytesIO(data)`."""

    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...


ImageLike = Image.Image | str | PathLike | bytes | BinaryFile | np.ndarray | Tensor | StoredImage
"""What is taken for one image: a PIL image, a path, a file's bytes, an open file, an array
[height width] or [height width 3 or 4], or a tensor (see `mechvlm.inputs.arrays.array_image`)."""


def open_image(image: ImageLike) -> Image.Image:
    """The image in RGB, rotated as its EXIF data says, with white behind transparent pixels.

    >>> open_image("~/photos/cat.heic").size  # HEIC needs the package pillow-heif

    Raises:
        InputError: when the file is missing, empty, truncated or no image, when the image was
            closed, has more than `MAX_PIXELS` pixels or none, or when its layout or its range of
            values is unknown (modes I and F; see `array_image` for arrays).
    """
    if isinstance(image, str) and "://" in image:
        raise InputError(f"The image {image!r} is an address: fetch it first, and give the file.")
    if isinstance(image, Image.Image):
        try:
            return _to_rgb(image, "given")
        except InputError:
            raise
        except Exception as error:  # Pillow reads only now: the file may be closed or cut
            raise InputError(
                f"The image given cannot be read ({error}). Was it closed, or is its file not whole? Give its path."
            ) from error
    if isinstance(image, np.ndarray | Tensor):
        return _to_rgb(array_image(image), "given")
    if isinstance(image, StoredImage):
        name = f"of row {image.row}"
    else:
        name = "given" if isinstance(image, bytes | BinaryFile) else str(_path(image))
    try:
        file = _source(image)
        # PIL's own guard against decompression bombs has a lower limit and only warns. `_to_rgb`
        # refuses instead, before anything is decoded.
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with _open(file, name) as opened:
                return _to_rgb(opened, name)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    except InputError:
        raise
    except Exception as error:
        reason = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"The image {name} cannot be read ({reason}). Is it whole, and an image?") from error


def _source(image: Any) -> Path | BinaryFile:
    """The file of an image that is not decoded yet, with content."""
    if isinstance(image, StoredImage):
        return image.open()
    if isinstance(image, bytes):
        if not image:
            raise InputError("The image given is empty (0 bytes).")
        return BytesIO(image)
    if isinstance(image, BinaryFile):
        if getattr(image, "closed", False):
            raise InputError("The image given is a file that was closed: open it again, or give its path.")
        if isinstance(image, TextIOBase):
            raise InputError("The image given is a file open as text: open it with open(path, 'rb').")
        return image
    return _existing(_path(image))


def _path(image: str | PathLike) -> Path:
    return Path(os.path.expanduser(image))


HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
"""What stands at bytes 8 to 12 of a HEIC file, after `ftyp`."""


def _open(file: Path | BinaryFile, name: str) -> Image.Image:
    """The image, opened by Pillow; HEIC by the package pillow-heif, where it is installed."""
    readable = cast(Any, file)  # Pillow's types ask for more of a file than Pillow does
    try:
        return Image.open(readable)
    except UnidentifiedImageError as error:
        if isinstance(file, Path):
            with file.open("rb") as opened:
                head = opened.read(12)
        else:
            file.seek(0)
            head = file.read(12)
        if head[4:8] != b"ftyp" or head[8:12] not in HEIC_BRANDS:
            raise
        try:
            import pillow_heif
        except ImportError:
            raise InputError(
                f"The image {name} is HEIC, which Pillow alone does not read: pip install pillow-heif, or save it as JPEG."
            ) from error
        pillow_heif.register_heif_opener()
        return Image.open(readable)


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
