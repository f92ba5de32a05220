"""Data sets by name: each yields `Example`s, an image with its captions."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
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
    "folder:DIR": "a folder of images with a captions.jsonl",
    "coco:DIR": "COCO's captions_*.json and images; coco:FILE names one of several files, coco:FILE?images=DIR its images",
    "winoground": "facebook/winoground, which needs access",
    "winoground:DIR": "its examples.jsonl and images",
    "hf:NAME?image=COLUMN&caption=COLUMN&id=COLUMN&split=NAME&config=NAME": "of the Hub, a folder that datasets reads, or a "
    "Parquet file",
}
SCENES = 200
"""How many scenes there are where no number is asked for."""


@dataclass(frozen=True)
class Dataset:
    """Examples in the order in which they are read.

    Attributes:
        name: as it was asked for.
        examples: those that were drawn.
        set_aside: entries that could not be used, with their reasons. They are no part of `examples`.
        fingerprint: `fingerprint(examples)`.
        seed: of the draw.
        n_usable: how many examples it was drawn from; None where they are made as they are asked for.
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
    """A data set by name, of which `n` examples are drawn with `seed`.

    An example's place in the draw depends on the seed and its id alone: neither the order of a listing nor what else is in it
    changes it, and a larger draw begins with the smaller one. Winoground is drawn by pairs: the first sides of all, then, in
    the same order, the second sides, so that no example stands beside the other of its pair.

    Args:
        spec: one of `KNOWN`.
        n: how many; by default 200 scenes, and all of any other.
        seed: of the draw. The same one gives the same examples, in the same order.

    Raises:
        InputError: for an unknown name, an `n` below 1, or a data set of which nothing can be used.
    """
    if n is not None and n < 1:
        raise InputError(f"{n} examples were asked for; at least 1 is needed.")
    if spec == "scenes":
        made = tuple(scenes(SCENES if n is None else n, seed))
        return Dataset(spec, made, (), fingerprint(made), seed)
    usable, aside = _usable(spec)
    drawn = _draw(usable, n, seed)
    return Dataset(spec, drawn, tuple(aside), fingerprint(drawn), seed, len(usable))


def _usable(spec: str) -> tuple[list[Example], list[SetAside]]:
    kind, _, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    if kind == "folder" and rest:
        return read_folder(rest)
    if kind == "coco" and name:
        return read_coco(name, **_asked(spec, query, "images"))
    if kind == "winoground" and rest:
        return read_winoground(rest)
    if kind in ("winoground", "hf") and (name or spec == "winoground"):
        from mechvlm.datasets import hub  # the library datasets takes a second to load
        from mechvlm.datasets.winoground import read_hub

        if kind == "winoground":
            return read_hub()
        return hub.read_hub(name, **_asked(spec, query, "image", "caption", "id", "split", "config", several="caption"))
    known = ", ".join(f"{name} ({what})" for name, what in KNOWN.items())
    raise InputError(f"There is no data set {spec!r}. Known: {known}.")


def _asked(spec: str, query: str, *known: str, several: str = "") -> dict[str, Any]:
    """What follows the question mark of a name, as {key: value}; the key `several` may come more than once."""
    given: dict[str, list[str]] = {}
    # As it is typed: a path may hold +, % and &.
    for part in filter(None, re.split(rf"&(?=(?:{'|'.join(known)})=)", query)):
        key, _, value = part.partition("=")
        given.setdefault(key, []).append(value)
    for key, values in given.items():
        if key not in known or not all(values) or (len(values) > 1 and key != several):
            raise InputError(
                f"{spec!r} asks for {key}={','.join(values)}: after the ? stand, once each and joined by &, {', '.join(known)}."
            )
    return {key: values if key == several else values[0] for key, values in given.items()}


def _draw(examples: Sequence[Example], n: int | None, seed: int) -> tuple[Example, ...]:
    def place(example: Example) -> tuple[bytes, str]:
        key = str(example.meta.get("pair", example.id))
        return hashlib.sha256(f"{seed} {key}".encode()).digest(), key

    ranked = sorted(examples, key=place)  # stable: the sides of a pair stay in their order
    ranked = ranked if n is None else ranked[:n]
    return tuple(sorted(ranked, key=lambda example: example.meta.get("side", 0)))


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over the examples in their order: ids, captions, and each image's file bytes or pixels.

    The same file under another folder counts as the same. A file that cannot be read counts as absent: the study that
    reads it says why.
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
