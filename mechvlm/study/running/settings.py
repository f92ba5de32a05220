"""The settings that determine a study's results.

They are written to settings.json before the first number. A later run in the same folder must have
the same ones.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from mechvlm import bundled
from mechvlm.datasets import N_SCENES, Dataset
from mechvlm.decoder.weights import package_of
from mechvlm.errors import InputError
from mechvlm.experiments.contextualization_controls_result import CONTROL_KINDS
from mechvlm.outside.integrity import digest, read_json
from mechvlm.study.running.answer_rows import ANSWER_SETTINGS
from mechvlm.vlm.adapters import base_of, is_adapter
from mechvlm.vlm.loading import class_of
from mechvlm.vlm.vlm import VLM

SETTINGS_FILE = "settings.json"
SHARD_FORMAT = 3
"""Counted up when shards are cut or written in another way."""
EXAMPLES_PER_SHARD = 32
"""Most examples in a shard, unless one batch is larger: about as many are lost by a kill."""
CONTROL_EXAMPLES = 32
"""Examples whose contextualization is read with other things in the image's place too."""
PAIRS_PER_SHARD = 16
"""Most Winoground pairs in a shard, unless one batch is larger."""
RESULT_PACKAGES = ("mechvlm", "torch", "transformers", "nnsight", "tokenizers", "numpy", "pillow", "simplemma")
"""Packages whose version can change a number."""
MEASURE_SETTINGS = {
    "logit lens": {"k": 1, "positions": "all", "final_norm": True},
    "words": {"by": "word", "lemmas": True, "stop_words": "left out", "non_words": "left out"},
    "contextualization": {"self_pairs": True, "special_tokens": False, "baseline_subtracted": False},
    "norm-based attention": {"destinations": ["last_text", "last_image"], "heads": "summed before the norm"},
    "phases": {"min_turn": 0.2, "n_bootstrap": 1000, "confidence": 0.95},
    "controls": {"examples": CONTROL_EXAMPLES, "kinds": list(CONTROL_KINDS)},
}


def shard_size(batch_size: int) -> int:
    """Examples in a shard: whole batches, as many as `EXAMPLES_PER_SHARD` holds, at least one."""
    return batch_size * max(1, EXAMPLES_PER_SHARD // batch_size)


def pair_shard_size(batch_size: int) -> int:
    """Pairs in a shard: as many whole batches as fit in `PAIRS_PER_SHARD`, and at least one."""
    batch = pairs_per_batch(batch_size)
    return batch * max(1, PAIRS_PER_SHARD // batch)


def pairs_per_batch(batch_size: int) -> int:
    """Whole pairs in a forward: each is four examples, two captions on two images."""
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
    answers: bool = False,
) -> dict[str, Any]:
    """Everything that determines the results, for settings.json.

    A model is known by its weights (`weights_identity`), a data set by its fingerprint: the same
    files in another place are the same data.
    """
    remote = remote or any(isinstance(m, VLM) and not m.has_weights for m in models)
    return {
        "format": SHARD_FORMAT,
        "models": [m.name if isinstance(m, VLM) else m for m in models],
        "weights": {(m.name if isinstance(m, VLM) else m): weights_identity(m, remote) for m in models},
        "dataset": {"name": data.name, "n": len(data), "fingerprint": data.fingerprint},
        "prompt": prompt,
        "seed": seed,
        "device": _device_setting(device, device_map, remote),
        "dtype": dtype,
        "batch_size": batch_size,
        "shard": shard_size(batch_size),
        "measures": MEASURE_SETTINGS,
        **({"answers": ANSWER_SETTINGS} if answers else {}),
        "versions": {package: _version(package) for package in RESULT_PACKAGES},
    }


def _device_setting(device: str | None, device_map: str | dict | None, remote: bool) -> str:
    if remote:
        return "ndif"
    return f"device_map {device_map}" if device_map is not None else torch.device(device or "cpu").type


def weights_identity(model: str | VLM, remote: bool = False) -> dict[str, Any]:
    """Which weights a model has: its class, and

    - of a hub id, the revision (a commit);
    - of a folder, the sha256 of its weights and of the small files beside them;
    - of an adapter's folder, that of its base model, and the sha256 of the adapter's files;
    - of a loaded model, the revision, and the sha256 of its parameters and its device's type.

    NDIF hosts a hub id at the head of a branch and does not say which commit: the revision is then
    None, unless one was asked for.
    """
    if isinstance(model, VLM) and not model.has_weights:
        return weights_identity(model.name, remote=True) | {"revision": model.revision}
    if isinstance(model, VLM):
        digest = hashlib.sha256(str(model.device.type).encode())
        for name, value in _tensors(model.hf.state_dict()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for path, module in model.hf.named_modules():
            if package_of(module) == "peft":  # which of its adapters run, and how strongly
                state = [getattr(module, name, None) for name in ("active_adapters", "disable_adapters", "scaling")]
                digest.update(f"{path} {state}".encode())
        return {"class": model.record.hf_class, "revision": model.revision, "parameters": digest.hexdigest()}
    if is_adapter(model):
        files = _sha256(sorted(p for p in Path(model).iterdir() if p.suffix in (".json", ".safetensors")))
        return {**weights_identity(base_of(model)), "adapter": files}
    folder = bundled.path(model) if model in bundled.ALL else Path(model)
    weights = {"class": class_of(model), "revision": None}
    if not folder.is_dir() and remote:
        return weights
    if not folder.is_dir():
        return weights | {"revision": getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)}
    small = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".model", ".txt") and p.is_file())
    return weights | {"sha256": _sha256(sorted(folder.glob("*.safetensors"))), "files": _sha256(small)}


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors of a state dict by name; a quantized one as the tensors that it consists of."""
    for name, value in state.items():
        if hasattr(value, "__tensor_flatten__"):
            parts, _ = value.__tensor_flatten__()
            yield from _tensors({f"{name}.{part}": getattr(value, part) for part in parts})
        elif isinstance(value, Tensor):
            yield name, value


def _sha256(files: list[Path]) -> str | None:
    """Of one file, its hash as `sha256sum` prints it; of several, the hash of their hashes.

    The files are taken in the given order, which is that of their names. None for no file.
    """
    digests = []
    for path in files:
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest() if digests else None


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ, each as "seed was 0, is 1".

    A data set's name is left out: the same data may lie elsewhere by now.
    """
    before, after = _flatten(was), _flatten(now)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key) and key != "dataset name"]
    # Other models have other weights: naming the models is enough.
    keys = [key for key in keys if not ("models" in keys and key.startswith("weights "))]
    return [f"{key} was {_shortened(before.get(key))}, is {_shortened(after.get(key))}" for key in keys]


def settings_digest(settings: dict[str, Any]) -> str:
    """The digest of the settings, without the data set's name: the same data may lie elsewhere."""
    dataset = {key: value for key, value in settings["dataset"].items() if key != "name"}
    return digest(settings | {"dataset": dataset})


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The content of settings.json; None where there is no such file.

    Raises:
        InputError: where it cannot be read.
    """
    try:
        return read_json(folder / SETTINGS_FILE)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / SETTINGS_FILE} cannot be read ({error}). Give another --out.") from error


def was_begun_with(folder: Path, dataset: str, n: int | None, settings: dict[str, Any]) -> bool:
    """Whether a study was begun in `folder` for the same examples and with these settings.

    Compares the data set's name and size, since no data are read here. A setting of None is one
    that the folder must not have.
    """
    try:
        earlier = read_settings(folder) or {}
    except InputError:
        return False
    data, n = earlier.get("dataset"), N_SCENES if n is None and dataset == "scenes" else n
    data = data if isinstance(data, dict) else {}
    return (
        data.get("name") == dataset
        and n in (None, data.get("n"))
        and all(earlier.get(key) == value for key, value in settings.items())
    )


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key} ") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _shortened(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    # Prompts and hashes can be long.
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
