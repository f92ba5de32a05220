"""Odd images are read as a viewer shows them, or refused with a clear error."""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mechvlm as mv
from helpers.datasets import coco, write_coco
from helpers.images import noise_image
from mechvlm.datasets import load_dataset
from mechvlm.inputs.images import StoredImage, open_image


def ramp(mode: str = "L") -> Image.Image:
    """Grey from 0 to 240 over 16 columns of 4 pixels, 8 high."""
    return Image.fromarray(np.arange(0, 256, 16, dtype=np.uint8).repeat(4)[None].repeat(8, 0)).convert(mode)


def pixel(path, at) -> tuple:
    return open_image(path).getpixel(at)


def test_greyscale_is_the_same_grey(tmp_path):
    ramp().save(tmp_path / "grey.png")
    rgb = np.asarray(open_image(tmp_path / "grey.png"))
    assert rgb.shape == (8, 64, 3)
    assert (rgb == np.asarray(ramp())[..., None]).all()


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (20, 10), (0, 255, 255, 0))  # magenta and yellow ink: red
    image.paste((0, 0, 0, 255), (10, 0, 20, 10))  # black ink alone
    image.save(tmp_path / "ink.tif")
    assert (pixel(tmp_path / "ink.tif", (2, 2)), pixel(tmp_path / "ink.tif", (15, 2))) == ((255, 0, 0), (0, 0, 0))
    image.save(tmp_path / "ink.jpg", quality=100)  # Adobe's format, which stores ink inverted
    assert np.abs(np.array(pixel(tmp_path / "ink.jpg", (2, 2))) - (255, 0, 0)).max() < 12


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 0, 255, 9, 9, 9])
    image.putdata([0, 1, 2, 0, 0, 1, 2, 0])
    image.save(tmp_path / "plain.png")
    assert [pixel(tmp_path / "plain.png", (x, 0)) for x in range(3)] == [(255, 0, 0), (0, 0, 255), (9, 9, 9)]
    for name in ("clear.png", "clear.gif"):
        image.save(tmp_path / name, transparency=1)  # blue is transparent, and becomes white
        assert [pixel(tmp_path / name, (x, 0)) for x in range(3)] == [(255, 0, 0), (255, 255, 255), (9, 9, 9)]
    image.save(tmp_path / "half.png", transparency=bytes([128, 255, 255]))
    assert pixel(tmp_path / "half.png", (0, 0)) == (255, 127, 127)


def test_alpha_lies_over_white(tmp_path):
    for alpha, color in ((0, (255, 255, 255)), (255, (200, 0, 0)), (51, (244, 204, 204))):
        Image.new("RGBA", (3, 3), (200, 0, 0, alpha)).save(tmp_path / "a.png")
        assert pixel(tmp_path / "a.png", (1, 1)) == color
    Image.new("LA", (3, 3), (0, 0)).save(tmp_path / "la.png")
    assert pixel(tmp_path / "la.png", (1, 1)) == (255, 255, 255)


def test_sixteen_bits(tmp_path):
    deep = (np.asarray(ramp()).astype(np.uint16) << 8) + 77
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert (np.asarray(open_image(tmp_path / name))[..., 0] == np.asarray(ramp())).all()


@pytest.mark.parametrize(
    ("orientation", "red"),
    [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 1)), (8, (0, 1))],
)
def test_exif_rotation(tmp_path, orientation, red):
    """The stored top left corner is red. `red` is where it belongs in view, as (right, bottom)."""
    image = Image.new("RGB", (40, 24), "white")
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = orientation
    for name in ("turned.jpg", "turned.png"):
        image.save(tmp_path / name, exif=exif, **({"quality": 95} if name.endswith("jpg") else {}))
        upright = open_image(tmp_path / name)
        assert upright.size == ((40, 24) if orientation < 5 else (24, 40))
        right, bottom = upright.width - 1, upright.height - 1
        corners = {
            (x, y): upright.getpixel((2 + x * (right - 4), 2 + y * (bottom - 4))) for x in (0, 1) for y in (0, 1)
        }
        assert [corner for corner, (_, green, _) in corners.items() if green < 60] == [red]


def test_an_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp"):
        extra = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50, **extra)
        assert Image.open(tmp_path / name).n_frames == 3
        assert pixel(tmp_path / name, (3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_files_are_refused(tmp_path, kind):
    path = tmp_path / f"cut.{kind.lower()}"
    noise_image(0, (200, 150)).save(path, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(mv.InputError, match=r"cut.* cannot be read .*Is it whole, and an image\?"):
        open_image(path)


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-instructblip"])
def bundled(request):
    return mv.load(request.param)


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (3, 40), (1, 1), (20_000, 30), (30, 20_000)])
def test_strips_and_single_pixels_reach_the_model_with_the_right_pixels(bundled, size):
    """The model's pixels equal Pillow's resize and crop.

    A side of 1 or 3 pixels is not taken for the channels.
    """
    image = noise_image(0, size)
    inputs = bundled.inputs(image, "Describe the scene.")
    grid, processor = inputs.tokens.grids[0], bundled.processor.image_processor
    side = grid.rows * grid.patch
    left, top = grid.crop
    expected = image.resize(grid.resized, processor.resample).crop((left, top, left + side, top + side))
    expected = (np.asarray(expected) / 255 - processor.image_mean) / processor.image_std
    pixels = inputs.encoding["pixel_values"][0].numpy().transpose(1, 2, 0)
    # Without torchvision the processor resizes by Pillow too, with it by a similar kernel.
    assert np.abs(pixels - expected).mean() < 0.02
    likeliest = mv.logit_lens(bundled, inputs, k=1, positions="last")
    assert torch.isfinite(likeliest.probs).all()


def test_a_thin_strip_is_refused_if_the_processor_would_enlarge_it(bundled):
    strip = Image.new("RGB", (20_000, 1))
    if bundled.record.visual_tokens == "queries":  # resized to a square, however long it is
        assert bundled.inputs(strip, "a").encoding["pixel_values"].shape[-2:] == (96, 96)
    else:
        with pytest.raises(mv.InputError, match=r"20000 x 1: so narrow .* 1920000 x 96"):
            bundled.inputs(strip, "a")


def test_a_picture_reads_the_same_in_every_format(bundled, tmp_path):
    picture = next(iter(load_dataset("scenes", 1).examples)).image
    file = io.BytesIO()
    picture.save(file, "PNG")
    stored = StoredImage([{"image": {"bytes": file.getvalue(), "path": None}}], 0, "image")
    formats = {"alpha.png": picture.convert("RGBA"), "ink.tif": picture.convert("CMYK"), "plain.bmp": picture}
    for name, image in formats.items():
        image.save(tmp_path / name)
    turned = picture.transpose(Image.Transpose.ROTATE_90)  # EXIF turns it back
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    images = [picture, stored, *(tmp_path / name for name in formats), tmp_path / "turned.png"]
    pixels = bundled.inputs(images, "Describe the scene.").encoding["pixel_values"]
    for other in pixels[1:]:
        assert torch.equal(other, pixels[0])


def test_odd_images_of_a_data_set_do_not_affect_the_others(bundled, tmp_path):
    """Greyscale and CMYK photographs are read; files that are no image are refused one by one."""
    content = coco(6)
    write_coco(tmp_path, content)
    names = [tmp_path / "val2017" / image["file_name"] for image in content["images"]]
    noise_image(0).convert("L").save(names[0])
    noise_image(0).convert("CMYK").save(names[1])
    names[2].write_bytes(names[2].read_bytes()[:700])
    names[3].write_bytes(b"")
    names[4].write_text("<html>404</html>")
    data = load_dataset(f"coco:{tmp_path}")
    assert len(data) == 6  # no image is opened before the model needs it
    messages = {}
    for example in data.examples:
        try:
            bundled.inputs(example.image, "a")
        except mv.InputError as error:
            messages[example.id] = str(error)
    assert set(messages) == {"102", "103", "104"}
    assert "is empty (0 bytes)" in messages["103"]
    assert all("cannot be read" in messages[i] for i in ("102", "104"))


# -- arrays, bytes and open files --


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_arrays_are_the_image_that_pillow_makes_of_them(channels, dtype):
    shape = (12, 20) if channels is None else (12, 20, channels)
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = open_image(Image.fromarray(array[..., 0] if channels == 1 else array))
    values = array if dtype == np.uint8 else (array / 255).astype(dtype)
    assert open_image(values).tobytes() == expected.tobytes()
    tensor = torch.from_numpy(values)
    assert open_image(tensor).tobytes() == expected.tobytes()
    if channels is not None:
        assert open_image(tensor.permute(2, 0, 1)).tobytes() == expected.tobytes(), "channels first"


def test_tensors_that_need_gradients_and_strided_arrays():
    array = np.random.default_rng(0).random((12, 20, 3), dtype=np.float32)
    expected = open_image(array).tobytes()
    assert open_image(torch.from_numpy(array).requires_grad_()).tobytes() == expected
    assert open_image(np.asfortranarray(array)).tobytes() == expected
    turned = np.ascontiguousarray(array[:, ::-1])
    assert open_image(array[:, ::-1]).tobytes() == open_image(turned).tobytes()
    grey = torch.linspace(0, 1, 256).to(torch.bfloat16).expand(3, 4, 256)
    assert np.abs(np.asarray(open_image(grey))[0, :, 0] - np.arange(256.0)).max() <= 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 12, 20), np.uint8), r"array of shape \(3, 12, 20\) is no image.*channels come first.*transpose\(1, 2, 0\)"),
        (np.zeros((2, 12, 20, 3), np.uint8), r"\(2, 12, 20, 3\) is no image.*several images, list\(array\)"),
        (np.zeros((12, 20, 5), np.uint8), r"\(12, 20, 5\) is no image"),
        (np.zeros(12, np.uint8), r"\(12,\) is no image"),
        (np.zeros((0, 20, 3), np.uint8), r"\(0, 20, 3\) holds no pixels"),
        (np.zeros((12, 20, 3), np.int64), r"\(12, 20, 3\) has dtype int64: pixels are uint8 in 0..255, or floats"),
        (np.zeros((12, 20), np.uint16), "dtype uint16"),
        (np.zeros((12, 20), bool), "dtype bool"),
        (np.full((12, 20, 3), 200.0), "holds floats from 200 to 200: pixels are floats in 0..1"),
        (np.array([[-0.5, 1.0]]), "holds floats from -0.5 to 1"),
        (np.array([[np.nan, 1.0]]), "holds floats from nan"),
        (torch.zeros(3, 12, 3), r"tensor of shape \(3, 12, 3\) has channels first or last, and both could be meant"),
        (torch.zeros(1, 3, 12, 20), r"\(1, 3, 12, 20\) is no image"),
        (torch.zeros(3, 12, 20, dtype=torch.int32), "dtype int32"),
    ],
)  # fmt: skip
def test_arrays_that_leave_a_doubt_are_refused(bundled, array, message):
    with pytest.raises(mv.InputError, match=message):
        open_image(array)
    with pytest.raises(mv.InputError, match=f"^Example 1: The .*{message}"):
        bundled.inputs([noise_image(0), array], "a")


def test_bytes_open_files_and_home_paths(bundled, tmp_path, monkeypatch):
    noise_image(0).save(tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    data = (tmp_path / "a.png").read_bytes()
    half_read = io.BytesIO(data)
    half_read.read(20)
    with (tmp_path / "a.png").open("rb") as file, tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(data)
        images = [data, io.BytesIO(data), half_read, file, spooled, "~/a.png", Path("~/a.png"), torch.from_numpy(
            np.asarray(noise_image(0)).copy()
        )]  # fmt: skip
        pixels = bundled.inputs([noise_image(0), *images], "a").encoding["pixel_values"]
        assert not file.closed
        assert len(bundled.inputs(file, ["a", "what is this"])) == 2, "one file for several prompts"
    assert all(torch.equal(row, pixels[0]) for row in pixels)


def test_closed_and_broken_images_in_words(tmp_path):
    noise_image(0, (200, 150)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    closed_file = io.BytesIO(data)
    closed_file.close()
    with Image.open(tmp_path / "a.png") as never_read:
        pass
    closed = noise_image(0)
    closed.close()
    with (
        (tmp_path / "a.png").open(encoding="latin-1") as as_text,
        pytest.raises(mv.InputError, match="open it with open"),
    ):
        open_image(as_text)
    for image, message in [
        (b"", r"is empty \(0 bytes\)"),
        (data[:5000], "The image given cannot be read .*Is it whole"),
        (b"no image", "The image given cannot be read .it is no image that Pillow knows"),
        (closed_file, "a file that was closed: open it again"),
        (never_read, "The image given cannot be read .*Was it closed"),
        (closed, "The image given cannot be read .*Was it closed"),
    ]:
        with pytest.raises(mv.InputError, match=message):
            open_image(image)


def test_heic_by_the_package_that_reads_it(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    smooth = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    pillow_heif.from_pillow(smooth).save(tmp_path / "a.heic", quality=95)
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    data = (tmp_path / "a.heic").read_bytes()
    for image in (tmp_path / "a.heic", data, io.BytesIO(data)):
        assert np.abs(np.asarray(open_image(image)).astype(int) - np.asarray(smooth)).mean() < 3
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    for image in (tmp_path / "a.heic", data, io.BytesIO(data)):
        with pytest.raises(mv.InputError, match=r"is HEIC, .*pip install pillow-heif"):
            open_image(image)
