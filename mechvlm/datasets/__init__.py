"""Data sets by name: each yields `Example`s, an image with its captions."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mechvlm.datasets.example import Example
from mechvlm.datasets.folder import SetAside, read_folder
from mechvlm.datasets.scenes import scenes
from mechvlm.errors import InputError

__all__ = ["KNOWN", "Dataset", "Example", "SetAside", "fingerprint", "load_dataset", "read_folder"]

KNOWN = {
    "scenes": "colored shapes with captions, generated",
    "folder:DIR": "a folder of images with a captions.jsonl",
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
    """

    name: str
    examples: tuple[Example, ...]
    set_aside: tuple[SetAside, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.examples)


def load_dataset(spec: str, n: int | None = None, seed: int = 0) -> Dataset:
    """A data set by name, of which `n` examples are drawn with `seed`.

    Args:
        spec: "scenes" or "folder:DIR".
        n: how many; all of a folder by default (in the order that `seed` gives), and 200 scenes.
        seed: of the draw. The same one gives the same examples, in the same order.

    Raises:
        InputError: for an unknown name, an `n` below 1, or a folder of which nothing can be used.
    """
    if n is not None and n < 1:
        raise InputError(f"{n} examples were asked for; at least 1 is needed.")
    kind, _, rest = spec.partition(":")
    aside: list[SetAside] = []
    if spec == "scenes":
        examples = tuple(scenes(SCENES if n is None else n, seed))
    elif kind == "folder" and rest:
        usable, aside = read_folder(rest)
        count = len(usable) if n is None else min(n, len(usable))
        examples = tuple(random.Random(seed).sample(usable, count))
    else:
        known = ", ".join(f"{name} ({what})" for name, what in KNOWN.items())
        raise InputError(f"There is no data set {spec!r}. Known: {known}.")
    return Dataset(spec, examples, tuple(aside), fingerprint(examples))


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


def _image_digest(image) -> bytes:
    if not isinstance(image, Path):
        return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()
    try:
        with image.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b"absent"
