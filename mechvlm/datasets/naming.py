"""What scenes know of their objects: the boxes of their words, and questions about one of them."""

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

from PIL import Image

from mechvlm.datasets.example import Example
from mechvlm.datasets.scenes import sample_scene
from mechvlm.errors import InputError

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the image."""


class Naming(NamedTuple):
    """A question about one object of an image, its one-word answer, and the object's box.

    box: (left, top, right, bottom) in pixels of the image.
    """

    image: Image.Image
    prompt: str
    answer: str
    box: Box


def word_boxes(example: Example) -> dict[str, list[Box]]:
    """The boxes of the objects that each word of a scene names, by its shape and by its color.

    >>> word_boxes(next(scenes(1)))
    {'circle': [(20.1, 31.0, 80.3, 91.2)], 'red': [(20.1, 31.0, 80.3, 91.2)]}

    Args:
        example: one of `mechvlm.datasets.scenes.scenes`.

    Returns:
        For each word a list, since several objects may have the same shape or color.

    Raises:
        InputError: for an example that knows no objects.
    """
    if "objects" not in example.meta:
        raise InputError(f"The example {example.id} knows no objects with boxes: only generated scenes do.")
    boxes: dict[str, list[Box]] = {}
    for thing in example.meta["objects"]:
        for word in (thing["shape"], thing["color"]):
            boxes.setdefault(word, []).append(tuple(thing["box"]))
    return boxes


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
