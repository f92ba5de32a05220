"""Each image's layout: by a known formula, or by a coordinate image.

Where the record says that a token is a patch, the image processors of LLaVA, CLIP and BLIP are
followed setting by setting (`mechvlm.inputs.grids`). All others are shown a coordinate image of the
image's size, once for each size.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from mechvlm.errors import InputError
from mechvlm.families.record import Architecture, part
from mechvlm.inputs.coordinates import look
from mechvlm.inputs.grids import is_known, patch_grid
from mechvlm.inputs.image_word import ImageWord
from mechvlm.inputs.layouts import find_layout
from mechvlm.inputs.views import QUERIES, UNPLACED, Grid, Layout, one_grid

MOST_KEPT = 1000
"""Layouts that are kept of one processor."""


def image_layouts(
    sizes: Sequence[tuple[int, int]],
    n_tokens: int,
    pixels: tuple[int, ...],
    word: ImageWord,
    record: Architecture,
    config,
    processor,
) -> tuple[Layout, ...]:
    """The layouts of the images of one prompt.

    Args:
        sizes: (width, height) of each image.
        n_tokens: how many visual tokens the prompt holds.
        pixels: shape of the tensor of pixels.
        word: what stands for an image in a prompt.
        record: record of the model's class.
        config: config of the model.
        processor: the Hugging Face processor.

    Raises:
        InputError: where the processor made another number of tokens than the layouts have.
    """
    if record.visual_tokens == "queries":
        grids = [_vision_grid(size, pixels, record, config, processor) for size in sizes]
        n = n_tokens // len(sizes)
        layouts = [Layout(n, size, grid=grid, reason=QUERIES) for size, grid in zip(sizes, grids, strict=True)]
    elif record.visual_tokens == "patches" and is_known(processor.image_processor):
        grids = [_vision_grid(size, pixels, record, config, processor) for size in sizes]
        layouts = [one_grid(grid) for grid in grids if grid is not None]
        _check_patches(n_tokens, sum(layout.n_tokens for layout in layouts))
    else:
        layouts = [_shown(size, len(sizes), word, record, config, processor) for size in sizes]
    if record.visual_tokens == "unplaced":
        layouts = [Layout(layout.n_tokens, layout.image_size, reason=UNPLACED) for layout in layouts]
    if (n := sum(layout.n_tokens for layout in layouts)) != n_tokens:
        raise InputError(
            f"The processor made {n_tokens} image tokens of these images, and {n} of gray images of the same sizes: which "
            "token belongs to which image is not known."
        )
    return tuple(layouts)


def _vision_grid(
    size: tuple[int, int], pixels: tuple[int, ...], record: Architecture, config, processor
) -> Grid | None:
    """The grid of the vision encoder's patches, by the settings of a known processor."""
    if not is_known(processor.image_processor):
        return None
    return patch_grid(size, processor.image_processor, (pixels[-2], pixels[-1]), part(config, record.patch_size))


def _check_patches(n_tokens: int, n_patches: int) -> None:
    if n_tokens != n_patches:
        raise InputError(
            f"The processor made {n_tokens} image tokens where the grid has {n_patches} patches. Either its patch_size, "
            "num_additional_image_tokens or vision_feature_select_strategy does not fit the model, or the decoder sees more than "
            "patches (the CLS token, with 'full'): that has no place on the image, and mechvlm cannot read it."
        )


def _shown(size: tuple[int, int], n_images: int, word: ImageWord, record: Architecture, config, processor) -> Layout:
    """The layout of an image of this size, one of n in a prompt, by a coordinate image."""
    kept = _KEPT.setdefault(processor, {})
    key = (size, n_images, word, record, _settings(processor))
    if key not in kept:
        if len(kept) >= MOST_KEPT:
            kept.clear()
        text = "a" if word.inserted else word.text * n_images + "a"
        seen = look(size, n_images, text, processor, part(config, record.image_token_id))
        kept[key] = find_layout(seen, record.token_shape, _most_tiles(processor))
    return kept[key]


_KEPT: WeakKeyDictionary[Any, dict[tuple, Layout]] = WeakKeyDictionary()
"""Layouts by processor, and by all that they depend on."""


def _settings(processor) -> str:
    """All that a layout can depend on: the image processor's settings, and the processor's own."""
    own = {name: value for name, value in vars(processor).items() if isinstance(value, int | float | str | list)}
    return f"{processor.image_processor.to_dict()} {own}"


def _most_tiles(processor) -> int | None:
    """The n of LLaVA-OneVision's setting "anyres_max_n"."""
    ratio = str(getattr(processor, "vision_aspect_ratio", ""))
    return int(ratio.removeprefix("anyres_max_")) if ratio.startswith("anyres_max_") else None
