"""Inputs as the arguments of a model's forward, once both are fit for one."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mechvlm.errors import InputError, ModelError
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.encodings import forward_keys


def model_arguments(vlm: Any, inputs: Any) -> dict[str, Tensor]:
    """The arguments of the Hugging Face model's forward, on its device; see `VLM.encoding`."""
    if not isinstance(inputs, Inputs):
        raise InputError(
            f"A {type(inputs).__name__} was given where one forward takes one batch: inputs = vlm.inputs(image, prompt). Run "
            "several batches one by one: for batch in batches."
        )
    require_cpu_default()
    training = [path for path, module in vlm.hf.named_modules() if module.training] if vlm.has_weights else []
    if training:
        raise ModelError(
            f"{vlm.name} is in training mode ({len(training)} modules, {training[-1]!r} among them): dropout would change "
            "its activations at random. Call vlm.hf.eval() first, and vlm.hf.train() when you go on training."
        )
    needed = {"input_ids", "attention_mask", *vlm.record.right_padded}
    if not needed <= set(inputs.encoding) or not set(inputs.encoding) <= forward_keys(vlm.record):
        raise InputError(
            f"These inputs were made for another family of models ({inputs.model or 'unknown'}): they hold "
            f"{', '.join(sorted(inputs.encoding))}. Make them again with {vlm.name}'s own vlm.inputs(image, prompt)."
        )
    if vlm.has_weights:
        ahead = vlm.device.type == "cuda"  # nothing waits for a copy out of page-locked memory
        return {key: value.to(vlm.device, non_blocking=ahead) for key, value in inputs.encoding.items()}
    return dict(inputs.encoding)  # the server moves them to the model's device


def page_locked(inputs: Inputs, vlm: Any) -> Inputs:
    """The inputs of a model on a CUDA device in page-locked memory, which the device copies from.

    The copy then runs beside the device's own work. Inputs of other models are given back.
    """
    if not vlm.has_weights or vlm.device.type != "cuda":
        return inputs
    return replace(inputs, encoding={key: value.pin_memory() for key, value in inputs.encoding.items()})


def require_cpu_default() -> None:
    """Refuse another default device: half of the new tensors would be there, half on the CPU."""
    device = torch.get_default_device()
    if device.type != "cpu":
        raise InputError(
            f"torch's default device is {str(device)!r} (torch.set_default_device, or `with torch.device`); inputs and results "
            "are kept on the CPU. Call torch.set_default_device('cpu'): the model stays where mechvlm.load(device=...) put it."
        )
