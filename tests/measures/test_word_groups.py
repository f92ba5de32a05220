"""Groups of written words, by hand."""

import pytest

from mechvlm.measures.word_groups import is_content, word_group
from mechvlm.measures.words import caption_words

CAPTIONS = caption_words(["a red circle left of two cats", "the gray sofa"])


@pytest.mark.parametrize(
    ("word", "group"),
    [
        ("circle", "object"), ("Circles", "object"), ("cat", "object"), ("sofa", "object"),
        ("red", "color"), ("Blue", "color"), ("grey", "color"), ("red-haired", "color"),
        ("a", "function"), ("of", "function"), ("goes", "function"), ("don't", "function"), ("The", "function"),
        ("left", "other"), ("two", "other"), ("7", "other"), ("dog", "other"), ("x", "other"),
    ],
)  # fmt: skip
def test_the_group_of_a_word(word, group):
    assert word_group(word, CAPTIONS) == group
    assert is_content(word) == (group in ("object", "color") or word in ("left", "two", "dog"))
