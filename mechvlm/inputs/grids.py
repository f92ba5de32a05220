"""Places the vision encoder's patches on the original image, through resize and crop."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.inputs.images import MAX_PIXELS


@dataclass(frozen=True)
class PatchGrid:
    """Where the vision encoder's patches lie on the original image.

    The processor resizes the image and crops its centre; the patches tile that crop. A box is in
    pixels of the ORIGINAL image, so that it can be drawn on it: (left, top, right, bottom), floats,
    x to the right and y down.

    >>> grid = inputs.tokens.grids[0]
    >>> image.crop(grid.box(row=2, col=3))  # the pixels of one patch

    Attributes:
        rows, cols: number of rows and of columns of patches.
        patch: side of a patch, in pixels of the crop.
        image_size: (width, height) of the original image.
        resized: (width, height) after the resize, before the crop.
        crop: (left, top) of the crop in the resized image; negative for a crop that is larger than
            the resized image, which is padded then.
    """

    rows: int
    cols: int
    patch: int
    image_size: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """Original pixels per resized pixel, (x, y)."""
        return self.image_size[0] / self.resized[0], self.image_size[1] / self.resized[1]

    @property
    def crop_box(self) -> tuple[float, float, float, float]:
        """The part that the model sees, (left, top, right, bottom) in original pixels."""
        (left, top, _, _), (_, _, right, bottom) = self.box(0, 0), self.box(self.rows - 1, self.cols - 1)
        return left, top, right, bottom

    def box(self, row: int, col: int) -> tuple[float, float, float, float]:
        """One patch's (left, top, right, bottom) in original pixels.

        Raises:
            IndexError: for a row or column outside the grid.
        """
        if not (0 <= row < self.rows and 0 <= col < self.cols):
            raise IndexError(f"row {row}, col {col} is outside the grid of {self.rows} rows x {self.cols} cols.")
        sx, sy = self.scale
        left, top = self.crop[0] + col * self.patch, self.crop[1] + row * self.patch
        return left * sx, top * sy, (left + self.patch) * sx, (top + self.patch) * sy

    def boxes(self) -> Float[Tensor, "row col 4"]:
        """All patches' boxes, (left, top, right, bottom) in original pixels."""
        boxes = [[self.box(r, c) for c in range(self.cols)] for r in range(self.rows)]
        return torch.tensor(boxes, dtype=torch.float32)

    def covered(self, box: Sequence[float | int]) -> Float[Tensor, "row col"]:
        """Share of each patch's area, 0 to 1, that lies inside a box given in original pixels."""
        b = self.boxes()
        width = (b[..., 2].clamp(max=box[2]) - b[..., 0].clamp(min=box[0])).clamp(min=0)
        height = (b[..., 3].clamp(max=box[3]) - b[..., 1].clamp(min=box[1])).clamp(min=0)
        return width * height / ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]))

    def inside(self, box: Sequence[float | int], covered: float = 0.5, margin: int = 0) -> Bool[Tensor, "row col"]:
        """Which patches lie in a box.

        Args:
            box: (left, top, right, bottom) in original pixels.
            covered: share of a patch's area that must lie in the box.
            margin: neighbours of these patches, up to so many patches away (diagonals as well), are
                counted too.

        Raises:
            ValueError: for a margin below 0.
        """
        if margin < 0:
            raise ValueError(f"A margin of {margin} patches was asked for; it must be 0 or more.")
        is_covered = (self.covered(box) >= covered).float()[None]
        return torch.nn.functional.max_pool2d(is_covered, 2 * margin + 1, stride=1, padding=margin)[0] > 0


def patch_grid(image_size: tuple[int, int], processor, pixels: tuple[int, int], patch: int) -> PatchGrid:
    """The patch grid that follows from an image processor's settings.

    Args:
        image_size: (width, height) of the original image.
        processor: the Hugging Face image processor; its `do_resize`, `size` and `do_center_crop`
            are read.
        pixels: (height, width) of the tensor that it returned for the image.
        patch: side of the vision encoder's patches in pixels.

    Raises:
        InputError: when the settings do not lead to a tensor of this size, as for a processor that
            splits or pads images.
    """
    resized = _resized(image_size, processor)
    height, width = pixels
    if getattr(processor, "do_center_crop", False):
        # transformers rounds down the half that it cuts off at the left and the top.
        crop = ((resized[0] - width) // 2, (resized[1] - height) // 2)
    else:
        crop = (0, 0)
        if resized != (width, height):
            raise InputError(
                f"{type(processor).__name__} made {width} x {height} pixels of an image of {image_size[0]} x "
                f"{image_size[1]}, where its settings say {resized[0]} x {resized[1]}: patches cannot be placed."
            )
    return PatchGrid(height // patch, width // patch, patch, image_size, resized, crop)


def check_resize(image_size: tuple[int, int], processor) -> None:
    """Refuse an image that the processor would enlarge beyond `MAX_PIXELS` pixels.

    A strip of 1 x 20,000 has few pixels until its short side is resized to 336.

    Raises:
        InputError: when the resized image would have more than `MAX_PIXELS` pixels.
    """
    width, height = _resized(image_size, processor)
    if width * height > MAX_PIXELS:
        raise InputError(
            f"The image is {image_size[0]} x {image_size[1]}: so narrow that this model's processor would resize it to "
            f"{width} x {height} = {width * height:,} pixels (at most {MAX_PIXELS:,}). Crop it first."
        )


def _resized(image_size: tuple[int, int], processor) -> tuple[int, int]:
    """(width, height) of the image after the processor's resize, before its crop."""
    width, height = image_size
    if not getattr(processor, "do_resize", False):
        return image_size
    size = dict(processor.size)
    size = {key: value for key, value in size.items() if value is not None}
    if "shortest_edge" in size and "longest_edge" not in size:
        edge, short, long = size["shortest_edge"], min(image_size), max(image_size)
        other = int(edge * long / short)
        return (edge, other) if width <= height else (other, edge)
    if {"height", "width"} <= set(size):
        return size["width"], size["height"]
    raise InputError(
        f"{type(processor).__name__} resizes by {size}: mechvlm knows only shortest_edge, or height and width."
    )
