"""Words and phrases in the texts of tokens: which tokens spell them."""

import re
from collections.abc import Sequence
from itertools import accumulate

WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*")
"""A word: letters and digits, with hyphens and apostrophes inside."""


def occurrences(phrase: str, texts: Sequence[str]) -> list[list[int]]:
    """The tokens that spell a phrase, for each of its occurrences.

    Only whole words match, and only in the same case.

    >>> occurrences("red", [" a", " red", " cat", " in", " r", "ed"])
    [[1], [4, 5]]

    Args:
        phrase: the phrase; blanks around it do not count.
        texts: each token's text, "" for one that shares its character with the one before. What no
            phrase may contain is a NUL.
    """
    wanted = re.escape(phrase.strip())
    pattern = re.compile(rf"(?<!\w){wanted}(?!\w)")
    return [tokens for _, tokens in spans(pattern, texts)] if wanted else []


def spans(pattern: re.Pattern, texts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """What the pattern matches in the texts, one after the other, each with its tokens.

    A token of blanks alone belongs to no match.
    """
    # Tokens that share a character have one stretch, which begins at their first letter.
    stretches: list[tuple[int, int]] = []
    for piece, end in zip(texts, accumulate(map(len, texts)), strict=True):
        stretches.append((end - len(piece.lstrip()), end) if piece else stretches[-1])
    matches = []
    for match in pattern.finditer("".join(texts)):
        first, stop = match.span()
        tokens = [i for i, (start, end) in enumerate(stretches) if first < end and start < stop]
        matches.append((match.group(), tokens))
    return matches
