"""MEASURE: decoded vocabulary pieces against captions. Precision and recall of the words that a lens reads off tokens.

A word is a run of at least two letters, of any script. Everything else parts words or is a non-word: digits,
punctuation, hyphens, apostrophes, byte pieces (`<0x0A>`), special tokens (`<s>`). Vocabularies cut at hyphens and
apostrophes too, so a caption's "t-shirt" is looked for as "shirt", and its "dog's" as "dog".

What a purely formal definition cannot know: a fragment (`ffe`, the end of "giraffe") counts as a decoded word, a
wrong one, and a caption word that the vocabulary holds only in pieces is never found. The controls share both faults,
so compare with them rather than with 1. Captions are taken to be in a language that writes spaces between words.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import pandas as pd

# What opens a word in a piece: SentencePiece's mark, and byte-level BPE's.
WORD_STARTS = ("▁", "Ġ")
# Byte-level BPE writes space and newline as these letters: past the start they are no part of a word.
WRITTEN_SPACES = {"Ġ", "Ċ"}

# English words of grammar alone. Ready-made lists also hold what is seen in images: scikit-learn's "two", "fire" and
# "front", stop-words' "man", "room" and "large".
STOP_WORDS = frozenset(
    {
        # articles, determiners, quantifiers
        "a", "an", "the", "this", "that", "these", "those", "some", "any", "no", "every", "each", "either",
        "neither", "both", "all", "such", "another", "other", "others", "same", "own", "much", "many", "more",
        "most", "few", "less", "least", "several", "enough",
        # pronouns
        "i", "me", "my", "mine", "myself", "we", "us", "our", "ours", "ourselves", "you", "your", "yours",
        "yourself", "yourselves", "he", "him", "his", "himself", "she", "her", "hers", "herself", "it", "its",
        "itself", "they", "them", "their", "theirs", "themselves", "who", "whom", "whose", "which", "what",
        "someone", "something", "anyone", "anything", "everyone", "everything", "nobody", "nothing", "none",
        # prepositions
        "of", "to", "in", "on", "at", "by", "for", "with", "from", "into", "onto", "upon", "about", "above",
        "across", "after", "against", "along", "among", "around", "as", "before", "behind", "below", "beneath",
        "beside", "besides", "between", "beyond", "down", "during", "except", "inside", "like", "near", "off",
        "out", "outside", "over", "past", "per", "since", "than", "through", "throughout", "toward", "towards",
        "under", "until", "up", "via", "while", "within", "without",
        # conjunctions
        "and", "or", "but", "nor", "so", "yet", "if", "because", "although", "though", "unless", "whether",
        # auxiliaries, and the verbs that carry no act
        "am", "is", "are", "was", "were", "be", "been", "being", "have", "has", "had", "having", "do", "does",
        "did", "doing", "done", "can", "could", "may", "might", "must", "shall", "should", "will", "would",
        "cannot", "go", "get",
        # adverbs
        "not", "there", "here", "then", "when", "where", "why", "how", "again", "also", "almost", "already",
        "always", "just", "even", "ever", "never", "now", "often", "only", "quite", "rather", "still", "together",
        "too", "very", "well", "away",
        # what an apostrophe leaves of a contraction
        "aren", "couldn", "didn", "doesn", "don", "hadn", "hasn", "haven", "isn", "ll", "shouldn", "ve", "wasn",
        "weren", "wouldn",
    }
)  # fmt: skip


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1, NaN for 0/0, and the counts that they are made of."""

    precision: float  # n_correct / n_decoded
    recall: float  # n_found / n_caption
    n_decoded: int
    n_correct: int
    n_caption: int
    n_found: int


def word_of(piece: str) -> str | None:
    """The case-folded word that a vocabulary piece is, or None where it is none.

    `piece` is as `convert_ids_to_tokens` gives it. One word-start mark (`▁`, or `Ġ` of byte-level vocabularies) is
    stripped, and what is left must be at least two letters and nothing else. `▁cat`, `cat` and `ĠCat` are "cat";
    `##ing`, `<0x0A>`, `</s>`, `42` and `▁a` are None. Non-ASCII pieces of byte-level vocabularies are not decoded.

    >>> word_of("▁Cat"), word_of("<0x0A>")
    ('cat', None)
    """
    word = _letters(piece)
    return None if word is None else word.casefold()


def caption_words(
    captions: str | Sequence[str], *, lemmas: bool = True, stop_words: bool | Collection[str] = False, lang: str = "en"
) -> set[str]:
    """The unique words of one caption, or of several together, case-folded.

    `lemmas=True` gives each word's lemma, by simplemma. It sees no context and errs on some: "leaves" is "leave", and
    "playing" is "playe", which "play" does not find.
    `stop_words=False` leaves out `STOP_WORDS`, English words of grammar alone, by form or lemma ("goes" by "go");
    numbers count. True counts every word; a set of words leaves out those instead. The result may be empty: the caption
    "a" has no word.

    Raises ValueError where there is no caption, or none with any text; and for `stop_words=False` in another language
    than English, for which there is no list.

    >>> sorted(caption_words("Two dogs run after the children's frisbee."))
    ['child', 'dog', 'frisbee', 'run', 'two']
    """
    return set(_caption_counts(captions, lemmas, _left_out(stop_words, lang), lang))


def precision_recall(
    decoded: Sequence[Sequence[str]],
    captions: str | Sequence[str],
    *,
    by: str = "word",
    lemmas: bool = True,
    stop_words: bool | Collection[str] = False,
    non_words: bool = False,
    lang: str = "en",
) -> PrecisionRecall:
    """Precision and recall of the words decoded at some positions, against an image's captions (shares, 0 to 1).

    `decoded` is [position][k]: each position's top-k vocabulary pieces. Top-1 is k = 1.

    By word, each word counts once:
        precision = |decoded words ∩ caption words| / |decoded words|
        recall    = |decoded words ∩ caption words| / |caption words|
    By token, each occurrence counts:
        precision = positions with a caption word among their k / positions with any word among their k
        recall    = words in the captions, repeats counted, that are decoded anywhere / words in the captions
    so by token a position counts once whatever its k, and a word that five captions name weighs five times.

    Stop words and lemmas as in `caption_words`; a stop word that is left out is neither right nor wrong. Non-words
    are left out too, or with `non_words=True` count as decoded and wrong: by word each distinct piece, by token each
    position that holds one. 0/0 is NaN, never 0: precision where no word was decoded, recall where the captions
    have no word.

    After the logit-lens verbalization of Wei et al. 2024 (arXiv 2411.00646). Which words count is for the options.
    Tested: equals the sums written out over positions and words.

    Raises ValueError for another `by`, for captions without text, and where `decoded` is not nested.
    """
    pieces, left_out = _checked(decoded, by), _left_out(stop_words, lang)
    counts = _caption_counts(captions, lemmas, left_out, lang)
    return _score(pieces, _readings(pieces, lemmas, left_out, lang), counts, by, non_words)


def lens_precision_recall(
    tokens: Sequence[Sequence[Sequence[str]]],
    captions: str | Sequence[str],
    other_captions: Sequence[str | Sequence[str]] = (),
    *,
    by: str = "word",
    lemmas: bool = True,
    stop_words: bool | Collection[str] = False,
    non_words: bool = False,
    lang: str = "en",
    single: bool = False,
) -> pd.DataFrame:
    """`precision_recall` at each layer of one example, with its control: a frame of layer, measure, control, value.

    `tokens` is [layer][position][k]. `other_captions` holds one entry for each of some other images, its caption or
    captions; give as many an image as `captions` has, since more captions find more words. The rows whose `control`
    is "captions" are against the image's own, those of "other captions" are the mean of the values against each
    other image, NaN left out. The other control, text positions, is the same call on their tokens.

    "captions" takes an image's captions together: their union finds more words than each of them. With `single=True` there
    are also rows "single captions" and "other single captions": the mean of the values against each caption alone that has
    a word, of the image and of the others.

    Raises ValueError as `precision_recall` does.
    """
    left_out = _left_out(stop_words, lang)

    def counts(some: Sequence[str | Sequence[str]]) -> list[Counter[str]]:
        return [_caption_counts(one, lemmas, left_out, lang) for one in some]

    against = {"captions": counts([captions]), "other captions": counts(other_captions)}
    if single:
        for control, all_captions in (("single captions", [captions]), ("other single captions", other_captions)):
            each = counts([one for some in all_captions for one in _one_by_one(some)])
            # Against a caption without a word precision would be 0 whatever is decoded.
            against[control] = [words for words in each if words] or each[:1]
    rows = []
    for layer, decoded in enumerate(tokens):
        pieces = _checked(decoded, by)
        readings = _readings(pieces, lemmas, left_out, lang)
        for control, some in against.items():
            if not some:
                continue
            scores = [_score(pieces, readings, words, by, non_words) for words in some]
            for measure in ("precision", "recall"):
                values = [value for score in scores if not math.isnan(value := getattr(score, measure))]
                rows.append((layer, measure, control, sum(values) / len(values) if values else math.nan))
    return pd.DataFrame(rows, columns=["layer", "measure", "control", "value"])


# --- pieces and captions to words ---


@lru_cache(maxsize=1 << 18)  # a vocabulary is read again at every layer of every example
def _letters(piece: str) -> str | None:
    """The lower-case word in a piece, not yet case-folded: simplemma knows "straße", not "strasse"."""
    text = unicodedata.normalize("NFC", piece)
    text = text[1:] if text.startswith(WORD_STARTS) else text
    if not all(map(_is_letter, text)) or sum(map(str.isalpha, text)) < 2 or WRITTEN_SPACES & set(text):
        return None
    return text.lower()


def _is_letter(character: str) -> bool:
    # Marks too: Devanagari writes its vowels as marks on a letter.
    return unicodedata.category(character)[0] in "LM"


@lru_cache(maxsize=1 << 18)
def _lemma(word: str, lang: str) -> str:
    import simplemma

    return simplemma.lemmatize(word, lang=lang)


def _left_out(stop: bool | Collection[str], lang: str) -> frozenset[str]:
    """The words that are not counted, for the three forms of the `stop_words` option."""
    if isinstance(stop, str):
        raise TypeError(f"stop_words is True, False or a set of words, not the one string {stop!r}.")
    if isinstance(stop, bool):
        if not stop and lang != "en":
            raise ValueError(f"There is a list of stop words for lang='en' only, not for {lang!r}: pass stop_words="
                             "True to count every word, or stop_words={...}, the words to leave out.")  # fmt: skip
        return frozenset() if stop else STOP_WORDS
    return frozenset(word.casefold() for word in stop)


def _counted(word: str, lemmas: bool, left_out: frozenset[str], lang: str) -> str | None:
    """What a lower-case word counts as, or None for a stop word. Stop words go by form and by lemma: "goes", "go"."""
    form = word.casefold()
    if form in left_out:
        return None
    if not lemmas and not left_out:
        return form  # any language will do, also one that simplemma does not know
    lemma = _lemma(word, lang).casefold()
    if lemma in left_out:
        return None
    return lemma if lemmas else form


def _caption_counts(captions: str | Sequence[str], lemmas: bool, left_out: frozenset[str], lang: str) -> Counter[str]:
    captions = [captions] if isinstance(captions, str) else list(captions)
    if not any(caption.strip() for caption in captions):
        raise ValueError(f"captions must hold text to look for words in, got {captions!r}.")
    counts: Counter[str] = Counter()
    for caption in captions:
        caption = unicodedata.normalize("NFC", caption)
        for run in "".join(character if _is_letter(character) else " " for character in caption).split():
            word = _letters(run)
            if word and (counted := _counted(word, lemmas, left_out, lang)):
                counts[counted] += 1
    return counts


def _one_by_one(captions: str | Sequence[str]) -> list[str]:
    return [captions] if isinstance(captions, str) else [caption for caption in captions if caption.strip()]


def _checked(decoded: Sequence[Sequence[str]], by: str) -> Sequence[Sequence[str]]:
    if by not in ("word", "token"):
        raise ValueError(f"by is 'word' or 'token', not {by!r}.")
    # A string is a sequence of strings too: a flat list would quietly be read letter by letter.
    if isinstance(decoded, str) or any(isinstance(position, str) for position in decoded):
        raise ValueError("decoded is [position][k], a sequence of pieces for each position, but a position is a plain "
                         "string: for top-1 write [[piece] for piece in decoded].")  # fmt: skip
    return decoded


# --- scores ---


def _readings(
    decoded: Sequence[Sequence[str]], lemmas: bool, left_out: frozenset[str], lang: str
) -> tuple[dict[str, str], set[str]]:
    """{piece: what it counts as} over the distinct pieces, and the pieces that are no word."""
    words, non_words = {}, set()
    for piece in set().union(*decoded):
        word = _letters(piece)
        if word is None:
            non_words.add(piece)
        elif counted := _counted(word, lemmas, left_out, lang):
            words[piece] = counted
    return words, non_words


def _score(
    decoded: Sequence[Sequence[str]],
    readings: tuple[dict[str, str], set[str]],
    captions: Counter[str],
    by: str,
    non_words: bool,
) -> PrecisionRecall:
    words, wrong = readings
    wrong = wrong if non_words else set()
    unique = set(words.values())
    if by == "word":
        n_decoded, n_correct = len(unique) + len(wrong), len(unique & captions.keys())
        n_caption, n_found = len(captions), n_correct
    else:
        counted = wrong | words.keys()
        correct = {piece for piece, word in words.items() if word in captions}
        n_decoded = sum(not counted.isdisjoint(position) for position in decoded)
        n_correct = sum(not correct.isdisjoint(position) for position in decoded)
        n_caption = captions.total()
        n_found = sum(captions[word] for word in unique & captions.keys())
    return PrecisionRecall(
        n_correct / n_decoded if n_decoded else math.nan,
        n_found / n_caption if n_caption else math.nan,
        n_decoded, n_correct, n_caption, n_found,
    )  # fmt: skip
