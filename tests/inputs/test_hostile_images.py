"""Images that were made to do harm: refused before they cost memory, time, or another program."""

import io
import os
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from mechvlm.errors import InputError
from mechvlm.inputs import images
from mechvlm.inputs.images import FEWER_PIXELS, FORMATS, MAX_PIXELS, StoredImage, open_image

PEAK = r"""
import re, sys
from mechvlm.errors import InputError
from mechvlm.inputs.images import open_image
try:
    print(open_image(sys.argv[1]).size)
except InputError as error:
    print(error)
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])  # ru_maxrss counts the parent's too
"""


def peak(path) -> tuple[str, int]:
    """What a process of its own says of an image, and its largest size in bytes."""
    process = subprocess.run(
        [sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True, timeout=400
    )
    said, kilobytes = process.stdout.rsplit("\n", 2)[:2]
    return said, int(kilobytes) * 1024


def flat(mode: str, n_pixels: int) -> Image.Image:
    """The largest image of this mode with 5000 columns: red, half transparent where it can be."""
    return Image.new(
        mode, (5000, n_pixels // 5000), {"RGB": (255, 0, 0), "RGBA": (255, 0, 0, 128), "CMYK": (0, 255, 255, 0)}[mode]
    )


LARGEST = {
    "a.jpg": ("RGB", {"progressive": True, "subsampling": 0}),
    "ink.jpg": ("CMYK", {"progressive": True}),
    "a.png": ("RGBA", {"compress_level": 1}),
    "a.webp": ("RGBA", {"lossless": True, "method": 0}),
    "a.gif": ("RGB", {}),
    "a.bmp": ("RGB", {}),
    "a.tif": ("RGBA", {}),
    "a.ppm": ("RGB", {}),
    "a.jp2": ("RGBA", {}),
    "a.avif": ("RGBA", {"speed": 10}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_image_of_each_format_takes_less_than_a_gigabyte(tmp_path, name):
    mode, options = LARGEST[name]
    kind = Image.registered_extensions()[Path(name).suffix]
    flat(mode, FEWER_PIXELS.get(kind, MAX_PIXELS)).save(tmp_path / name, **options)
    said, size = peak(tmp_path / name)
    assert said.startswith("(5000, ")
    assert size < 1_000_000_000


def test_every_format_is_measured():
    kinds = {Image.registered_extensions()[Path(name).suffix] for name in LARGEST}
    assert kinds == set(FORMATS)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, without pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + b"\0\0\0\0"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(60_000, 60_000), (10_000, 10_000), (2**31 - 1, 1)])
def test_a_size_is_refused_from_the_header(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png_header(*size))
    with pytest.raises(InputError):
        open_image(tmp_path / "a.png")


def test_an_icon_that_holds_another_image_is_not_opened(tmp_path):
    """Its outer header says 256 pixels a side; the PNG in it has 3,600 million."""
    inner = png_header(60_000, 60_000)
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(inner), 22) + inner
    (tmp_path / "a.jpg").write_bytes(icon)
    said, size = peak(tmp_path / "a.jpg")
    assert "no image that Pillow knows" in said
    assert size < 500_000_000


def test_postscript_runs_no_program(tmp_path, monkeypatch):
    """Pillow gives PostScript to `gs`: here one that leaves a mark."""
    program, mark = tmp_path / "gs", tmp_path / "ran"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(InputError, match="no image that Pillow knows"):
        open_image(tmp_path / "a.jpg")
    assert not mark.exists()


def test_pillows_own_limit_is_left_alone(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    before = Image.MAX_IMAGE_PIXELS
    seen = []

    class Watched(io.BytesIO):
        def read(self, size=-1):
            seen.append(Image.MAX_IMAGE_PIXELS)
            return super().read(size)

    open_image(Watched((tmp_path / "a.png").read_bytes()))
    assert set(seen) == {before}


def many_scans(n: int) -> bytes:
    """A progressive JPEG whose last scan comes n times more: each goes through all blocks."""
    file = io.BytesIO()
    Image.effect_noise((3000, 3000), 20).save(file, "JPEG", progressive=True, quality=5)
    content = file.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * n + b"\xff\xd9"


def test_decoding_ends_in_time(tmp_path, monkeypatch):
    content = many_scans(0)
    assert open_image(content).size == (3000, 3000)
    monkeypatch.setattr(images, "LONGEST_DECODING", 0.5)
    start = time.process_time()
    with pytest.raises(InputError, match=r"takes longer than 0.5 s to decode"):
        open_image(many_scans(2000))
    assert time.process_time() - start < 10


def test_a_file_is_measured_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGEST_IMAGE_FILE", 1000)
    for image in (bytes(1001), io.BytesIO(bytes(1001))):
        with pytest.raises(InputError, match="has 0 MB; at most 0 MB"):
            open_image(image)


def test_special_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    for path in (tmp_path / "a.jpg", "/dev/zero"):
        with pytest.raises(InputError, match="No image at"):
            open_image(path)


def test_a_row_names_no_file_elsewhere(tmp_path):
    """Of an image in a table: bytes, or a file of the data set's folder."""
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data, other):
        folder.mkdir()
        Image.new("RGB", (3, 3)).save(folder / "a.png")
    (data / "link.png").symlink_to(other / "a.png")
    os.mkfifo(data / "pipe.png")
    for name in ("a.png", str(data / "a.png")):
        assert open_image(StoredImage([{"image": {"bytes": None, "path": name}}], 0, "image", (str(data),))).size == (
            3,
            3,
        )
    outside = [
        "../other/a.png",
        str(other / "a.png"),
        "link.png",
        "pipe.png",
        "/dev/zero",
        "C:\\a.png",
        "\\\\host\\a.png",
    ]
    for name in outside:
        with pytest.raises(InputError, match=r"outside of|leads out of|no regular file"):
            open_image(StoredImage([{"image": {"bytes": None, "path": name}}], 0, "image", (str(data),)))
