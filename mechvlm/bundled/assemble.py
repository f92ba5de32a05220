"""A whole model folder from the parts that ship and SmolLM2's weights, kept in the user's cache.

1. The folder's name holds a digest of all that it is made of, so another release makes another.
2. It is written whole or not at all. Two processes wait for each other, and the second finds it.
3. A sealed file in it vouches for its files, which are checked once in each process.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mechvlm.bundled.smollm2 import WEIGHTS_SHA256, read_decoder
from mechvlm.errors import ModelError
from mechvlm.outside.durable import UNFINISHED, atomic_folder
from mechvlm.outside.integrity import check_file, check_seal, digest, digests_of_files, read_json, sealed

try:
    import fcntl
except ImportError:  # Windows: two processes may both do the work, and one's folder is kept
    fcntl = None  # type: ignore[assignment]

VISION_WEIGHTS = "vision.safetensors"
"""The weights that ship: all but the decoder's."""
DECODER = "language_model.model."
"""What a checkpoint of Hugging Face puts before the names of the decoder's weights."""
TAKEN = (".safetensors", ".json", ".jinja")
"""Files that ship and become part of the model; the others are its card."""
VOUCHER = "files.json"
LAYOUT = 1
"""To be raised when the same parts make another folder."""


def cache_folder() -> Path:
    """Where models are put together: MECHVLM_CACHE, or mechvlm in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("MECHVLM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mechvlm"


def assembled(parts: Path) -> Path:
    """The folder of the whole model, made where it is not there yet.

    Args:
        parts: the folder that ships.

    Raises:
        ModelError: when the language model is not installed, or the cache cannot be written.
    """
    return _checked(parts, cache_folder().absolute())


@cache
def _checked(parts: Path, home: Path) -> Path:
    taken = {name: sha for name, sha in digests_of_files(parts).items() if Path(name).suffix in TAKEN}
    ingredients = [WEIGHTS_SHA256, LAYOUT, taken]
    folder = home / f"{parts.name}-{digest(ingredients)[:16]}"
    if folder.is_dir() and damage_of(folder) is None:
        return folder
    try:
        with _alone(home, parts.name):
            if folder.is_dir() and (reason := damage_of(folder)):
                warnings.warn(f"{folder} is damaged ({reason}): it is made anew.", stacklevel=2)
                shutil.rmtree(folder)
            if not folder.is_dir():
                _assemble(parts, set(taken) - {VISION_WEIGHTS}, folder)
    except OSError as error:
        raise ModelError(
            f"{parts.name} cannot be put together in {home} ({error.strerror or error}), where it takes 280 MB. Set "
            "MECHVLM_CACHE to a folder that can be written."
        ) from error
    return folder


def damage_of(folder: Path) -> str | None:
    """What is wrong with an assembled folder; None where nothing is."""
    try:
        vouched = read_json(folder / VOUCHER)
        check_seal(vouched)
        for name, expected in vouched["files"].items():
            check_file(folder / name, expected)
    except (OSError, ValueError) as error:
        return str(error)
    return None


@contextmanager
def _alone(home: Path, name: str) -> Iterator[None]:
    """Wait until no other process makes this model, and sweep up what a killed one left."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / f"{name}.lock").open("a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # it ends with the process, however that ends
            for left in home.glob(f".{name}-*{UNFINISHED}"):
                shutil.rmtree(left)
        yield


def _assemble(parts: Path, copied: set[str], folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    decoder = read_decoder()
    tensors = load_file(parts / VISION_WEIGHTS) | {DECODER + name: value for name, value in decoder.weights.items()}
    with atomic_folder(folder) as unfinished:
        for name in copied:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(parts / name, unfinished / name)
        decoder.tokenizer.save(str(unfinished / "tokenizer.json"))
        halves = {name: value.to(torch.float16).contiguous() for name, value in tensors.items()}
        save_file(halves, unfinished / "model.safetensors", {"format": "pt"})
        (unfinished / VOUCHER).write_text(json.dumps(sealed({"files": digests_of_files(unfinished)})), encoding="utf-8")
