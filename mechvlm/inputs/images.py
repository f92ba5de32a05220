"""Opens images of every mode as RGB, or says why one cannot be used."""

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BufferedReader, BytesIO, TextIOBase
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.inputs.arrays import array_image
from mechvlm.outside.files import file_inside

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""The formats that are read, by Pillow's names; HEIC with the package pillow-heif. Pillow knows
more, some of which run other programs (EPS) or hold an image of another size (ICO)."""
MAX_PIXELS = 50_000_000
"""Larger images are refused before they are decoded. Pillow takes 4 bytes for a pixel in RGB, 200
MB in all, and about 500 MB while it decodes: the largest image of each format stays under 1 GB."""
FEWER_PIXELS = {"WEBP": 40_000_000, "AVIF": 40_000_000, "JPEG2000": 25_000_000}
"""The same for formats whose decoders need more memory: 17 to 24 bytes for a pixel."""
LARGEST_IMAGE_FILE = 250_000_000
"""Bytes of an image's file. 50 megapixels that are not compressed have 150 MB, 200 with alpha."""
LONGEST_DECODING = 30.0
"""Seconds in which an image must be read: a photograph takes a second at most."""
DECODING_BLOCK = 4096
"""Bytes of a JPEG that are decoded at once. The clock is looked at between them."""
TOO_LARGE = "Make it smaller first: the model sees a few hundred pixels a side."
BAND_PIXELS = 4_000_000
"""Pixels whose transparency is resolved at once."""


@dataclass(frozen=True)
class StoredImage:
    """An image in a row of a table of the library `datasets`.

    Its bytes are read each time they are needed, and not kept. A row may name a file instead, which
    must lie in one of the `folders`: a table of somebody else's must not bring other pictures of
    the disk into a report.
    """

    table: Any = field(repr=False)
    row: int
    column: str
    folders: tuple[str, ...] = field(default=(), repr=False)

    def open(self, mode: str = "rb") -> BytesIO | BufferedReader:
        """The image's file, open in binary as by `Path.open("rb")`.

        Raises:
            InputError: when the row holds no image, or names a file elsewhere.
        """
        value = self.table[self.row][self.column]
        value = value if isinstance(value, dict) else {"bytes": value}
        if value.get("bytes"):
            return BytesIO(value["bytes"])
        if value.get("path"):
            return self._named(value["path"]).open("rb")
        raise InputError(f"Row {self.row} holds no image in {self.column!r}.")

    def _named(self, name: str) -> Path:
        for folder in self.folders:
            if not Path(name).is_absolute() or Path(name).is_relative_to(folder):
                return file_inside(folder, os.path.relpath(name, folder) if Path(name).is_absolute() else name)
        raise InputError(
            f"Row {self.row} names the file {name!r:.200} for its image, outside of the data set ({', '.join(self.folders)}). "
            "Put the images' bytes into the table."
        )


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
        with ExitStack() as stack:
            file = _TimedFile(_source(image, stack), name)
            return _to_rgb(stack.enter_context(_open(file, name)), name, ours=True)
    except InputError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, which is a higher one
        raise InputError(
            f"The image {name} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; at most {MAX_PIXELS:,} are read. "
            f"{TOO_LARGE}"
        ) from None
    except Exception as error:
        if isinstance(error, UnidentifiedImageError) and name.lower().endswith(VIDEO_ENDINGS):
            raise InputError(
                f"The image {name} is a video, and mechvlm reads images: give one of its frames, or several as the images of one "
                "prompt, [[first, second]]."
            ) from error
        reason = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"The image {name} cannot be read ({reason}). Is it whole, and an image?") from error


class _TimedFile:
    """A file of bounded size that is read for a bounded time.

    A small file can take minutes to decode, such as a JPEG of thousands of scans.
    """

    def __init__(self, file: BinaryFile, name: str):
        self.file, self.name, self.end = file, name, time.monotonic() + LONGEST_DECODING
        if (size := file.seek(0, os.SEEK_END)) > LARGEST_IMAGE_FILE:
            raise InputError(
                f"The image {name} has {size / 1e6:,.0f} MB; at most {LARGEST_IMAGE_FILE / 1e6:,.0f} MB are read. "
                f"{TOO_LARGE}"
            )
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        if time.monotonic() > self.end:
            raise InputError(
                f"The image {self.name} takes longer than {LONGEST_DECODING:g} s to decode. Save it again as an "
                "ordinary JPEG or PNG."
            )
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.seek(0, os.SEEK_CUR)


def _source(image: Any, stack: ExitStack) -> BinaryFile:
    """The file of an image that is not decoded yet, with content; `stack` closes what it opens."""
    if isinstance(image, StoredImage):
        return stack.enter_context(image.open())
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
    return stack.enter_context(_existing(_path(image)).open("rb"))


def _path(image: str | PathLike) -> Path:
    return Path(os.path.expanduser(image))


VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v", ".wmv", ".flv")
"""Endings of the names of videos."""
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
"""What stands at bytes 8 to 12 of a HEIC file, after `ftyp`."""


def _open(file: _TimedFile, name: str) -> Image.Image:
    """The image, opened by Pillow; HEIC by the package pillow-heif, where it is installed."""
    readable = cast(Any, file)  # Pillow's types ask for more of a file than Pillow does
    try:
        opened = Image.open(readable, formats=FORMATS)
    except UnidentifiedImageError as error:
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
        file.seek(0)
        return pillow_heif.HeifImageFile(readable)
    cast(Any, opened).decodermaxblock = DECODING_BLOCK if opened.format in ("JPEG", "MPO") else ImageFile.MAXBLOCK
    return opened


def _existing(path: Path) -> Path:
    """The path itself, if it is a file with content."""
    if not path.is_file():
        raise InputError(f"No image at {path}: " + ("it is a folder." if path.is_dir() else "there is no such file."))
    if path.stat().st_size == 0:
        raise InputError(f"The image {path} is empty (0 bytes). Fetch it again.")
    return path


def _to_rgb(image: Image.Image, name: str, ours: bool = False) -> Image.Image:
    """The image in RGB. One that is `ours` may be changed, which saves a copy of it."""
    width, height = image.size
    most = min(MAX_PIXELS, FEWER_PIXELS.get(image.format or "", MAX_PIXELS))
    if width * height > most:
        raise InputError(
            f"The image {name} has {width} x {height} = {width * height:,} pixels; at most {most:,} are read. "
            f"{TOO_LARGE}"
        )
    if width * height == 0:
        raise InputError(f"The image {name} is {width} x {height}: it has no pixels.")
    image.load()  # a PNG's EXIF may stand behind its pixels
    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    if is_turned and ours:
        ImageOps.exif_transpose(image, in_place=True)
    upright = ImageOps.exif_transpose(image) if is_turned and not ours else image
    if upright.mode.startswith("I;16"):
        # `convert` would clip at 255 instead of scaling: nearly everything would be white.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise InputError(
            f"The image {name} has mode {upright.mode}, whose range of values is unknown. Scale it to 0..255 and convert it to "
            "mode L or RGB first."
        )
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        return _on_white(upright)
    return upright.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """White behind what is transparent: `convert` alone would show the colours hidden there.

    Band by band, as whole copies in RGBA would take twice the image's memory.
    """
    flat = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        flat.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return flat
