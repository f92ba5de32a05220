"""The record of a loaded model: a known one, or one derived from the model and its processor."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from mechvlm.errors import InputError, ModelError
from mechvlm.families.derive import derive
from mechvlm.families.known import ARCHITECTURES, architecture_of, known_record
from mechvlm.families.record import Architecture, layer_paths, part
from mechvlm.families.recording import ForwardError
from mechvlm.inputs.build import encode_example
from mechvlm.vlm.placing import with_checked_places
from mechvlm.vlm.processors import unfit


def record_of(hf: Any, processor: Any, name: str) -> Architecture:
    """The record of a model that is here.

    Raises:
        ModelError: for a model of which none can be derived; it says why.
    """
    record = known_record(hf)
    if record is not None:
        return record
    record = blank_record(hf)
    if record.visual_tokens == "memory":
        text = hf.config.get_text_config(decoder=True).model_type
        raise ModelError(
            f"{name} is a {type(hf).__name__} whose layers ({text}) are not known. Which of them read the image's memory, "
            "and through which gates, is not derived from numbers: it stands in mechvlm/families/known.py."
        )
    try:
        arguments = example_arguments(hf, processor, record)
    except InputError as error:
        raise ModelError(f"The processor of {name} does not fit it: {error}") from error
    try:
        derived = derive(hf, arguments, record)
        # Of known classes it is known where tokens lie.
        return derived if record.hf_class in ARCHITECTURES else with_checked_places(hf, processor, derived)
    except ForwardError as error:
        raise unfit(hf, processor, name, error) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model that is built otherwise can fail anywhere
        text = hf.config.get_text_config(decoder=True).model_type
        reason = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
        raise ModelError(
            f"{name} is a {type(hf).__name__} with a language model ({text}) that mechvlm cannot read: {reason}"
        ) from error


def blank_record(hf: Any) -> Architecture:
    """What a record says of how inputs are made for a model, before its decoder is known."""
    record = architecture_of(type(hf).__name__)
    if hasattr(transformers, record.hf_class):
        return record
    return replace(record, arguments=tuple(inspect.signature(type(hf).forward).parameters))


def require_fitting(record: Architecture, hf: Any, name: str) -> None:
    """Raises ModelError for a record that names what the model does not have.

    Args:
        record: that was given for the model.
        hf: a Hugging Face model, with or without weights.
        name: the model's, for the message.
    """
    lacking = list(_lacking(record, hf))
    if lacking:
        raise ModelError(
            f"The record that was given for {name} does not fit it: {'; '.join(lacking[:3])}"
            + (f"; and {len(lacking) - 3} more" if len(lacking) > 3 else "")
            + ". `mechvlm check` prints the record that a model's own numbers give: correct yours by it, or leave it out."
        )


def _lacking(record: Architecture, hf: Any) -> Iterator[str]:
    """What a record names and the model does not have, in words."""
    if record.hf_class != type(hf).__name__:
        yield f"it is of {record.hf_class}, the model is a {type(hf).__name__}"
        return
    for field in ("embed", "decoder", "layers", "norm", "unembed"):
        if not _has(hf, getattr(record, field)):
            yield f"the model has no module {getattr(record, field)!r} ({field})"
    if record.image_token_id and not _has(hf.config, record.image_token_id):
        yield f"its config has no {record.image_token_id!r}, the image token's id"
    if not _has(hf, record.layers):
        return
    layers = [part(hf, path) for path in layer_paths(record, hf)]
    if len(record.kinds) not in (1, len(layers)):
        yield f"it has {len(record.kinds)} kinds, the model {len(layers)} layers: there is one for all, or one for each"
        return
    for number, layer in enumerate(layers):
        kind = record.kind(number)
        paths = {name: getattr(kind, name) for name in ("attention", "attn_out", "mlp_out", "mid_norm", "down_proj")}
        if kind.attention is not None:
            projections = {name: getattr(kind, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
            paths |= {name: f"{kind.attention}.{path}" for name, path in projections.items() if path is not None}
        for name, path in paths.items():
            if path is not None and not _has(layer, path):
                yield f"layer {number} has no module {path!r} ({name})"


def _has(root: Any, path: str) -> bool:
    try:
        part(root, path)
    except AttributeError:
        return False
    return True


def example_arguments(hf: Any, processor: Any, record: Architecture) -> dict[str, Any]:
    """Arguments of the model's forward, of a small image of noise and a short prompt."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    _, _, _, encoding, _ = encode_example(Image.fromarray(pixels), "What is it?", record, hf.config, processor)
    return {
        key: value.to(hf.device, hf.dtype if value.is_floating_point() else None) for key, value in encoding.items()
    }


def require_readable_class(hf_class: str) -> None:
    """Raises ModelError for a class that cannot be read, or that is no vision-language model's."""
    architecture_of(hf_class)
    if hf_class in ARCHITECTURES or hf_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return
    if hf_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ModelError(
            f"{hf_class} is a language model, which takes no images. mechvlm reads vision-language models: load the "
            "checkpoint that holds the vision part too, such as llava-hf/llava-1.5-7b-hf."
        )
    raise ModelError(
        f"{hf_class} is not among the vision-language classes of this version of transformers "
        f"(AutoModelForImageTextToText has {len(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)}). Known to mechvlm by a record: "
        f"{', '.join(sorted(ARCHITECTURES))}. A class of other code can be read once it is loaded: mechvlm.load(model, "
        "processor)."
    )
