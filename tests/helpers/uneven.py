"""Inputs and values without the symmetries that hide faults.

Square grids hide swapped rows and columns, groups of 1, 2 and 1 images a wrong offset, a last token
of text a mistaken `last`, and equal or symmetric values a transposed or reversed axis.
"""

import copy
from functools import lru_cache

import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import LLAVA_TEMPLATE, llava
from mechvlm.inputs.grids import PatchGrid
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.inputs.views import QUERIES, Layout, one_grid

GROUPS = ((0, 1), (2,), (3, 4, 5))
"""Seeds of the images of three prompts: groups of 2, 1 and 3."""
N_LAYERS = (3, 12)
"""Layers of a shallow and of a deep model; the deep one's numbers have two digits."""


@lru_cache
def wide_vlm() -> mv.VLM:
    """A LLaVA whose processor crops to 70 x 42 pixels: 3 rows and 5 columns of patches.

    For inputs only. The vision encoder itself takes squares.
    """
    model, processor = llava()
    processor = copy.deepcopy(processor)
    processor.image_processor.size = {"shortest_edge": 70}
    processor.image_processor.crop_size = {"height": 42, "width": 70}
    return mv.load(model, processor, check=False)


@lru_cache
def ending_vlm() -> mv.VLM:
    """A LLaVA whose prompts end in the special token `</s>`."""
    model, processor = llava()
    processor = copy.deepcopy(processor)
    processor.chat_template = LLAVA_TEMPLATE + "{{ '</s>' }}"
    return mv.load(model, processor)


@lru_cache
def layered_vlm(n_layers: int) -> mv.VLM:
    """A LLaVA of so many layers; see `N_LAYERS`."""
    return mv.load(*llava(layers=n_layers))


def image_groups(size: tuple[int, int] = (80, 60)) -> list[list]:
    """The images of `GROUPS`."""
    return [[noise_image(seed, size) for seed in group] for group in GROUPS]


def uneven(*shape: int, seed: int = 0) -> torch.Tensor:
    """Different numbers from 0 to 1: reversed or transposed they are others."""
    n = torch.Size(shape).numel()
    noise = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return ((torch.arange(n) + noise) / n).reshape(shape)


def token_map(kinds: str, grids: tuple[PatchGrid, ...] = (), patches: bool = True) -> TokenMap:
    """A map by hand: "." is padding, "s" special, "t" text and "i" an image token."""
    modality = torch.tensor([".sti".index(kind) for kind in kinds])
    pieces = {Modality.PADDING: "<pad>", Modality.SPECIAL: "<s>", Modality.IMAGE: "<image>"}
    strings = tuple(pieces.get(Modality(int(kind)), f" w{i}") for i, kind in enumerate(modality))
    layouts = tuple(map(one_grid, grids)) if patches else query_layouts(kinds.count("i"), grids)
    return TokenMap(torch.arange(len(kinds)), strings, strings, modality, layouts)


def query_layouts(n_tokens: int, grids: tuple[PatchGrid, ...]) -> tuple[Layout, ...]:
    """Layouts of images whose visual tokens are queries, equally many each."""
    return tuple(Layout(n_tokens // len(grids), grid.image_size, grid=grid, reason=QUERIES) for grid in grids)
