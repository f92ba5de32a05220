"""Groups of the words that a model writes: objects, colors, words of grammar, and the rest.

No tagger says what part of speech a word is. So the groups go by lists and by captions, in English:

- "function": stop words (`mechvlm.measures.stop_words`), by form or by lemma.
- "color": the basic color terms, `COLOR_WORDS`.
- "object": other words that the image's captions hold, but for numbers and places (`NO_OBJECTS`).
  Verbs and adjectives of a caption are among them.
- "other": all the rest: numbers, places, and words that no caption of the image holds.
"""

from collections.abc import Collection

from mechvlm.measures.stop_words import STOP_WORDS
from mechvlm.measures.words import caption_words

WORD_GROUPS = ("object", "color", "function", "other")
COLOR_WORDS = frozenset(
    {"black", "white", "red", "green", "yellow", "blue", "brown", "orange", "pink", "purple", "gray", "grey"}
)
"""The eleven basic color terms of English (Berlin and Kay 1969), and the other spelling of gray."""
NO_OBJECTS = frozenset(
    {
        "left", "right", "top", "bottom", "middle", "center", "centre", "corner", "side", "front", "back",
        "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    }
)  # fmt: skip
"""Words of places and numbers, which captions hold and which name no object."""


def is_content(word: str) -> bool:
    """Whether a word says something of an image: two letters or more, and no stop word.

    >>> is_content("circles"), is_content("of")
    (True, False)
    """
    return bool(caption_words(word))


def word_group(word: str, captions: Collection[str]) -> str:
    """The group of a written word: "object", "color", "function" or "other".

    >>> word_group("Circles", caption_words("a red circle left of a cat"))
    'object'

    Args:
        word: as it was written; one with hyphens counts by its parts.
        captions: the lemmas of the image's captions, as `caption_words` gives them.
    """
    form, lemmas = word.casefold(), caption_words(word)
    if not lemmas:
        return "function" if form in STOP_WORDS or caption_words(word, stop_words=True) else "other"
    if COLOR_WORDS & {form, *lemmas}:
        return "color"
    if form in NO_OBJECTS or not (lemmas - NO_OBJECTS) & set(captions):
        return "other"
    return "object"
