"""Precision and recall of the words that a logit lens decodes, against captions.

Tokens come as text, with the space that they begin with: what `lens.pieces()` and
`vlm.to_str_tokens(ids)` give, whatever the tokenizer. A word is a run of at least two letters, of
any script. Everything else separates words or is a non-word: digits, punctuation, hyphens,
apostrophes, line breaks, parts of characters ("\ufffd"), special tokens (`<s>`). Vocabularies split
at hyphens and apostrophes too, so a caption's "t-shirt" is looked for as "shirt", and its "dog's"
as "dog".

The definition is formal, and therefore errs in two ways. A fragment (`ffe`, the end of "giraffe")
counts as a decoded word, a wrong one. A caption word that is not one piece of the vocabulary is
never found. The controls share both faults, so compare with them rather than with 1. Captions are
assumed to be in a language that writes spaces between words.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import pandas as pd

from mechvlm.measures.stop_words import STOP_WORDS

# The space before a word: as text, and as SentencePiece writes it.
WORD_STARTS = (" ", "▁")
# Byte-level BPE writes space and line break as these letters, in pieces that were not decoded.
BYTE_LEVEL_MARKS = ("Ġ", "Ċ")


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1, and the counts that they are computed from.

    Attributes:
        precision: n_correct / n_decoded; NaN for 0/0.
        recall: n_found / n_caption; NaN for 0/0.
        n_decoded: decoded words, or by token the positions with one.
        n_correct: decoded words that are in the captions, or by token the positions with one.
        n_caption: words in the captions, by token with repeats.
        n_found: words in the captions that were decoded, by token with repeats.
        word_share: share of the positions with a word in their top k, whatever `by` is; NaN for
            0/0. Precision is of these alone.
        n_positions: all positions, those without a word too.
    """

    precision: float
    recall: float
    n_decoded: int
    n_correct: int
    n_caption: int
    n_found: int
    word_share: float
    n_positions: int


def word_of(piece: str) -> str | None:
    """The case-folded word in a token's text, or None if it is no word.

    One leading space (or the `▁` that stands for it) is stripped. The rest must be at least two
    letters and nothing else. " Cat" and "cat" are "cat"; "\\n", "</s>", "42", " a" and the part of
    a character "\\ufffd" are None.

    >>> word_of(" Cat"), word_of("\\n")
    ('cat', None)

    Args:
        piece: the text, as `vlm.to_str_tokens` returns it.
    """
    word = _letters(piece)
    return None if word is None else word.casefold()


def caption_words(
    captions: str | Sequence[str], *, lemmas: bool = True, stop_words: bool | Collection[str] = False, lang: str = "en"
) -> set[str]:
    """The unique words of one caption, or of several together, case-folded.

    The result may be empty: the caption "a" has no word.

    >>> sorted(caption_words("Two dogs run after the children's frisbee."))
    ['child', 'dog', 'frisbee', 'run', 'two']

    Args:
        captions: one caption or several.
        lemmas: True gives each word's lemma, by simplemma. It sees no context and errs on some
            words: "leaves" becomes "leave", and "playing" becomes "playe", which does not match
            "play".
        stop_words: False leaves out `STOP_WORDS`, English words of grammar alone, by form or by
            lemma ("goes" by "go"); number words count. True counts every word. A set of words
            leaves out those instead.
        lang: language of the captions, as simplemma names it.

    Raises:
        ValueError: for no caption, or none with any text; for `stop_words=False` in another
            language than English, for which there is no list.
        TypeError: for `stop_words` that is one string.
    """
    return set(caption_counts(captions, lemmas, _left_out(stop_words, lang), lang))


def precision_recall(
    decoded: Sequence[Sequence[str]] | Mapping[Any, Sequence[str]],
    captions: str | Sequence[str],
    *,
    by: str = "word",
    lemmas: bool = True,
    stop_words: bool | Collection[str] = False,
    non_words: bool = False,
    lang: str = "en",
) -> PrecisionRecall:
    """Precision and recall of decoded words against an image's captions (shares, 0 to 1).

    By word, each word counts once:

        precision = |decoded words ∩ caption words| / |decoded words|
        recall    = |decoded words ∩ caption words| / |caption words|

    By token, each occurrence counts:

        precision = positions with a caption word in their top k / positions with any word in it
        recall    = words in the captions that are decoded anywhere / words in the captions

    So by token a position counts once whatever its k, and the words in the captions count with
    their repeats: a word in five captions weighs five times.

    Positions that decode to no word are in neither. Beside precision stands their complement:

        word_share = positions with any word in their top k / positions

    0/0 is NaN, never 0: precision if no word was decoded, recall if the captions have no word.

    >>> precision_recall([[" dogs"], [" cat"], ["\\n"]], "A dog runs.")[:2]
    (0.5, 0.5)

    Source: the logit-lens verbalization of Wei et al. 2024 (arXiv 2411.00646). Which words count is
    set by the options.
    Tested: equals the sums written out over positions and words.

    Args:
        decoded: the texts of the top-k tokens of each position, [position][k] or {position: [k]},
            such as `lens.pieces()[state]`. Top-1 is k = 1.
        captions: the image's caption or captions.
        by: "word" or "token", as above.
        lemmas: compare lemmas, as in `caption_words`.
        stop_words: as in `caption_words`. A stop word that is left out is neither right nor wrong.
        non_words: False leaves out pieces that are no word. True counts them as decoded and wrong:
            by word each distinct piece, by token each position that holds one.
        lang: language of the captions.

    Raises:
        ValueError: for another `by`, for captions without text, and for `decoded` that is not
            nested, or holds the pieces of a byte-level vocabulary instead of text.
    """
    pieces, left_out = _check_nested(decoded, by), _left_out(stop_words, lang)
    counts = caption_counts(captions, lemmas, left_out, lang)
    return _score(pieces, _read_pieces(pieces, lemmas, left_out, lang), counts, by, non_words)


def lens_precision_recall(
    tokens: Mapping[int, Sequence[Sequence[str]] | Mapping[Any, Sequence[str]]] | Sequence[Sequence[Sequence[str]]],
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
    """`precision_recall` at each state of one example, with controls.

    The column `control` tells the captions that the words are compared with:

    - "captions": those of the image.
    - "other captions": those of other images, a mean over these images, NaN left out.
    - "single captions", "other single captions" (with `single=True`): the same, with each caption
      by itself, a mean over the captions that have a word. "captions" takes an image's captions
      together, and their union finds more words than each of them.

    The other control, text positions, is the same call on the tokens of those positions.

    Args:
        tokens: the texts of the top-k tokens at each state, {state: {position: [k]}} as
            `lens.pieces()` gives them, or [state][position][k] from state 0.
        captions: the image's caption or captions.
        other_captions: the caption or captions of each of some other images. Give as many for each
            as `captions` has, since more captions find more words.
        by: as in `precision_recall`, like the four below.
        lemmas: see there.
        stop_words: see there.
        non_words: see there.
        lang: see there.
        single: also compare with single captions.

    Returns:
        A table of state, measure ("precision" or "recall"), control and value (0 to 1). The share
        of the positions that decode to a word, "word_share", depends on no captions: it stands once
        at each state, with the control "captions".

    Raises:
        ValueError: as `precision_recall` does.
    """
    left_out = _left_out(stop_words, lang)

    def counts(by_image: Sequence[str | Sequence[str]]) -> list[Counter[str]]:
        return [caption_counts(image_captions, lemmas, left_out, lang) for image_captions in by_image]

    controls = {"captions": counts([captions]), "other captions": counts(other_captions)}
    if single:
        for control, by_image in (("single captions", [captions]), ("other single captions", other_captions)):
            by_caption = counts([caption for image_captions in by_image for caption in _one_by_one(image_captions)])
            # A caption without a word is left out: precision would be 0 whatever is decoded.
            controls[control] = [words for words in by_caption if words] or by_caption[:1]
    rows = []
    for state, decoded in tokens.items() if isinstance(tokens, Mapping) else enumerate(tokens):
        pieces = _check_nested(decoded, by)
        readings = _read_pieces(pieces, lemmas, left_out, lang)
        for control, counts_by_image in controls.items():
            if not counts_by_image:
                continue
            scores = [_score(pieces, readings, words, by, non_words) for words in counts_by_image]
            for measure in ("precision", "recall"):
                values = [value for score in scores if not math.isnan(value := getattr(score, measure))]
                rows.append((state, measure, control, sum(values) / len(values) if values else math.nan))
            if control == "captions":
                rows.append((state, "word_share", control, scores[0].word_share))
    return pd.DataFrame(rows, columns=["state", "measure", "control", "value"])


# --- pieces and captions to words ---


@lru_cache(maxsize=1 << 18)  # the same pieces come at every layer of every example
def _letters(piece: str) -> str | None:
    """The lower-case word in a text. Not case-folded: simplemma knows "straße", not "strasse"."""
    text = unicodedata.normalize("NFC", piece)
    text = text[1:] if text.startswith(WORD_STARTS) else text
    if not all(map(_is_letter, text)) or sum(map(str.isalpha, text)) < 2:
        return None
    return text.lower()


def _is_letter(character: str) -> bool:
    # Marks count as letters: Devanagari writes its vowels as marks on a letter.
    return unicodedata.category(character)[0] in "LM"


@lru_cache(maxsize=1 << 18)
def _lemma(word: str, lang: str) -> str:
    import simplemma

    return simplemma.lemmatize(word, lang=lang)


def _left_out(stop: bool | Collection[str], lang: str) -> frozenset[str]:
    """The case-folded words that the `stop_words` option leaves out."""
    if isinstance(stop, str):
        raise TypeError(f"stop_words is True, False or a set of words, not the one string {stop!r}.")
    if isinstance(stop, bool):
        if not stop and lang != "en":
            raise ValueError(f"There is a list of stop words for lang='en' only, not for {lang!r}: pass stop_words="
                             "True to count every word, or stop_words={...}, the words to leave out.")  # fmt: skip
        return frozenset() if stop else STOP_WORDS
    return frozenset(word.casefold() for word in stop)


def _counted(word: str, lemmas: bool, left_out: frozenset[str], lang: str) -> str | None:
    """The lemma or form as which a lower-case word is counted; None for a stop word.

    A stop word matches by its form or by its lemma: "goes" by "go".
    """
    form = word.casefold()
    if form in left_out:
        return None
    if not lemmas and not left_out:
        return form  # needs no lemma, so the language may be one that simplemma does not know
    lemma = _lemma(word, lang).casefold()
    if lemma in left_out:
        return None
    return lemma if lemmas else form


def counted_word(piece: str) -> str | None:
    """The word as which a token's text counts by default: its lemma, None for a stop word."""
    word = _letters(piece)
    return None if word is None else _counted(word, True, STOP_WORDS, "en")


def caption_counts(
    captions: str | Sequence[str], lemmas: bool = True, left_out: frozenset[str] = STOP_WORDS, lang: str = "en"
) -> Counter[str]:
    """How often each word occurs in the captions together."""
    captions = [captions] if isinstance(captions, str) else list(captions)
    if not any(caption.strip() for caption in captions):
        raise ValueError(f"captions must hold text to look for words in, got {captions!r}.")
    counts: Counter[str] = Counter()
    for caption in captions:
        for run in "".join(character if _is_letter(character) else " " for character in caption).split():
            word = _letters(run)
            if word and (counted := _counted(word, lemmas, left_out, lang)):
                counts[counted] += 1
    return counts


def _one_by_one(captions: str | Sequence[str]) -> list[str]:
    """The captions as a list; of several, only those with text."""
    return [captions] if isinstance(captions, str) else [caption for caption in captions if caption.strip()]


def _check_nested(decoded: Sequence[Sequence[str]] | Mapping[Any, Sequence[str]], by: str) -> Sequence[Sequence[str]]:
    if by not in ("word", "token"):
        raise ValueError(f"by is 'word' or 'token', not {by!r}.")
    # A string is a sequence of strings too: a flat list would be read letter by letter.
    decoded = list(decoded.values()) if isinstance(decoded, Mapping) else decoded
    if isinstance(decoded, str) or any(isinstance(position, str) for position in decoded):
        raise ValueError("decoded is [position][k], a sequence of pieces for each position, but a position is a plain "
                         "string: for top-1 write [[piece] for piece in decoded].")  # fmt: skip
    pieces = set().union(*decoded)
    raw = [piece for piece in pieces if piece.startswith(BYTE_LEVEL_MARKS)]
    # A Maltese word may begin with Ġ; half of a vocabulary's pieces do where Ġ stands for a space.
    if raw and 2 * len(raw) >= len(pieces):
        raise ValueError(f"decoded holds pieces of a byte-level vocabulary, such as {min(raw)!r}, where text belongs: give "
                         "what lens.pieces() or vlm.to_str_tokens(ids) return.")  # fmt: skip
    return decoded


# --- scores ---


def _read_pieces(
    decoded: Sequence[Sequence[str]], lemmas: bool, left_out: frozenset[str], lang: str
) -> tuple[dict[str, str], set[str]]:
    """{piece: the word it counts as} for the distinct pieces, and the pieces that are no word."""
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
    """The precision and recall of the pieces that `_read_pieces` has read."""
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
    n_with_word = sum(not words.keys().isdisjoint(position) for position in decoded)
    return PrecisionRecall(
        n_correct / n_decoded if n_decoded else math.nan,
        n_found / n_caption if n_caption else math.nan,
        n_decoded, n_correct, n_caption, n_found,
        n_with_word / len(decoded) if len(decoded) else math.nan, len(decoded),
    )  # fmt: skip
