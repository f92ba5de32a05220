"""The tensors of a public checkpoint, and an account of every one of them.

A checkpoint is read with `torch.load(weights_only=True)`: it can hold tensors and plain data, and
runs no code. Every tensor is taken under its new name, left out for a stated reason, or named in an
error.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class ConversionError(ValueError):
    """The checkpoint does not fit: says what was expected, what is there, and what to do."""


class Source:
    """One file of tensors.

    `tensors` holds those that are not accounted for yet, `settings` the model's settings that the
    file brings along, {} where it brings none.

        source = Source("eva_vit_g.pth")
        new = source.take({"embeddings.class_embedding": "cls_token"})
        source.leave(r"head\\.", "the classifier of its training")
        source.finish()
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        data = _load(self.path)
        held = data.get("model")
        tensors = held if isinstance(held, Mapping) else data
        self.tensors: dict[str, torch.Tensor] = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        if not self.tensors:
            raise ConversionError(
                f"{self.path} holds no tensors under 'model' or at its top: its keys are {sorted(data)}."
            )
        if others := sorted(tensors.keys() - self.tensors.keys()):
            raise ConversionError(f"{self.path} holds other things than tensors: {_listed(others)}.")
        config = data.get("config")
        settings = config.get("model") if isinstance(config, Mapping) else None
        self.settings: dict[str, Any] = dict(settings) if isinstance(settings, Mapping) else {}

    def take(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """The tensors under their new names.

        Args:
            names: for each new name, the name in the file.

        Raises:
            ConversionError: when the file lacks some of them; all are named.
        """
        if missing := [old for old in names.values() if old not in self.tensors]:
            raise ConversionError(
                f"{self.path} lacks {_listed(missing)}; it holds {_listed(sorted(self.tensors))}. Is it the file it should be?"
            )
        return {new: self.tensors.pop(old) for new, old in names.items()}

    def leave(self, pattern: str, why: str) -> None:
        """Leave out the tensors whose names begin with a match, and say so."""
        if left := [name for name in self.tensors if re.match(pattern, name)]:
            print(f"{self.path.name}: {_listed(left)} not used: {why}.")
        for name in left:
            del self.tensors[name]

    def finish(self) -> None:
        """All tensors have been taken or left out.

        Raises:
            ConversionError: with the names of those that remain.
        """
        if self.tensors:
            raise ConversionError(
                f"{self.path} holds tensors that have no place in the model: {_listed(sorted(self.tensors))}. Nothing was "
                "written: without them the model would be another."
            )


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConversionError(f"There is no file {path}.")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConversionError(
            f"{path} is no file of tensors and plain data ({str(error).splitlines()[0]}). Files that run code when they are "
            "opened are not read."
        ) from error
    if not isinstance(data, Mapping):
        raise ConversionError(f"{path} holds a {type(data).__name__}, not named tensors.")
    return data


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
