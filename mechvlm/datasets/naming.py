"""Scenes with one question about one object, and where that object is: what causal experiments need."""

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

from PIL import Image

from mechvlm.datasets.scenes import sample_scene


class Naming(NamedTuple):
    """One question, its one-word answer, and the object that it asks for.

    box: (left, top, right, bottom) in pixels of the image.
    """

    image: Image.Image
    prompt: str
    answer: str
    box: tuple[float, float, float, float]


def naming(n: int, seed: int = 0, split: str = "test", counts: Sequence[int] = (1, 2, 3)) -> list[Naming]:
    """`n` scenes, each with the color of one object asked for that no other resembles in shape.

    A longer list begins with the shorter one.
    """
    return list(islice(_namings(seed, split, counts), n))


def _namings(seed: int, split: str, counts: Sequence[int]) -> Iterator[Naming]:
    for i in count():
        rng = random.Random(f"naming-{split}-{seed}-{i}-{tuple(counts)}")
        scene = sample_scene(rng, split, counts)
        shapes = [o.shape for o in scene.objects]
        alone = [o for o in scene.objects if shapes.count(o.shape) == 1]
        if alone:
            asked = rng.choice(alone)
            yield Naming(scene.render(), f"What color is the {asked.shape}?", asked.color, asked.box())
