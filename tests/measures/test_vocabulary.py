"""Scores by arrays of ids against the same scores from texts, value by value."""

import numpy as np
import pytest

from mechvlm.measures.vocabulary import NO_WORD, VocabularyWords, caption_groups, lens_curves
from mechvlm.measures.words import lens_precision_recall, word_of

TEXTS = (
    " dogs", " Dog", "dog", " cat", "\n", "</s>", " 42", " a", " the", " goes", " running", "ffe", "\ufffd", " Straße",
    " straßen", " mat", " mats", " red", "-", " colour",
)  # fmt: skip
CAPTIONS = (
    ("a dog runs",), ("a cat on a mat", "the dogs", "of the", "  "), ("of the", "a"), ("the red mats", "a Straße"),
)  # fmt: skip


def texts_of(ids: np.ndarray) -> list[str]:
    return [TEXTS[id] for id in ids.tolist()]


@pytest.mark.parametrize("seed", range(6))
def test_curves_equal_those_from_texts(seed):
    draw = np.random.default_rng(seed)
    words = VocabularyWords(texts_of)
    for captions in CAPTIONS:
        # Few points: some states then decode to no word at all, where precision is 0/0.
        ids = draw.integers(0, len(TEXTS), (5, int(draw.integers(1, 6))))
        got = lens_curves(words, ids, caption_groups(captions))
        pieces = {state: [[TEXTS[id]] for id in row] for state, row in enumerate(ids.tolist())}
        frame = lens_precision_recall(pieces, captions, single=len(captions) > 1)
        by_curve = frame.set_index(["control", "measure"])["value"]
        np.testing.assert_array_equal(got.word_share, by_curve["captions", "word_share"])
        for group, control in enumerate(["captions", "single captions"][: len(got.precision)]):
            np.testing.assert_array_equal(got.precision[group], by_curve[control, "precision"])
            np.testing.assert_array_equal(got.recall[group], by_curve[control, "recall"])
        assert len(got.precision) == 1 + (len(captions) > 1)


def test_each_id_is_looked_up_once():
    looked_up: list[int] = []

    def texts(ids: np.ndarray) -> list[str]:
        looked_up.extend(ids.tolist())
        return texts_of(ids)

    words = VocabularyWords(texts)
    words.word_numbers(np.array([[3, 0], [3, 4]]))
    words.form_numbers(np.array([8, 0, 3]))
    words.word_numbers(np.array([], int))
    assert sorted(looked_up) == [0, 3, 4, 8]


def test_words_count_by_lemma_and_forms_as_they_stand():
    words = VocabularyWords(texts_of)
    numbers = words.word_numbers(np.arange(len(TEXTS)))
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3], "dogs, Dog and dog are one word"
    assert (numbers[[4, 5, 6, 7, 8, 12, 18]] == NO_WORD).all(), "no words, and a stop word"
    names, forms = list(words.forms), words.form_numbers(np.arange(len(TEXTS))).tolist()
    assert [None if n == NO_WORD else names[n] for n in forms] == [word_of(text) for text in TEXTS]
