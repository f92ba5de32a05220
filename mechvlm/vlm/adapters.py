"""Folders that hold an adapter (peft): its base model is loaded, and the adapter applied to it."""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from mechvlm.errors import ModelError
from mechvlm.vlm.kinds import is_quantized, refuse_adapter, unwrapped


def is_adapter(folder: str) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file()


def base_of(folder: str) -> str:
    """The base model that an adapter's folder names: a folder, a hub id or a bundled name.

    Raises:
        ModelError: when it names none, peft is not installed, or the adapter changes no weights.
    """
    config = _config(folder)
    refuse_adapter(config, Path(folder).name)
    if not config.base_model_name_or_path:
        raise ModelError(
            f"The adapter in {folder} does not name its base model. Load the base, and give "
            "mechvlm.load(PeftModel.from_pretrained(base, folder), processor)."
        )
    return config.base_model_name_or_path


def has_processor(folder: str) -> bool:
    """Whether a processor was saved beside the adapter."""
    return any((Path(folder) / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def apply_adapter(base: nn.Module, folder: str) -> nn.Module:
    """The base model with the folder's adapter: merged, or beside weights that are quantized.

    Raises:
        ModelError: when the adapter does not fit the base model.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # peft only warns of missing tensors, and leaves the adapter without effect.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted = PeftModel.from_pretrained(base, folder)
    except (ValueError, RuntimeError, OSError, UserWarning) as error:
        raise ModelError(
            f"The adapter in {folder} does not fit its base model, a {type(base).__name__}: {str(error)[:300]}"
        ) from error
    # Merging into quantized weights would round the adapter to their few bits.
    return unwrapped(adapted) if is_quantized(base) else adapted.eval().merge_and_unload()


def _config(folder: str) -> Any:
    try:
        from peft import PeftConfig
    except ImportError:
        raise ModelError(
            f"The folder {folder} holds an adapter, which needs the package peft: pip install peft."
        ) from None
    try:
        return PeftConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"The adapter_config.json of {folder} cannot be used: {error}") from error
