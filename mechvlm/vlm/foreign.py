"""Model folders of somebody else: what is refused before a model is built from them.

Weights are read as safetensors, and no code of a repository runs unless `trust_remote_code` asks
for it. What is trusted all the same is said in SECURITY.md: a model's chat template may run for
ever, and its config.json may ask for more layers than fit.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mechvlm.errors import InputError, ModelError, NonFiniteError, RemoteError
from mechvlm.outside.files import printable, require_inside, require_regular

LARGEST_SETTINGS = 200_000_000
"""Bytes of a JSON file of a model's folder; the largest are tokenizers of some 30 MB."""


@contextmanager
def settings_of(name: str) -> Iterator[None]:
    """Errors that a model's own settings lead the libraries to become a `ModelError`."""
    try:
        yield
    except (ModelError, InputError, NonFiniteError, RemoteError, ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}".splitlines()[0])[:300]
        raise ModelError(
            f"No model can be made of the files of {name} ({reason}). Compare its config.json and its processor's files with "
            "those of the original, or fetch them again."
        ) from error


def require_sound_folder(folder: Path) -> None:
    """Refuse a model's folder with pipes or devices, or an index that leads to files elsewhere.

    Links are followed: the hub's client keeps its files behind links.

    Raises:
        ModelError: naming the file.
    """
    try:
        for path in folder.iterdir():
            if not path.is_dir() and (path.exists() or not path.is_symlink()):
                require_regular(path, LARGEST_SETTINGS if path.suffix == ".json" else 2**63, "settings")
        for index in folder.glob("*.index.json"):
            content = json.loads(index.read_text(encoding="utf-8"))
            for name in set(content["weight_map"].values()):
                require_inside(folder, name)
    except InputError as error:
        raise ModelError(f"The model's folder {folder} is not read: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"The index of weights in {folder} is damaged ({type(error).__name__}). Fetch it again."
        ) from None


def refuse_kernels(config: Any, name: str, trusted: bool) -> None:
    """Refuse a config that names a kernel of the hub for attention, which is code.

    Raises:
        ModelError: for such a kernel, or for what is no name of an implementation.
    """
    parts = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", {}))]
    for implementation in (getattr(part, "_attn_implementation", None) for part in parts):
        if implementation is not None and not isinstance(implementation, str):
            raise ModelError(
                f"The config.json of {name} names no implementation of attention: {implementation!r:.100}."
            )
        if implementation and not trusted and ("/" in implementation or os.sep in implementation):
            kernel = printable(implementation)[:100]
            raise ModelError(
                f"The config.json of {name} asks for the attention kernel {kernel!r} of the hub, which is code and is not run "
                "by default. Delete the setting, or pass trust_remote_code=True if you trust it."
            )
