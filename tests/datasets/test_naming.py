"""Questions about one object: the answer is the color in its box, and no other object fits."""

import numpy as np

from mechvlm.datasets.naming import naming
from mechvlm.datasets.scenes import COLORS, SHAPES


def test_the_answer_lies_in_the_box():
    questions = naming(20)
    assert len(questions) == 20
    for image, prompt, answer, box in questions:
        shape = prompt.removeprefix("What color is the ").removesuffix("?")
        assert shape in SHAPES
        pixels = np.asarray(image.crop([round(x) for x in box]), dtype=int)
        near = (abs(pixels - COLORS[answer]).max(-1) < 12).mean()
        assert near > 0.15, (prompt, answer)


def test_a_longer_list_begins_with_the_shorter_one():
    short, long = naming(3, seed=4), naming(6, seed=4)
    assert [question[1:] for question in long[:3]] == [question[1:] for question in short]
    assert [question[1:] for question in naming(3, seed=5)] != [question[1:] for question in short]
