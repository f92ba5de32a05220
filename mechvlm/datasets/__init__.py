"""Data sets by name. Each gives `Example`s: images with their captions."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mechvlm.datasets.coco import read_coco
from mechvlm.datasets.example import Example
from mechvlm.datasets.files import SetAside
from mechvlm.datasets.folder import read_folder
from mechvlm.datasets.scenes import scenes
from mechvlm.datasets.winoground import Pair, pairs_of, read_winoground
from mechvlm.errors import InputError

__all__ = [
    "KNOWN", "Dataset", "Example", "Pair", "SetAside", "fingerprint", "load_dataset", "pairs_of", "read_coco",
    "read_folder", "read_winoground",
]  # fmt: skip

KNOWN = {
    "scenes": "colored shapes with captions, generated",
    "folder:DIR": "a folder of images with a captions.jsonl, or an imagefolder's metadata.jsonl",
    "coco:DIR": "COCO's captions_*.json and images; coco:FILE names one of several captions files, coco:FILE?images=DIR "
    "the folder of its images",
    "winoground": "facebook/winoground on the Hub, which needs access",
    "winoground:DIR": "the examples.jsonl and images/ of Winoground",
    "hf:NAME?image=COLUMN&caption=COLUMN&id=COLUMN&split=NAME&config=NAME": "a data set on the Hub, a folder that the "
    "library datasets reads, or a Parquet file",
}
"""The data sets that `load_dataset` can read, each with a description."""
N_SCENES = 200
"""The number of scenes by default."""


@dataclass(frozen=True)
class Dataset:
    """Examples in the order in which they are read.

    Attributes:
        name: the name that it was asked for by.
        examples: the examples that were drawn.
        set_aside: the entries that could not be used, with reasons. `examples` does not hold them.
        fingerprint: `fingerprint(examples)`.
        seed: the seed of the draw.
        n_usable: the number of examples to draw from; None for scenes, which are generated.
    """

    name: str
    examples: tuple[Example, ...]
    set_aside: tuple[SetAside, ...]
    fingerprint: str
    seed: int = 0
    n_usable: int | None = None

    def __len__(self) -> int:
        return len(self.examples)


def load_dataset(spec: str, n: int | None = None, seed: int = 0) -> Dataset:
    """Load a data set by name and draw `n` of its examples with `seed`.

    The place of an example in the draw depends only on the seed and its id. So neither the order of
    a listing nor its other entries change it, and a larger draw begins with the smaller one.
    Winoground is drawn by pairs: the first sides of all pairs, then, in the same order, the second
    sides. So no example stands next to the other side of its pair.

    Args:
        spec: one of `KNOWN`.
        n: the number of examples; by default 200 scenes, and all examples of any other data set.
        seed: of the draw. The same seed gives the same examples in the same order.

    Raises:
        InputError: for an unknown name, an `n` below 1, or a data set without a usable example.

    Example:
        >>> data = load_dataset("folder:photos", n=100, seed=1)
        >>> data.examples[0].captions, len(data.set_aside)
    """
    if n is not None and n < 1:
        raise InputError(f"{n} examples were asked for; at least 1 is needed.")
    if spec == "scenes":
        drawn = tuple(scenes(N_SCENES if n is None else n, seed))
        return Dataset(spec, drawn, (), fingerprint(drawn), seed)
    usable, aside = _read(spec)
    drawn = _draw(usable, n, seed)
    return Dataset(spec, drawn, tuple(aside), fingerprint(drawn), seed, len(usable))


def _read(spec: str) -> tuple[list[Example], list[SetAside]]:
    """All usable examples of a data set of files, and those set aside."""
    kind, _, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    if kind == "folder" and rest:
        return read_folder(rest)
    if kind == "coco" and name:
        return read_coco(name, **_options(spec, query, "images"))
    if kind == "winoground" and rest:
        return read_winoground(rest)
    if kind in ("winoground", "hf") and (name or spec == "winoground"):
        # Imported only when needed: the library datasets takes a second to load.
        from mechvlm.datasets import hub
        from mechvlm.datasets.winoground import read_hub

        if kind == "winoground":
            return read_hub()
        options = _options(spec, query, "image", "caption", "id", "split", "config", repeatable="caption")
        return hub.read_hub(name, **options)
    if spec and Path(os.path.expanduser(spec)).is_dir():
        raise InputError(
            f"{spec} is a folder, and what it holds must be said: folder:{spec} is for images with a captions.jsonl, "
            f"coco:{spec}, winoground:{spec} and hf:{spec} are for those."
        )
    known = ", ".join(f"{name} ({description})" for name, description in KNOWN.items())
    raise InputError(f"There is no data set {spec!r}. Known: {known}.")


def _options(spec: str, query: str, *known: str, repeatable: str = "") -> dict[str, Any]:
    """The options after a name's question mark: {key: value}, for `repeatable` {key: values}."""
    options: dict[str, list[str]] = {}
    # Not urllib's parse_qs: a path may hold +, % and &, and stands here as it was typed.
    for part in filter(None, re.split(rf"&(?=(?:{'|'.join(known)})=)", query)):
        key, _, value = part.partition("=")
        options.setdefault(key, []).append(value)
    for key, values in options.items():
        if key not in known or not all(values) or (len(values) > 1 and key != repeatable):
            more_than_once = f" ({repeatable} may be repeated)" if repeatable else ""
            raise InputError(
                f"{spec!r} asks for {key}={','.join(values)}. The options after the ? are {', '.join(known)}: each is given "
                f"once, with a value{more_than_once}, and they are joined by &."
            )
    return {key: values if key == repeatable else values[0] for key, values in options.items()}


def _draw(examples: Sequence[Example], n: int | None, seed: int) -> tuple[Example, ...]:
    """`n` examples in the order of a hash: of the seed and the id of the example or of its pair."""

    def place(example: Example) -> tuple[bytes, str]:
        key = str(example.meta.get("pair", example.id))
        return hashlib.sha256(f"{seed} {key}".encode()).digest(), key

    ranked = sorted(examples, key=place)  # stable: the sides of a pair keep their order
    ranked = ranked if n is None else ranked[:n]
    return tuple(sorted(ranked, key=lambda example: example.meta.get("side", 0)))


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of the examples in their order: ids, captions, and each image's file bytes or pixels.

    Where a file lies does not count. A file that cannot be read counts as absent; the study that
    reads it gives the reason.
    """
    digest = hashlib.sha256()
    for example in examples:
        for text in (example.id, *example.captions):
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        digest.update(_image_digest(example.image))
    return digest.hexdigest()


def _image_digest(image: Any) -> bytes:
    if isinstance(image, Image.Image):
        return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()
    try:
        with image.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, InputError):
        return b"absent"
