"""Generated scenes: the same every time, with true descriptions and disjoint splits."""

import re

import numpy as np
import pytest

from mechvlm.datasets.scenes import (
    COLORS,
    COUNTS,
    GROUNDS,
    SHAPES,
    SIZE,
    SPLITS,
    Scene,
    SceneObject,
    sample_scenes,
    scenes,
)
from mechvlm.datasets.swaps import attribute_swaps, relation_swaps

SAMPLE = [scene for seed in (3, 11, 12) for scene in sample_scenes(20, seed, "test")]
NAME = re.compile(r"\b(" + "|".join(COLORS) + r") (" + "|".join(SHAPES) + r")\b")
PHRASES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def true_of(scene: Scene, caption: str) -> bool:
    """Whether a caption is true, from its words and the objects' centers alone.

    It uses none of the code that wrote the caption.
    """
    names = [" ".join(m) for m in NAME.findall(caption)]
    objects = {f"{o.color} {o.shape}": o for o in scene.objects}
    if not set(names) <= set(objects) or not caption.endswith(f" on {scene.ground}."):
        return False
    for phrase, (dx, dy) in PHRASES.items():
        if f" {phrase} " in caption:
            a, b = (objects[n] for n in names)
            along = (a.x - b.x) * dx + (a.y - b.y) * dy
            across = abs((a.y - b.y) * dx) + abs((a.x - b.x) * dy)
            return len(names) == 2 and along > across
    return len(names) == len(scene.objects)


def test_same_seed_same_scenes():
    again = list(sample_scenes(20, seed=3, split="test"))
    assert again == SAMPLE[:20]
    assert again[:10] == list(sample_scenes(10, seed=3, split="test"))
    assert np.array_equal(np.asarray(again[0].render()), np.asarray(SAMPLE[0].render()))


def test_other_seeds_and_splits_differ():
    """No two seeds draw one scene in the same place, though contents repeat."""
    draws = [list(sample_scenes(20, seed, "test")) for seed in (3, 4, 11, 12)]
    assert all(a[i] != b[i] for k, a in enumerate(draws) for b in draws[:k] for i in range(20))
    assert list(sample_scenes(20, 3, "val")) != draws[0]


@pytest.mark.long
def test_splits_share_no_content():
    contents = {split: {s.content for s in sample_scenes(400, split=split)} for split in SPLITS}
    assert all(s.split == split for split in SPLITS for s in sample_scenes(50, split=split))
    assert not contents["train"] & contents["test"]
    assert not contents["train"] & contents["val"]
    assert not contents["val"] & contents["test"]


def test_split_ignores_arrangement():
    for s in SAMPLE:
        moved = Scene(tuple(SceneObject(o.color, o.shape, o.y, o.x, o.radius) for o in reversed(s.objects)), s.ground)
        assert moved.split == s.split


def test_unknown_split():
    with pytest.raises(ValueError, match="train"):
        next(sample_scenes(1, split="dev"))


def test_captions_are_true():
    for s in SAMPLE:
        for caption in s.captions():
            assert true_of(s, caption), (caption, s)


def test_captions_are_false_elsewhere():
    """`true_of` can say no."""
    scene, other = SAMPLE[0], next(s for s in SAMPLE if s.content != SAMPLE[0].content)
    assert not true_of(other, scene.listing())


def place_of(scene: Scene, number: int) -> str:
    """Where an object's painted pixels lie, as seen from the middle of the picture."""
    # Twice the distances of their middle from the picture's.
    rows, columns = np.nonzero(scene.segmentation() == number + 1)
    down, right = rows.min() + rows.max() + 1 - SIZE, columns.min() + columns.max() + 1 - SIZE
    if max(abs(down), abs(right)) < 2 * 0.12 * SIZE:
        return "middle"
    if abs(down) > abs(right):
        return "bottom" if down > 0 else "top"
    return "right" if right > 0 else "left"


def test_answers_are_true():
    for s in SAMPLE:
        objects = {o.name: o for o in s.objects}
        for q in s.questions():
            assert " " not in q.answer
            if q.kind == "count":
                assert q.answer == COUNTS[len(s.objects)]
            elif q.kind == "color":
                assert [o.color for o in s.objects if f"the {o.shape}?" in q.text] == [q.answer]
            elif q.kind == "shape":
                assert [o.shape for o in s.objects if f" {o.color} " in q.text] == [q.answer]
            elif q.kind == "exists":
                (name,) = NAME.findall(q.text)
                assert q.answer == ("yes" if " ".join(name) in objects else "no")
            elif q.kind == "where":
                (name,) = NAME.findall(q.text)
                assert q.answer == place_of(s, list(objects).index(" ".join(name)))
            elif q.kind == "relation":
                a, b = (objects[" ".join(n)] for n in NAME.findall(q.text))
                dx, dy = a.x - b.x, a.y - b.y
                signed = {"left": -dx, "right": dx, "above": -dy, "below": dy}
                assert max(signed, key=signed.get) == q.answer


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [(96, 30, "top"), (96, 160, "bottom"), (30, 96, "left"), (160, 96, "right"), (100, 90, "middle"), (40, 40, None),
     (96, 74, None)],
)  # fmt: skip
def test_where_an_object_lies(x, y, place):
    """y grows downwards. Between two places, and near the middle's edge, nothing is asked."""
    scene = Scene((SceneObject("red", "circle", float(x), float(y), 26.0),), "sand")
    assert [q.answer for q in scene.questions() if q.kind == "where"] == ([] if place is None else [place])


def test_every_place_is_asked_for():
    answers = {q.answer for s in SAMPLE for q in s.questions() if q.kind == "where"}
    assert answers == {"left", "right", "top", "bottom", "middle"}


def test_boxes_hold_the_pixels():
    for s in SAMPLE:
        painted = s.segmentation()
        for i, o in enumerate(s.objects):
            rows, cols = np.nonzero(painted == i + 1)
            left, top, right, bottom = o.box()
            assert len(rows) > 200
            assert left - 1 <= cols.min()
            assert cols.max() <= right + 1
            assert top - 1 <= rows.min()
            assert rows.max() <= bottom + 1
            assert left >= 0
            assert right <= SIZE
            assert top >= 0
            assert bottom <= SIZE


def test_pixels_have_the_color():
    for s in SAMPLE[:20]:
        pixels, painted = np.asarray(s.render()).astype(int), s.segmentation()
        for i, o in enumerate(s.objects):
            median = np.median(pixels[painted == i + 1], axis=0)
            assert np.abs(median - np.array(COLORS[o.color])).max() <= 3


def test_objects_do_not_overlap():
    for s in SAMPLE:
        for i, a in enumerate(s.objects):
            for b in s.objects[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


@pytest.mark.parametrize("make", [attribute_swaps, relation_swaps])
def test_swap_pairs(make):
    for pair in make(20):
        a, b = pair.scenes
        assert sorted(pair.captions[0].rstrip(".").replace("an ", "a ").split()) == sorted(
            pair.captions[1].rstrip(".").replace("an ", "a ").split()
        )
        assert true_of(a, pair.captions[0])
        assert true_of(b, pair.captions[1])
        assert not true_of(a, pair.captions[1])
        assert not true_of(b, pair.captions[0])
        assert a.split == b.split == "test"


def test_examples():
    examples = list(scenes(3))
    assert [e.id for e in examples] == ["scenes-test-000000", "scenes-test-000001", "scenes-test-000002"]
    assert next(scenes(1, seed=2, split="val")).id == "scenes-val-s2-000000"
    for e in examples:
        assert e.image.size == (SIZE, SIZE)
        assert e.image.mode == "RGB"
        assert len(e.captions) >= 2
        assert e.meta["ground"] in GROUNDS
        assert all(set(o) == {"color", "shape", "box"} for o in e.meta["objects"])
