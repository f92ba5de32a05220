"""Tiny models of every family, with random weights and the family's own processor.

>>> hf, processor = families.build("qwen2_5_vl")
>>> image = families.picture(60, 44, seed=0)
>>> hf(**families.alone("qwen2_5_vl", hf, processor, image, families.prompt("qwen2_5_vl", "what")))
"""

import inspect
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from . import (  # noqa: F401  (each file registers its families)
    beyond,
    gemma,
    latest,
    llava_like,
    memory,
    newest,
    others,
    queries,
    qwen,
    tiles,
    with_torchvision,
)
from .parts import FAMILIES, Family, perturb
from .queries import ENCODER

__all__ = ["FAMILIES", "SIX", "Family", "alone", "build", "cases", "picture", "prompt", "types"]

SIX = ("llava", "qwen2_5_vl", "gemma3", "internvl", "blip2_opt", "llava_onevision")
"""The families of the default run."""


def cases(*, refused: bool = False, memories: bool = True) -> list:
    """Names of families for `pytest.mark.parametrize`: all but `SIX` in the lane `families`.

    Args:
        refused: whether those that mechvlm refuses are among them.
        memories: whether those whose image is a memory are.
    """
    return [
        pytest.param(name, marks=_marks(name, family))
        for name, family in FAMILIES.items()
        if (refused or not family.refused) and (memories or not family.memory)
    ]


def _marks(name: str, family: Family) -> list:
    marks = [] if name in SIX else [pytest.mark.families]
    if missing := [package for package in family.needs if find_spec(package) is None]:
        marks.append(pytest.mark.skip(reason=f"transformers needs {' and '.join(missing)} for it"))
    return marks


def build(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0):
    """A tiny model in evaluation mode, and its processor.

    Args:
        name: one of `FAMILIES`.
        dtype: of the weights; those of float32, rounded.
        attention: "eager", or "sdpa": what transformers chooses, SDPA where the model has it.
        seed: of the weights.
    """
    family = FAMILIES[name]
    config, processor = family.make()
    kind = getattr(transformers, family.hf_class)
    options = {} if attention == "sdpa" else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = perturb(kind._from_config(config, dtype=torch.float32, **options), seed)
    if dtype is not torch.float32:
        weights = hf.state_dict()
        hf = kind._from_config(config, dtype=dtype, **options).eval()
        hf.load_state_dict(weights)
    return hf, processor


def picture(width: int, height: int, seed: int) -> Image.Image:
    """An RGB image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(name: str, words: str, images: int = 1) -> str:
    """A bare prompt: the family's word for an image as often as there are images, then `words`."""
    return FAMILIES[name].word * images + words


def types(hf) -> dict[str, bool]:
    """Options of a processor whose model needs the tokens' types, which some give when asked."""
    needed = "mm_token_type_ids" in inspect.signature(type(hf).forward).parameters
    return {"return_mm_token_type_ids": True} if needed else {}


def alone(name: str, hf, processor, image: Image.Image, text: str) -> dict[str, torch.Tensor]:
    """What the model's forward takes for one example: what its processor gives, on its device."""
    encoding = processor(images=[image], text=[text], return_tensors="pt", **types(hf))
    if FAMILIES[name].refused == ENCODER:
        encoding["decoder_input_ids"] = torch.tensor([[2, 5, 6, 7]])
    floats = hf.dtype
    return {key: value.to(hf.device, floats if value.is_floating_point() else None) for key, value in encoding.items()}
