"""Places the vision encoder's patches on the original image.

An image processor pads, resizes and crops, each of them or not. `patch_grid` follows its settings:

1. LLaVA's `do_pad` lays the image in the middle of a square.
2. `do_resize` brings it to the size that `size` names.
3. `do_center_crop` cuts out the middle, or puts a margin around an image that is smaller.
4. `do_pad` of other processors adds pixels at the right and at the bottom.
"""

from dataclasses import dataclass

from mechvlm.errors import InputError
from mechvlm.inputs.images import MAX_PIXELS
from mechvlm.inputs.views import Box, Grid


@dataclass(frozen=True)
class PatchGrid(Grid):
    """Where the vision encoder's patches lie on the original image.

    The processor pads the image to a square or leaves it as it is, resizes it and crops its centre;
    the patches tile that crop. A box is in pixels of the ORIGINAL image, so that it can be drawn on
    it: (left, top, right, bottom), floats, x to the right and y down. A patch of padding has its
    box outside the image: left or top below 0, or right or bottom beyond its size.

    >>> grid = inputs.tokens.grids[0]
    >>> image.crop(grid.box(row=2, col=3))  # the pixels of one patch

    Attributes:
        rows, cols: number of rows and of columns of patches.
        patch: side of a patch, in pixels of the crop.
        image_size: (width, height) of the original image.
        resized: (width, height) after the resize, before the crop; of the square if there is one.
        crop: (left, top) of the crop in the resized image; negative for a crop that is larger than
            the resized image, which is padded then.
        square: True if the image was laid in the middle of a square before the resize.
    """

    rows: int
    cols: int
    patch: int
    image_size: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    square: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """Original pixels per resized pixel, (x, y)."""
        width, height = _canvas(self.image_size, self.square)
        return width / self.resized[0], height / self.resized[1]

    @property
    def corner(self) -> tuple[int, int]:
        """(left, top) of the image in the square, in original pixels; (0, 0) without a square."""
        width, height = _canvas(self.image_size, self.square)
        # transformers rounds down the half of the padding that goes to the left and the top.
        return (width - self.image_size[0]) // 2, (height - self.image_size[1]) // 2

    def box(self, row: int, col: int) -> Box:
        """One patch's (left, top, right, bottom) in original pixels; see `Grid.box`."""
        self.check_cell(row, col)
        (sx, sy), (x, y) = self.scale, self.corner
        left, top = self.crop[0] + col * self.patch, self.crop[1] + row * self.patch
        return left * sx - x, top * sy - y, (left + self.patch) * sx - x, (top + self.patch) * sy - y


def patch_grid(image_size: tuple[int, int], processor, pixels: tuple[int, int], patch: int) -> PatchGrid:
    """The patch grid that follows from an image processor's settings.

    >>> patch_grid((300, 100), LlavaImageProcessor(do_pad=True), (224, 224), 14).corner
    (0, 100)

    Args:
        image_size: (width, height) of the original image.
        processor: the Hugging Face image processor; read are `do_pad`, `do_resize`, `size`,
            `do_center_crop` and `crop_size`.
        pixels: (height, width) of the tensor that it returned for the image.
        patch: side of the vision encoder's patches in pixels.

    Raises:
        InputError: for a processor that moves pixels in another way, or when its settings do not
            lead to a tensor of this size.
    """
    _check_known(processor)
    square = _pads_to_square(processor)
    resized = _resized(image_size, processor)
    cropped, crop = resized, (0, 0)
    if getattr(processor, "do_center_crop", False):
        cropped = (processor.crop_size["width"], processor.crop_size["height"])
        crop = (_margin(resized[0], cropped[0], processor), _margin(resized[1], cropped[1], processor))
    width, height = pixels[1], pixels[0]
    # Other processors pad last, at the right and at the bottom. Behind a crop, a box there would
    # name pixels of the image that were cut off.
    pads_last = getattr(processor, "do_pad", False) and not square and crop == (0, 0) and cropped == resized
    fits = width >= cropped[0] and height >= cropped[1] if pads_last else (width, height) == cropped
    if not fits:
        raise InputError(
            f"{type(processor).__name__} made {width} x {height} pixels of an image of {image_size[0]} x "
            f"{image_size[1]}, where its settings say {cropped[0]} x {cropped[1]}: patches cannot be placed."
        )
    return PatchGrid(height // patch, width // patch, patch, image_size, resized, crop, square)


def is_known(processor) -> bool:
    """Whether `patch_grid` knows every step of an image processor."""
    try:
        _check_known(processor)
    except InputError:
        return False
    return True


def check_resize(image_size: tuple[int, int], processor) -> None:
    """Refuse an image that the processor would enlarge beyond `MAX_PIXELS`, or shrink to nothing.

    A strip of 1 x 20,000 has few pixels until its short side is resized to 336, or until it is
    padded to a square.

    Raises:
        InputError: when the padded or resized image would have more than `MAX_PIXELS` pixels or
            none, or for a processor that moves pixels in a way that `patch_grid` does not know.
    """
    _check_known(processor)
    for width, height in (_canvas(image_size, _pads_to_square(processor)), _resized(image_size, processor)):
        if not 0 < width * height <= MAX_PIXELS:
            raise InputError(
                f"The image is {image_size[0]} x {image_size[1]}: so narrow that this model's processor would make it "
                f"{width} x {height} = {width * height:,} pixels (1 to {MAX_PIXELS:,} can be used). Crop it first."
            )


KNOWN_STEPS = {"do_pad", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
"""Steps of an image processor that the grid follows, or that leave every pixel in its place."""

KNOWN_CODE = (
    "transformers.image_processing_", "transformers.models.llava.image_processing_",
)  # fmt: skip
"""Where the code of these steps lies: what all processors inherit, and LLaVA's square."""


def _check_known(processor) -> None:
    """Refuse a processor with steps, or its own code for them, that the grid cannot know."""
    kind = type(processor).__name__
    steps = {name for name in dir(processor) if name.startswith("do_") and getattr(processor, name) is True}
    own = [
        name
        for name in ("preprocess", "_preprocess", "process_image", "resize", "center_crop", "pad", "pad_to_square")
        if not getattr(getattr(processor, name, None), "__module__", KNOWN_CODE[0]).startswith(KNOWN_CODE)
    ]
    if unknown := sorted(steps - KNOWN_STEPS) or own:
        raise InputError(
            f"The image processor {kind} moves pixels by {', '.join(unknown)}, which mechvlm does not follow: patches "
            "cannot be placed. Those of LLaVA, CLIP and BLIP pad, resize and crop."
        )


def _pads_to_square(processor) -> bool:
    """Whether `do_pad` means a square before the resize, as in LLaVA's processors."""
    return bool(getattr(processor, "do_pad", False)) and hasattr(processor, "pad_to_square")


def _canvas(image_size: tuple[int, int], square: bool) -> tuple[int, int]:
    """(width, height) of what is resized: the image, or the square around it."""
    return (max(image_size), max(image_size)) if square else image_size


def _margin(resized: int, cropped: int, processor) -> int:
    """Where a centre crop starts, on one axis; below 0 for a crop that is larger than the image."""
    if cropped > resized and getattr(processor, "backend", None) == "torchvision":
        return -((cropped - resized) // 2)
    return (resized - cropped) // 2  # rounded down: in Pillow's processors also below 0


def _resized(image_size: tuple[int, int], processor) -> tuple[int, int]:
    """(width, height) after the processor's padding to a square and its resize, before its crop."""
    width, height = _canvas(image_size, _pads_to_square(processor))
    if not getattr(processor, "do_resize", False):
        return width, height
    size = {key: value for key, value in dict(processor.size).items() if value}
    # Lazily: a study is opened without transformers.
    from transformers.image_transforms import get_size_with_aspect_ratio
    from transformers.image_utils import get_image_size_for_max_height_width

    if "shortest_edge" in size:
        height, width = get_size_with_aspect_ratio((height, width), size["shortest_edge"], size.get("longest_edge"))
    elif {"max_height", "max_width"} <= set(size):
        height, width = get_image_size_for_max_height_width((height, width), size["max_height"], size["max_width"])
    elif {"height", "width"} <= set(size):
        height, width = size["height"], size["width"]
    else:
        raise InputError(
            f"{type(processor).__name__} resizes by {size}: mechvlm knows shortest_edge with or without longest_edge, "
            "max_height and max_width, or height and width."
        )
    return width, height
