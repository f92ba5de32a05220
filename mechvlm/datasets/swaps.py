"""Pairs of scenes whose two captions consist of the same words, as in Winoground.

A model that reads the words alone cannot tell which caption belongs to which scene.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from mechvlm.datasets.scenes import RELATION_PHRASES, Scene, SceneObject, article, relation, sample_scene


@dataclass(frozen=True)
class SwapPair:
    """Two scenes, and two captions of the same words: caption i is true of scene i alone.

    As in Winoground (Thrush et al. 2022).

    kind: "attribute" (colors or shapes are exchanged) or "relation" (places are exchanged).
    """

    id: str
    kind: str
    scenes: tuple[Scene, Scene]
    captions: tuple[str, str]

    def images(self) -> tuple[Image.Image, Image.Image]:
        return self.scenes[0].render(), self.scenes[1].render()


def attribute_swaps(n: int, seed: int = 0, split: str = "test") -> Iterator[SwapPair]:
    """Pairs such as "a red circle and a blue square" and "a blue circle and a red square".

    Both scenes are of the split.
    """
    for i in range(n):
        rng = random.Random(f"attribute-{split}-{seed}-{i}")
        while True:
            a = sample_scene(rng, split, (2,))
            p, q = a.objects
            if p.color == q.color or p.shape == q.shape:
                continue
            # In half of the pairs the colors are exchanged, in the other half the shapes. With one
            # kind alone, the places of the shapes or of the colors would give the answer away.
            if rng.random() < 0.5:
                swapped = (_recolor(p, q.color), _recolor(q, p.color))
            else:
                swapped = (_reshape(p, q.shape), _reshape(q, p.shape))
            b = Scene(swapped, a.ground)
            if b.split == split:
                break
        shapes = [p.shape, q.shape] if rng.random() < 0.5 else [q.shape, p.shape]
        yield SwapPair(f"attribute-{i:04d}", "attribute", (a, b), (_by_shape(a, shapes), _by_shape(b, shapes)))


def relation_swaps(n: int, seed: int = 0, split: str = "test") -> Iterator[SwapPair]:
    """Pairs such as "a red circle left of a blue square" and "a blue square left of a red circle".

    Both scenes are of the split, as the places of the objects do not count for it.
    """
    for i in range(n):
        rng = random.Random(f"relation-{split}-{seed}-{i}")
        while True:
            a = sample_scene(rng, split, (2,))
            p, q = a.objects
            b = Scene((_moved(p, q), _moved(q, p)), a.ground)
            if p.color != q.color and p.shape != q.shape:
                break
        phrase = RELATION_PHRASES[relation(p, q) or ""]
        captions = tuple(f"{article(u.name)} {phrase} {article(v.name)} on {a.ground}." for u, v in ((p, q), (q, p)))
        yield SwapPair(f"relation-{i:04d}", "relation", (a, b), (captions[0], captions[1]))


def _recolor(o: SceneObject, color: str) -> SceneObject:
    return SceneObject(color, o.shape, o.x, o.y, o.radius)


def _reshape(o: SceneObject, shape: str) -> SceneObject:
    return SceneObject(o.color, shape, o.x, o.y, o.radius)


def _moved(o: SceneObject, to: SceneObject) -> SceneObject:
    return SceneObject(o.color, o.shape, to.x, to.y, to.radius)


def _by_shape(scene: Scene, shapes: Sequence[str]) -> str:
    return scene.listing([[o.shape for o in scene.objects].index(s) for s in shapes])
