"""Words of token ids: each id is looked up once, and everything after that is counting in arrays.

A study decodes the same few thousand ids at every state of every example. `VocabularyWords` gives
each id the number of its word; `lens_curves` scores arrays of such numbers against captions. The
definitions are those of `mechvlm.measures.words`, with its default options and one token a
position.

>>> words = VocabularyWords(lambda ids: [" dogs", " cat", "\\n"])
>>> words.word_numbers(np.array([[0, 1, 2]])), words.words
(array([[ 0,  1, -1]], dtype=int32), {'dog': 0, 'cat': 1})
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechvlm.measures.words import caption_counts, counted_word, word_of

NO_WORD, UNREAD = -1, -2
"""Instead of a word's number: of an id that is no word or a stop word, and of one not seen yet."""


class VocabularyWords:
    """The words of a vocabulary's ids, each looked up when it is first seen.

    Args:
        texts: gives the texts of some ids, as `vlm.to_str_tokens` does.

    Attributes:
        words, forms: {word: its number}: of the words as which ids count, and of `word_of` their
            texts. Numbers go up in the order in which words are first seen.
    """

    def __init__(self, texts: Callable[[Int[np.ndarray, " n"]], Sequence[str]]):
        self._texts = texts
        self.words: dict[str, int] = {}
        self.forms: dict[str, int] = {}
        self._of_ids = np.full((2, 0), UNREAD, np.int32)  # [word or form, id]

    def word_numbers(self, ids: Int[np.ndarray, "*axes"]) -> Int[np.ndarray, "*axes"]:
        """The number of the word as which each id counts, its lemma; `NO_WORD` for none."""
        return self._looked_up(ids)[0][ids]

    def form_numbers(self, ids: Int[np.ndarray, "*axes"]) -> Int[np.ndarray, "*axes"]:
        """The number of `word_of` each id's text, stop words too; `NO_WORD` for none."""
        return self._looked_up(ids)[1][ids]

    def known(self, words: Iterable[str]) -> Int[np.ndarray, " n"]:
        """The numbers of those of these words that any id seen so far counts as."""
        return np.array([self.words[word] for word in words if word in self.words], int)

    def _looked_up(self, ids: np.ndarray) -> np.ndarray:
        """`_of_ids`, once these ids are read."""
        if (missing := int(ids.max(initial=-1)) + 1 - self._of_ids.shape[1]) > 0:
            self._of_ids = np.concatenate([self._of_ids, np.full((2, missing), UNREAD, np.int32)], 1)
        new = np.unique(ids[self._of_ids[0][ids] == UNREAD])
        for id, text in zip(new.tolist(), self._texts(new) if len(new) else (), strict=True):
            readings = (self.words, counted_word(text)), (self.forms, word_of(text))
            self._of_ids[:, id] = [
                NO_WORD if word is None else numbers.setdefault(word, len(numbers)) for numbers, word in readings
            ]
        return self._of_ids


class LensCurves(NamedTuple):
    """Scores of one example's decoded words by state, each 0 to 1; NaN for 0/0.

    word_share: share of the positions that decode to a word.
    precision, recall: one row a group of captions, as `lens_curves` is given them.
    """

    word_share: Float[np.ndarray, " state"]
    precision: Float[np.ndarray, "group state"]
    recall: Float[np.ndarray, "group state"]


def decoded_words(numbers: Int[np.ndarray, "state point"], n_words: int) -> Bool[np.ndarray, "state word"]:
    """Which words are decoded anywhere at each state."""
    decoded = np.zeros((len(numbers), n_words + 1), bool)
    decoded[np.arange(len(numbers))[:, None], numbers] = True  # NO_WORD, -1, is the last column
    return decoded[:, :-1]


def lens_curves(
    words: VocabularyWords, ids: Int[np.ndarray, "state point"], groups: Sequence[Sequence[Counter[str]]]
) -> LensCurves:
    """`lens_precision_recall` by word, on arrays.

    Args:
        words: of the vocabulary.
        ids: the likeliest token of each point.
        groups: each several captions, as `caption_counts` counts their words; a group's scores are
            means over its captions, NaN left out.

    Tested: equals `lens_precision_recall` on the tokens' texts, value by value.
    """
    numbers = words.word_numbers(ids)
    decoded = decoded_words(numbers, len(words.words))
    with np.errstate(invalid="ignore", divide="ignore"):
        n_decoded = _counts(decoded)
        word_share = _counts(numbers != NO_WORD) / np.float64(ids.shape[1])
        precision, recall = [], []
        for group in groups:
            correct = [_counts(decoded[:, words.known(caption)]) for caption in group]
            precision.append(_mean([n / n_decoded for n in correct]))
            recall.append(_mean([n / np.float64(len(own)) for n, own in zip(correct, group, strict=True)]))
    return LensCurves(word_share, np.array(precision), np.array(recall))


def _counts(rows: Bool[np.ndarray, "row column"]) -> Int[np.ndarray, " row"]:
    return np.array([np.count_nonzero(row) for row in rows])  # ten times as fast as a sum of bools


def _mean(values: list[np.ndarray]) -> np.ndarray:
    """The mean of the values that are no NaN, added in their order."""
    total, n = np.zeros_like(values[0]), np.zeros_like(values[0])
    for value in values:
        is_number = ~np.isnan(value)
        total[is_number] += value[is_number]
        n += is_number
    return total / n


@lru_cache(maxsize=256)  # an example's captions are its neighbour's control, and its text's too
def caption_groups(captions: tuple[str, ...]) -> tuple[list[Counter[str]], ...]:
    """Groups for `lens_curves`: the captions together; of several, also each by itself.

    A single caption without a word is left out, as its precision would be 0 whatever is decoded.
    """
    together = [caption_counts(captions)]
    if len(captions) == 1:
        return (together,)
    each = [caption_counts(caption) for caption in captions if caption.strip()]
    return together, [counts for counts in each if counts] or each[:1]
