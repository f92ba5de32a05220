"""What determines a study's results: written before its first number, and held against whoever goes on with it."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mechvlm import bundled
from mechvlm.datasets import SCENES, Dataset
from mechvlm.errors import InputError
from mechvlm.vlm.loading import class_of
from mechvlm.vlm.vlm import VLM

FILE = "settings.json"
SHARD_FORMAT = 1
"""Counted up when shards are cut or written in another way."""
SHARD = 32
"""Examples a shard, at most, where a batch is not larger: about what is lost when a study is killed."""
PAIRS_PER_SHARD = 16
"""Winoground's pairs a shard, at most, where a batch is not larger."""
RESULT_PACKAGES = ("mechvlm", "torch", "transformers", "nnsight", "tokenizers", "numpy", "pillow", "simplemma")
"""Those whose version can change a number."""
MEASURE_SETTINGS = {
    "logit lens": {"k": 1, "positions": "all", "final_norm": True},
    "words": {"by": "word", "lemmas": True, "stop_words": "left out", "non_words": "left out"},
    "contextualization": {"self_pairs": True, "special_tokens": False, "baseline_subtracted": False},
    "norm-based attention": {"destinations": ["last_text", "last_image"], "heads": "summed before the norm"},
    "phases": {"max_segments": 6, "n_bootstrap": 1000, "confidence": 0.95},
}


def shard_size(batch_size: int) -> int:
    """Examples a shard: as many whole batches as make up `SHARD`, and at least one."""
    return batch_size * max(1, SHARD // batch_size)


def pair_shard_size(batch_size: int) -> int:
    """Pairs a shard of pairs: as many whole batches as make up `PAIRS_PER_SHARD`, and at least one."""
    batch = pairs_a_batch(batch_size)
    return batch * max(1, PAIRS_PER_SHARD // batch)


def pairs_a_batch(batch_size: int) -> int:
    """Whole pairs a forward: each is four examples, two captions on two images."""
    return max(1, batch_size // 4)


def settings_of(
    models: Sequence[str | VLM],
    data: Dataset,
    *,
    prompt: str,
    seed: int,
    device: str | None,
    dtype: str | None,
    batch_size: int,
    device_map: str | dict | None = None,
    remote: bool = False,
) -> dict[str, Any]:
    """Everything that determines the results, for settings.json.

    A hub id has its revision; of a folder the files are hashed; of a loaded model its parameters. The data set is known by its
    fingerprint, so that the same files in another place are the same data.
    """  # fmt: skip
    remote = remote or any(isinstance(m, VLM) and not m.has_weights for m in models)
    return {
        "format": SHARD_FORMAT,
        "models": [m.name if isinstance(m, VLM) else m for m in models],
        "weights": {(m.name if isinstance(m, VLM) else m): identity(m, remote) for m in models},
        "dataset": {"name": data.name, "n": len(data), "fingerprint": data.fingerprint},
        "prompt": prompt,
        "seed": seed,
        "device": _place(device, device_map, remote),
        "dtype": dtype,
        "batch_size": batch_size,
        "shard": shard_size(batch_size),
        "measures": MEASURE_SETTINGS,
        "versions": {package: _version(package) for package in RESULT_PACKAGES},
    }


def _place(device: str | None, device_map: str | dict | None, remote: bool) -> str:
    if remote:
        return "ndif"
    return f"device_map {device_map}" if device_map is not None else torch.device(device or "cpu").type


def identity(model: str | VLM, remote: bool = False) -> dict[str, Any]:
    """Which weights a model has: class, revision, and sha256 of the weights and of the small files beside them.

    NDIF hosts a hub id as of a branch, and does not say which commit: its revision is None where none was asked for.
    """
    if isinstance(model, VLM) and not model.has_weights:
        return identity(model.name, remote=True) | {"revision": model.revision}
    if isinstance(model, VLM):
        digest = hashlib.sha256(str(model.device.type).encode())
        for name, value in model.hf.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {"class": model.record.hf_class, "revision": model.revision, "parameters": digest.hexdigest()}
    folder = bundled.path(model) if model in bundled.NAMES else Path(model)
    found = {"class": class_of(model), "revision": None}
    if not folder.is_dir() and remote:
        return found
    if not folder.is_dir():
        return found | {"revision": getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)}
    beside = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".model", ".txt") and p.is_file())
    return found | {"sha256": _sha256(sorted(folder.glob("*.safetensors"))), "files": _sha256(beside)}


def _sha256(files: list[Path]) -> str | None:
    """Of one file, its own hash, what `sha256sum` says; of several, the hash of their hashes in the order of their names."""
    each = []
    for file in files:
        with file.open("rb") as opened:
            each.append(hashlib.file_digest(opened, "sha256"))
    if len(each) == 1:
        return each[0].hexdigest()
    return hashlib.sha256(b"".join(one.digest() for one in each)).hexdigest() if each else None


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, each as "seed was 0, is 1". Where a data set lies is no difference."""
    one, other = _flat(was), _flat(now)
    names = [key for key in {**one, **other} if one.get(key) != other.get(key) and key != "dataset name"]
    # Other models have other weights: that is said once.
    names = [key for key in names if not ("models" in names and key.startswith("weights "))]
    return [f"{key} was {_shown(one.get(key))}, is {_shown(other.get(key))}" for key in names]


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What settings.json says; None where there is none.

    Raises:
        InputError: where it cannot be read.
    """
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / FILE} cannot be read ({error}). Give another --out.") from error


def begun_alike(folder: Path, dataset: str, n: int | None, asked: dict[str, Any]) -> bool:
    """Whether a study was begun for the same examples with these settings, as far as that is seen without reading anything."""
    try:
        was = read_settings(folder) or {}
    except InputError:
        return False
    data, n = was.get("dataset", {}), SCENES if n is None and dataset == "scenes" else n
    return data.get("name") == dataset and n in (None, data.get("n")) and asked.items() <= was.items()


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {prefix + key: value}
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    # A prompt can be long, and so is a hash.
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
