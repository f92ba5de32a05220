"""Words: what always holds, for any Unicode; and controls of captions that hold no word."""

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechvlm.measures.words import caption_words, lens_precision_recall, precision_recall, word_of

CAT = [[["▁cat"], ["▁dog"]]]  # one layer, two positions


def control(captions, others, measure: str, name: str = "other captions", **options) -> float:
    frame = lens_precision_recall(CAT, captions, others, **options)
    return frame.set_index(["control", "measure"])["value"][name, measure]


def test_a_control_leaves_out_captions_that_hold_no_word():
    """The recall of "a" is 0/0: it is no 0 in the mean."""
    assert control("a tree", ["a cat", "a"], "recall") == 1
    assert control("a tree", ["a cat and a bird", "the", "a dog"], "recall") == pytest.approx((1 / 2 + 1) / 2)
    # Precision has a value with every caption: nothing that was decoded is in "a".
    assert control("a tree", ["a cat", "a"], "precision") == pytest.approx((1 / 2 + 0) / 2)
    assert math.isnan(control("a tree", ["a", "the"], "recall"))
    others = [["a cat", "a"], ["the", "a dog"]]
    assert control("a tree", others, "recall", "other single captions", single=True) == 1
    assert control("a tree", others, "precision", "other single captions", single=True) == 1 / 2


def test_words_are_case_folded_on_both_sides():
    for piece, caption in (("▁STRASSE", "eine Straße"), ("▁Straße", "EINE STRASSE"), ("▁Cafe\u0301", "ein CAFÉ")):
        scores = precision_recall([[piece]], caption, lemmas=False, stop_words={"eine", "ein"})
        assert (scores.precision, scores.recall) == (1, 1), (piece, caption)


@given(st.text())
def test_any_text_is_a_word_or_none(text):
    word = word_of(text)
    if word is not None:
        assert word == word.casefold()
        assert word_of("▁" + word) in (word, None)
        assert word_of(word) in (word, None)  # what folds to other letters may fold further
        assert all(unicodedata.category(character)[0] in "LM" for character in word)


@given(st.text().filter(lambda text: text.strip()), st.booleans(), st.booleans())
def test_any_captions_words_are_themselves_captions(text, lemmas, stop_words):
    words = caption_words(text, lemmas=lemmas, stop_words=stop_words)
    forms = caption_words(text, lemmas=False, stop_words=True)
    assert all(word == word.casefold() for word in words)
    assert caption_words([text, text], lemmas=lemmas, stop_words=stop_words) == words
    assert lemmas or words <= forms


@given(st.lists(st.lists(st.text(), max_size=3), max_size=5), st.text().filter(lambda text: text.strip()))
def test_shares_of_any_text_lie_between_0_and_1(decoded, caption):
    for by in ("word", "token"):
        scores = precision_recall(decoded, caption, by=by)
        for share in scores[:2]:
            assert math.isnan(share) or 0 <= share <= 1
        assert precision_recall(decoded[::-1], caption, by=by)[2:] == scores[2:]
