"""Where an object lies in its scene, checked against the pixels of its picture."""

import numpy as np
import pytest

from mechvlm.datasets.scenes import SIZE, Scene, SceneObject, relation, sample_scenes

PLACES = {
    "left": (40.0, 96.0),
    "right": (152.0, 96.0),
    "top": (96.0, 40.0),
    "bottom": (96.0, 152.0),
    "middle": (96.0, 96.0),
}


def middle(scene: Scene, number: int) -> tuple[float, float]:
    """The mean (x, y) of an object's pixels."""
    y, x = (scene.segmentation() == number + 1).nonzero()
    return float(np.mean(x)), float(np.mean(y))


@pytest.mark.parametrize("place", PLACES)
def test_a_place_is_where_the_pixels_are(place):
    scene = Scene((SceneObject("red", "circle", *PLACES[place], 28.0),), "sand")
    answers = [question.answer for question in scene.questions() if question.kind == "where"]
    assert answers == [place]
    x, y = middle(scene, 0)
    third = {"left": x < SIZE / 3, "right": x > 2 * SIZE / 3, "top": y < SIZE / 3, "bottom": y > 2 * SIZE / 3}
    assert [name for name, lies in third.items() if lies] == [name for name in (place,) if name != "middle"]


def test_every_where_answer_is_true_of_the_pixels():
    seen = set()
    for scene in sample_scenes(40, seed=3):
        for question in scene.questions():
            if question.kind != "where":
                continue
            (number,) = [i for i, o in enumerate(scene.objects) if question.text == f"Where is the {o.name}?"]
            x, y = (value - SIZE / 2 for value in middle(scene, number))
            direction = ("left" if x < 0 else "right") if abs(x) > abs(y) else ("top" if y < 0 else "bottom")
            assert question.answer in (direction, "middle")
            if question.answer == "middle":
                assert max(abs(x), abs(y)) < 0.15 * SIZE
            seen.add(question.answer)
    assert seen == set(PLACES)


def test_every_relation_is_true_of_the_pixels():
    seen = set()
    for scene in sample_scenes(20, seed=4, counts=(2, 3)):
        middles = [middle(scene, i) for i in range(len(scene.objects))]
        for i, a in enumerate(scene.objects):
            for j, b in enumerate(scene.objects):
                if i == j or (answer := relation(a, b)) is None:
                    continue
                (ax, ay), (bx, by) = middles[i], middles[j]
                true = {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}
                assert true[answer]
                seen.add(answer)
    assert seen == {"left", "right", "above", "below"}
