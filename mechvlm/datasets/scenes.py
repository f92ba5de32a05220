"""Generated scenes: colored shapes on a plain ground, with true captions and questions.

A scene is a small frozen value. The picture, the captions, the questions and the segmentation are
all derived from it, so nothing has to be annotated or downloaded. Distances are pixels of the
native size (`SIZE`) unless another size is named.

The splits are disjoint by construction. A scene's *content* is its ground and the set of its
colored shapes, without their places. The hash of the content alone decides the split. So a held-out
scene shows a combination that training never showed in any arrangement.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from mechvlm.datasets.example import Example

SIZE = 192
SPLITS = ("train", "val", "test")
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (250, 211, 30),
    "green": (42, 157, 75),
    "blue": (40, 86, 205),
    "purple": (124, 58, 173),
    "pink": (244, 130, 182),
    "brown": (120, 72, 36),
}

# Top and bottom tone of each ground. No name is a color word, so no caption is ambiguous.
GROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "sand": ((243, 229, 200), (226, 205, 163)),
    "snow": ((250, 252, 255), (224, 234, 244)),
    "stone": ((172, 176, 182), (140, 144, 152)),
    "night": ((34, 40, 66), (14, 18, 36)),
}


def _regular(n: int, inner: float | None = None, start: float = -90.0) -> list[tuple[float, float]]:
    """The n corners of a regular polygon on the unit circle, y down.

    With `inner` a star of n points, whose inner corners lie at that radius.
    """
    radii = [1.0] if inner is None else [1.0, inner]
    corners = n * len(radii)
    angles = [math.radians(start + 360.0 * i / corners) for i in range(corners)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    ts = [2 * math.pi * i / 60 for i in range(60)]
    xs = [16 * math.sin(t) ** 3 for t in ts]
    ys = [-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in ts]
    return [(x / 16.0, (y - 2.5) / 15.0) for x, y in zip(xs, ys, strict=True)]


def _cross(arm: float = 0.34) -> list[tuple[float, float]]:
    a, e = arm, 1.0
    return [(-a, -e), (a, -e), (a, -a), (e, -a), (e, a), (a, a), (a, e), (-a, e), (-a, a), (-e, a), (-e, -a), (-a, -a)]


# Corners (x, y) in units of the object's half width.
SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(72),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "diamond": [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    "star": _regular(5, inner=0.42),
    "heart": _heart(),
    "cross": _cross(),
    "ring": _regular(72),
}
# Radius of the hole, in the same units.
_HOLES = {"ring": 0.52}


@dataclass(frozen=True)
class SceneObject:
    """One colored shape.

    Attributes:
        color, shape: words of `COLORS` and `SHAPES`.
        x, y: its center, in native pixels from the left and the top.
        radius: half its width, native pixels.
    """

    color: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    def outline(self, size: int = SIZE) -> list[tuple[float, float]]:
        """Corners (x, y) of the outer edge, in pixels of a picture `size` x `size`.

        A ring's hole is not part of it.
        """
        k = size / SIZE
        return [((self.x + px * self.radius) * k, (self.y + py * self.radius) * k) for px, py in SHAPES[self.shape]]

    def box(self, size: int = SIZE) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels of a picture `size` x `size`; holds all of it."""
        points = self.outline(size)
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        return min(xs), min(ys), max(xs), max(ys)

    def coverage(self, samples: int) -> tuple[Image.Image, tuple[int, int]]:
        """The object's antialiased mask, and the place (x, y) of the mask's top left corner.

        The mask has mode L and native size, with `samples`² samples per pixel.
        """
        left, top, right, bottom = self.box()
        x0, y0 = int(left // 1), int(top // 1)
        w, h = int(right - x0) + 2, int(bottom - y0) + 2
        mask = Image.new("L", (w * samples, h * samples), 0)
        draw = ImageDraw.Draw(mask)

        def place(px: float, py: float) -> tuple[float, float]:
            return (self.x + px * self.radius - x0) * samples, (self.y + py * self.radius - y0) * samples

        draw.polygon([place(px, py) for px, py in SHAPES[self.shape]], fill=255)
        if hole := _HOLES.get(self.shape):
            draw.polygon([place(px * hole, py * hole) for px, py in SHAPES[self.shape]], fill=0)
        return mask.resize((w, h), Image.Resampling.BOX), (x0, y0)


class Question(NamedTuple):
    """A question with its one-word answer.

    kind: "color", "shape", "count", "exists", "where" or "relation".
    """

    kind: str
    text: str
    answer: str


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def relation(a: SceneObject, b: SceneObject, margin: float = 1.5) -> str | None:
    """Where `a` lies as seen from `b`: "left", "right", "above" or "below".

    None unless the distance along one axis is at least `margin` times that along the other.
    """
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= margin * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= margin * abs(dx):
        return "above" if dy < 0 else "below"
    return None


RELATION_PHRASES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class Scene:
    """Colored shapes on a ground. Objects never overlap."""

    objects: tuple[SceneObject, ...]
    ground: str

    # ---- identity ----
    @property
    def content(self) -> str:
        """The ground and the sorted names of the objects, without their places."""
        return self.ground + ": " + ", ".join(sorted(o.name for o in self.objects))

    @property
    def split(self) -> str:
        """The split, by the content's hash alone: 10 % test, 5 % val, the rest train."""
        bucket = int(hashlib.sha256(self.content.encode()).hexdigest()[:8], 16) % 20
        return "test" if bucket < 2 else "val" if bucket == 2 else "train"

    # ---- pictures ----
    def render(self, size: int = SIZE) -> Image.Image:
        """An antialiased RGB picture, `size` x `size`."""
        top, bottom = (np.array(c, dtype=np.float32) for c in GROUNDS[self.ground])
        ramp = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None]
        column = (top + ramp * (bottom - top)).round().astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(column[:, None, :], (SIZE, SIZE, 3))))
        for o in self.objects:
            mask, (x0, y0) = o.coverage(4)
            shadow = mask.point(lambda v: v * 2 // 9)
            image.paste((0, 0, 0), (x0 + 2, y0 + 3), shadow)
            image.paste(COLORS[o.color], (x0, y0), mask)
        return image if size == SIZE else image.resize((size, size), Image.Resampling.BICUBIC)

    def segmentation(self, size: int = SIZE) -> np.ndarray:
        """Labels of the pixels [size, size], uint8: 0 for the ground, i + 1 for object i."""
        labels = np.zeros((SIZE, SIZE), dtype=np.uint8)
        for i, o in enumerate(self.objects):
            mask, (x0, y0) = o.coverage(2)
            inside = np.asarray(mask) >= 128
            h, w = inside.shape
            window = labels[y0 : y0 + h, x0 : x0 + w]
            window[inside[: window.shape[0], : window.shape[1]]] = i + 1
        if size == SIZE:
            return labels
        return np.asarray(Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST))

    # ---- text ----
    def listing(self, order: Sequence[int] | None = None) -> str:
        """All objects: "a red circle and a blue square on sand."

        `order` holds the objects' numbers, by default 0, 1, 2, ...
        """
        names = [article(self.objects[i].name) for i in (order or range(len(self.objects)))]
        joined = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        return f"{joined} on {self.ground}."

    def relations(self) -> list[str]:
        """A caption for each ordered pair of objects with a clear relation.

        Such as "a red circle left of a blue square on sand."
        """
        captions = []
        for a in self.objects:
            for b in self.objects:
                if a is not b and (r := relation(a, b)):
                    captions.append(f"{article(a.name)} {RELATION_PHRASES[r]} {article(b.name)} on {self.ground}.")
        return captions

    def captions(self) -> tuple[str, ...]:
        """Several true captions; the first lists the objects in their own order."""
        n = len(self.objects)
        captions = [self.listing()]
        if n > 1:
            captions.append(self.listing(tuple(reversed(range(n)))))
        captions.append("there is " + self.listing())
        captions += self.relations()[:4]
        return tuple(captions)

    def questions(self) -> list[Question]:
        """All questions that the scene answers with exactly one word."""
        objects = self.objects
        questions = [Question("count", "How many objects are there?", COUNTS[len(objects)])]
        for o in objects:
            if sum(p.shape == o.shape for p in objects) == 1:
                questions.append(Question("color", f"What color is the {o.shape}?", o.color))
            if sum(p.color == o.color for p in objects) == 1:
                questions.append(Question("shape", f"What shape is the {o.color} object?", o.shape))
            if place := _place(o):
                questions.append(Question("where", f"Where is the {o.name}?", place))
            questions.append(Question("exists", f"Is there {article(o.name)}?", "yes"))
        names, wrong = {o.name for o in objects}, []
        # The objects asked for in vain are near misses: a color and a shape of this scene that do
        # not belong together, then one word of this scene with another one.
        wrong += [f"{a.color} {b.shape}" for a in objects for b in objects]
        i = sum(map(ord, self.content))
        wrong += [f"{o.color} {list(SHAPES)[(i + 3 * k) % len(SHAPES)]}" for k, o in enumerate(objects)]
        wrong += [f"{list(COLORS)[(i + 5 * k) % len(COLORS)]} {o.shape}" for k, o in enumerate(objects)]
        wrong = [w for w in dict.fromkeys(wrong) if w not in names]
        questions += [Question("exists", f"Is there {article(w)}?", "no") for w in wrong[: len(objects)]]
        for a in objects:
            for b in objects:
                if a is not b and (r := relation(a, b)):
                    questions.append(Question("relation", f"Where is the {a.name} from the {b.name}?", r))
        return questions

    def meta(self) -> dict:
        """The `meta` of the scene's `Example`: ground, objects and questions, as plain values."""
        return {
            "ground": self.ground,
            "objects": [{"color": o.color, "shape": o.shape, "box": o.box()} for o in self.objects],
            "questions": [q._asdict() for q in self.questions()],
        }


def _place(o: SceneObject) -> str | None:
    """Where an object lies in the picture: "left", "right", "top", "bottom" or "middle".

    None near a boundary between these.
    """
    dx, dy = o.x - SIZE / 2, o.y - SIZE / 2
    far, near = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if far < 0.10 * SIZE:
        return "middle"
    if far < 0.14 * SIZE or far < 1.5 * near:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def _arrange(rng: random.Random, names: Sequence[tuple[str, str]], ground: str, clear: bool) -> Scene | None:
    """Place the objects (color, shape) at random without overlap.

    With `clear` every pair of objects has a `relation`. None if they do not fit this time.
    """
    small, large = (26, 37) if len(names) < 5 else (22, 30)
    placed: list[SceneObject] = []
    for color, shape in names:
        for _ in range(20):
            r = rng.uniform(small, large)
            x, y = rng.uniform(r + 3, SIZE - r - 3), rng.uniform(r + 3, SIZE - r - 3)
            o = SceneObject(color, shape, round(x, 1), round(y, 1), round(r, 1))
            apart = all(max(abs(o.x - p.x), abs(o.y - p.y)) > (o.radius + p.radius) * 1.02 + 2 for p in placed)
            if apart and not (clear and any(relation(o, p) is None for p in placed)):
                placed.append(o)
                break
        else:
            return None
    return Scene(tuple(placed), ground)


def _random_names(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """`n` different pairs (color, shape)."""
    names: list[tuple[str, str]] = []
    while len(names) < n:
        name = rng.choice(list(COLORS)), rng.choice(list(SHAPES))
        if name not in names:
            names.append(name)
    return names


def sample_scene(
    rng: random.Random, split: str | None = None, counts: Sequence[int] = (1, 2, 3), clear: bool | None = None
) -> Scene:
    """Draw a random scene.

    Args:
        rng: the random numbers.
        split: "train", "val" or "test"; None for any.
        counts: the numbers of objects to choose from.
        clear: whether every pair of objects must have an unambiguous relation; by default only in
            scenes of two objects.
    """
    while True:
        n = rng.choice(list(counts))
        scene = _arrange(rng, _random_names(rng, n), rng.choice(list(GROUNDS)), n == 2 if clear is None else clear)
        if scene is not None and (split is None or scene.split == split):
            return scene


def sample_scenes(n: int, seed: int = 0, split: str = "test", counts: Sequence[int] = (1, 2, 3)) -> Iterator[Scene]:
    """Draw `n` scenes. Scene i depends only on (split, seed, i, counts).

    So a longer run begins with the shorter one.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}. There are: {', '.join(SPLITS)}.")
    for i in range(n):
        yield sample_scene(random.Random(f"{split}-{seed}-{i}-{tuple(counts)}"), split, counts)


def scenes(n: int, seed: int = 0, split: str = "test", counts: Sequence[int] = (1, 2, 3)) -> Iterator[Example]:
    """Draw `n` scenes as examples.

    Each has a picture of 192 x 192 pixels, true captions, and in `meta` its objects and questions.
    Scene i is the same for every `n`, as in `sample_scenes`.

    Example:
        >>> example = next(scenes(1))
        >>> example.image, example.captions, example.meta["questions"]
    """
    tag = split if seed == 0 else f"{split}-s{seed}"
    for i, scene in enumerate(sample_scenes(n, seed, split, counts)):
        yield Example(f"scenes-{tag}-{i:06d}", scene.render(), scene.captions(), scene.meta())
