"""Inputs of the tiny families, made without loading a `VLM`."""

from dataclasses import replace
from typing import Any

from helpers import families
from mechvlm.families.known import ARCHITECTURES
from mechvlm.families.record import Architecture
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.build import build_inputs

QUERIES = ("aria", "idefics2")
"""Families whose visual tokens read the whole image, beside BLIP's."""


def record_of(name: str, hf) -> Architecture:
    """What the inputs of a family need of its record; its image's word is to be found by trying."""
    llava, blip = (ARCHITECTURES[f"{family}ForConditionalGeneration"] for family in ("Llava", "InstructBlip"))
    ids = [key for key in ("image_token_id", "image_token_index", "image_patch_id") if hasattr(hf.config, key)]
    tokens = "queries" if "blip" in name or name in QUERIES else "cells"
    if families.FAMILIES[name].memory:
        tokens = "memory"
    return replace(
        llava,
        hf_class=type(hf).__name__,
        visual_tokens=tokens,
        template="{images}{prompt}",
        image_token_id=ids[0] if ids else "",
        image_word=None if ids else families.FAMILIES[name].word,
        max_lengths=(),
        right_padded=blip.right_padded if name.startswith("instructblip") else (),
        equal_sizes=name == "emu3",
    )


def inputs_of(name: str, hf, processor, images: Any, prompts: Any, **fields) -> Inputs:
    """The inputs of a tiny family; `fields` of its record may be others."""
    record = replace(record_of(name, hf), **fields)
    return build_inputs(images, prompts, record=record, config=hf.config, processor=processor)
