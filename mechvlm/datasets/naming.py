"""Scenes with a question about one object, and that object's box, for causal experiments."""

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

from PIL import Image

from mechvlm.datasets.scenes import sample_scene


class Naming(NamedTuple):
    """A question about one object of an image, its one-word answer, and the object's box.

    box: (left, top, right, bottom) in pixels of the image.
    """

    image: Image.Image
    prompt: str
    answer: str
    box: tuple[float, float, float, float]


def naming(n: int, seed: int = 0, split: str = "test", counts: Sequence[int] = (1, 2, 3)) -> list[Naming]:
    """Make `n` scenes, each with the question what color one of its objects has.

    No other object of the scene has the same shape, so the question has one answer. A longer list
    begins with the shorter one.

    Args:
        n: the number of questions.
        seed: of the random scenes and questions.
        split: "train", "val" or "test", as in `mechvlm.datasets.scenes`.
        counts: the numbers of objects that a scene may have.

    Example:
        >>> question = naming(1)[0]
        >>> question.prompt, question.answer
    """
    return list(islice(_namings(seed, split, counts), n))


def _namings(seed: int, split: str, counts: Sequence[int]) -> Iterator[Naming]:
    for i in count():
        rng = random.Random(f"naming-{split}-{seed}-{i}-{tuple(counts)}")
        scene = sample_scene(rng, split, counts)
        shapes = [o.shape for o in scene.objects]
        unique = [o for o in scene.objects if shapes.count(o.shape) == 1]
        if unique:
            target = rng.choice(unique)
            yield Naming(scene.render(), f"What color is the {target.shape}?", target.color, target.box())
