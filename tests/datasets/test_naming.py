"""Questions about one object: the answer is the color that lies in its box, and no other object could be meant."""

import numpy as np

from mechvlm.datasets.naming import naming
from mechvlm.datasets.scenes import COLORS, SHAPES


def test_the_answer_lies_in_the_box():
    asked = naming(20)
    assert len(asked) == 20
    for image, prompt, answer, box in asked:
        shape = prompt.removeprefix("What color is the ").removesuffix("?")
        assert shape in SHAPES
        pixels = np.asarray(image.crop([round(x) for x in box]), dtype=int)
        near = (abs(pixels - COLORS[answer]).max(-1) < 12).mean()
        assert near > 0.15, (prompt, answer)


def test_a_longer_list_begins_with_the_shorter_one():
    short, long = naming(3, seed=4), naming(6, seed=4)
    assert [x[1:] for x in long[:3]] == [x[1:] for x in short]
    assert [x[1:] for x in naming(3, seed=5)] != [x[1:] for x in short]
