"""Generated scenes: colored shapes on a plain ground, with captions and questions that are true of them.

A scene is a small frozen value; the picture, the captions, the questions and the segmentation are all derived from it,
so nothing has to be annotated or downloaded. Distances are pixels of the native size (`SIZE`) unless another is named.

The splits are disjoint by construction: a scene's *content* (its ground and the set of its colored shapes, without
where they lie) is hashed, and the hash alone says which split the scene belongs to. So a held-out scene shows a
combination that training never showed in any arrangement.
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

# Top and bottom tone of each ground; none of them is a color word, so no caption is ambiguous.
GROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "sand": ((243, 229, 200), (226, 205, 163)),
    "snow": ((250, 252, 255), (224, 234, 244)),
    "stone": ((172, 176, 182), (140, 144, 152)),
    "night": ((34, 40, 66), (14, 18, 36)),
}


def _regular(n: int, inner: float | None = None, start: float = -90.0) -> list[tuple[float, float]]:
    """A regular polygon, or with `inner` a star whose inner corners lie at that radius; unit circle, y down."""
    radii = [1.0] if inner is None else [1.0, inner]
    m = n * len(radii)
    angles = [math.radians(start + 360.0 * i / m) for i in range(m)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    ts = [2 * math.pi * i / 60 for i in range(60)]
    xs = [16 * math.sin(t) ** 3 for t in ts]
    ys = [-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in ts]
    return [(x / 16.0, (y - 2.5) / 15.0) for x, y in zip(xs, ys, strict=True)]


def _cross(arm: float = 0.34) -> list[tuple[float, float]]:
    a, e = arm, 1.0
    return [(-a, -e), (a, -e), (a, -a), (e, -a), (e, a), (a, a), (a, e), (-a, e), (-a, a), (-e, a), (-e, -a), (-a, -a)]


# Outlines in units of the object's half width. A ring is a circle with a hole.
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
        """Corners (x, y) in pixels of a picture of that size; the hole of a ring is not part of it."""
        k = size / SIZE
        return [((self.x + px * self.radius) * k, (self.y + py * self.radius) * k) for px, py in SHAPES[self.shape]]

    def box(self, size: int = SIZE) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels of a picture of that size; every pixel of the object lies within it."""
        points = self.outline(size)
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        return min(xs), min(ys), max(xs), max(ys)

    def coverage(self, samples: int) -> tuple[Image.Image, tuple[int, int]]:
        """Its antialiased mask (mode L, native size, `samples`² samples a pixel), and where the mask's corner lies."""
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
    """A question with its one-word answer; `kind` is color, shape, count, exists, where or relation."""

    kind: str
    text: str
    answer: str


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def relation(a: SceneObject, b: SceneObject, margin: float = 1.5) -> str | None:
    """Where `a` lies from `b`: left, right, above or below; None where neither direction clearly wins (by `margin`)."""
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
        """What is shown, not where: the ground and the sorted names."""
        return self.ground + ": " + ", ".join(sorted(o.name for o in self.objects))

    @property
    def split(self) -> str:
        """Decided by the content alone: 10 % test, 5 % val, the rest train."""
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
            image.paste((0, 0, 0), (x0 + 2, y0 + 3), mask.point(lambda v: v * 2 // 9))  # a soft shadow
            image.paste(COLORS[o.color], (x0, y0), mask)
        return image if size == SIZE else image.resize((size, size), Image.Resampling.BICUBIC)

    def segmentation(self, size: int = SIZE) -> np.ndarray:
        """Which object each pixel shows: [size, size] uint8, 0 the ground, i + 1 object i."""
        out = np.zeros((SIZE, SIZE), dtype=np.uint8)
        for i, o in enumerate(self.objects):
            mask, (x0, y0) = o.coverage(2)
            inside = np.asarray(mask) >= 128
            h, w = inside.shape
            view = out[y0 : y0 + h, x0 : x0 + w]
            view[inside[: view.shape[0], : view.shape[1]]] = i + 1
        if size == SIZE:
            return out
        return np.asarray(Image.fromarray(out).resize((size, size), Image.Resampling.NEAREST))

    # ---- text ----
    def listing(self, order: Sequence[int] | None = None) -> str:
        """ "a red circle and a blue square on sand." in the order given."""
        names = [article(self.objects[i].name) for i in (order or range(len(self.objects)))]
        joined = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        return f"{joined} on {self.ground}."

    def relations(self) -> list[str]:
        """For each ordered pair that is clearly arranged: "a red circle left of a blue square on sand.\""""
        out = []
        for a in self.objects:
            for b in self.objects:
                if a is not b and (r := relation(a, b)):
                    out.append(f"{article(a.name)} {RELATION_PHRASES[r]} {article(b.name)} on {self.ground}.")
        return out

    def captions(self) -> tuple[str, ...]:
        """Several true captions, the listing in the objects' own order first."""
        n = len(self.objects)
        out = [self.listing()]
        if n > 1:
            out.append(self.listing(tuple(reversed(range(n)))))
        out.append("there is " + self.listing())
        out += self.relations()[:4]
        return tuple(out)

    def questions(self) -> list[Question]:
        """Questions with one true word for an answer; one that the scene leaves open is not asked."""
        objects, out = self.objects, [Question("count", "How many objects are there?", COUNTS[len(self.objects)])]
        for o in objects:
            if sum(p.shape == o.shape for p in objects) == 1:
                out.append(Question("color", f"What color is the {o.shape}?", o.color))
            if sum(p.color == o.color for p in objects) == 1:
                out.append(Question("shape", f"What shape is the {o.color} object?", o.shape))
            if place := _place(o):
                out.append(Question("where", f"Where is the {o.name}?", place))
            out.append(Question("exists", f"Is there {article(o.name)}?", "yes"))
        names, wrong = {o.name for o in objects}, []
        # The negatives are near misses: words of this scene joined wrongly, then one word of it with a strange one.
        wrong += [f"{a.color} {b.shape}" for a in objects for b in objects]
        i = sum(map(ord, self.content))
        wrong += [f"{o.color} {list(SHAPES)[(i + 3 * k) % len(SHAPES)]}" for k, o in enumerate(objects)]
        wrong += [f"{list(COLORS)[(i + 5 * k) % len(COLORS)]} {o.shape}" for k, o in enumerate(objects)]
        wrong = [w for w in dict.fromkeys(wrong) if w not in names]
        out += [Question("exists", f"Is there {article(w)}?", "no") for w in wrong[: len(objects)]]
        for a in objects:
            for b in objects:
                if a is not b and (r := relation(a, b)):
                    out.append(Question("relation", f"Where is the {a.name} from the {b.name}?", r))
        return out

    def meta(self) -> dict:
        """What an `Example` carries: plain values only."""
        return {
            "ground": self.ground,
            "objects": [{"color": o.color, "shape": o.shape, "box": o.box()} for o in self.objects],
            "questions": [q._asdict() for q in self.questions()],
        }


def _place(o: SceneObject) -> str | None:
    """Where it lies in the picture: left, right, top, bottom or middle; None near a boundary."""
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
    """Puts the named objects at random places without overlap; None if they do not fit this time."""
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


def _names(rng: random.Random, n: int) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    while len(out) < n:
        name = rng.choice(list(COLORS)), rng.choice(list(SHAPES))
        if name not in out:
            out.append(name)
    return out


def sample_scene(
    rng: random.Random, split: str | None = None, counts: Sequence[int] = (1, 2, 3), clear: bool | None = None
) -> Scene:
    """Draws a scene of that split with one of these numbers of objects.

    `clear` asks for arrangements in which every pair has an unambiguous relation; by default so with two objects.
    """
    while True:
        n = rng.choice(list(counts))
        scene = _arrange(rng, _names(rng, n), rng.choice(list(GROUNDS)), n == 2 if clear is None else clear)
        if scene is not None and (split is None or scene.split == split):
            return scene


def sample_scenes(n: int, seed: int = 0, split: str = "test", counts: Sequence[int] = (1, 2, 3)) -> Iterator[Scene]:
    """`n` scenes; scene i depends on (split, seed, i, counts) alone, so a longer run begins with the shorter one."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: there are {', '.join(SPLITS)}")
    for i in range(n):
        yield sample_scene(random.Random(f"{split}-{seed}-{i}-{tuple(counts)}"), split, counts)


def scenes(n: int, seed: int = 0, split: str = "test", counts: Sequence[int] = (1, 2, 3)) -> Iterator[Example]:
    """`n` scenes as examples: a 192 x 192 picture, true captions, and in `meta` the objects and the questions."""
    tag = split if seed == 0 else f"{split}-s{seed}"
    for i, scene in enumerate(sample_scenes(n, seed, split, counts)):
        yield Example(f"scenes-{tag}-{i:06d}", scene.render(), scene.captions(), scene.meta())


@dataclass(frozen=True)
class SwapPair:
    """Two scenes and two captions of the same words: caption i is true of scene i and false of the other.

    `kind` is "attribute" (the colors are exchanged) or "relation" (the places are). As in Winoground (Thrush et al. 2022).
    """

    id: str
    kind: str
    scenes: tuple[Scene, Scene]
    captions: tuple[str, str]

    def images(self) -> tuple[Image.Image, Image.Image]:
        return self.scenes[0].render(), self.scenes[1].render()


def attribute_swaps(n: int, seed: int = 0, split: str = "test") -> Iterator[SwapPair]:
    """Pairs such as "a red circle and a blue square" and "a blue circle and a red square", both of the split."""
    for i in range(n):
        rng = random.Random(f"attribute-{split}-{seed}-{i}")
        while True:
            a = sample_scene(rng, split, (2,))
            p, q = a.objects
            if p.color == q.color or p.shape == q.shape:
                continue
            # Each object changes its color and keeps its place; or its shape, so that no place tells the answer.
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
    """Pairs such as "a red circle left of a blue square" and "a blue square left of a red circle"."""
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
