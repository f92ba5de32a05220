"""The word that stands for an image in a prompt.

Most processors turn one word into all the tokens of an image: `<image>`, `<|image_pad|>`, `[IMG]`,
`<start_of_image>`. Others put the tokens before the text by themselves, and the prompt holds no
word. A record names the word; where it does not, words are tried on a small image, and the one that
gives image tokens is taken.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from PIL import Image

from mechvlm.errors import InputError
from mechvlm.families.record import Architecture, part


@dataclass(frozen=True)
class ImageWord:
    """How a prompt says where an image belongs.

    Attributes:
        text: the word; where the processor puts the tokens by itself, the image token's own text.
        inserted: True if the processor puts the tokens by itself: the prompt must not hold `text`.
    """

    text: str
    inserted: bool


ATTRIBUTES = ("image_token", "boi_token", "image_placeholder_token", "start_image_token")
"""Attributes of a processor or a tokenizer that may hold the word, the likeliest first."""

AROUND = (
    ("image_start_token", "image_end_token"),
    ("vision_start_token", "vision_end_token"),
    ("boi_token", "eoi_token"),
)
"""Attributes that may hold what must stand around the image token, as in HunYuan-VL."""


def image_word(record: Architecture, config, processor) -> ImageWord:
    """The word that stands for an image in a prompt of this processor.

    >>> image_word(record, config, processor)    # Gemma 3
    ImageWord(text='<start_of_image>', inserted=False)

    Raises:
        InputError: where no word makes the processor give image tokens, or the record names an
            attribute that the processor lacks.
    """
    if record.image_word:
        word = getattr(processor, record.image_word, record.image_word)
        if word == record.image_word and word.isidentifier():
            raise InputError(
                f"The record of {record.hf_class} says that the processor's {word} stands for an image, and this "
                f"{type(processor).__name__} has none. Give the processor that belongs to the model."
            )
        return ImageWord(str(word), False)
    if not record.image_token_id:  # a memory, whose config names no image token
        return ImageWord("<image>", True)
    image_token = part(config, record.image_token_id)
    own = processor.tokenizer.convert_ids_to_tokens(image_token)
    if record.image_word == "":
        return ImageWord(own, True)
    known = _TRIED.setdefault(processor, {})
    if image_token not in known:
        known[image_token] = _try_words(processor, image_token, own)
    return known[image_token]


_TRIED: WeakKeyDictionary[Any, dict[int, ImageWord]] = WeakKeyDictionary()
"""What was found, by processor and image token."""


def _try_words(processor, image_token: int, own: str) -> ImageWord:
    """The first word that gives as many image tokens as the processor puts by itself, or any."""
    holders = (processor, processor.tokenizer)
    named = [str(word) for name in ATTRIBUTES for holder in holders if (word := getattr(holder, name, None))] + [own]
    for start, end in AROUND:
        if hasattr(processor, start) and hasattr(processor, end):
            named.append(f"{getattr(processor, start)}{own}{getattr(processor, end)}")
    by_itself = _count(processor, "a", image_token)
    counts = {word: _count(processor, f"{word}a", image_token) for word in dict.fromkeys(named)}
    for word, n in counts.items():
        # A processor that puts its tokens by itself leaves a word in the text as one token more.
        if n and n == (by_itself or n):
            return ImageWord(word, False)
    if by_itself:
        return ImageWord(own, True)
    raise InputError(
        f"No word makes {type(processor).__name__} put the image token {own!r} ({image_token}) into a prompt; tried: "
        f"{', '.join(map(repr, counts))}.{_failure(processor, f'{own}a')} Give the record an image_word, or the processor "
        "that belongs to the model."
    )


def _failure(processor, text: str) -> str:
    """How the processor fails on a prompt and one image, as a sentence; "" if it does not."""
    try:
        processor(images=[Image.new("RGB", (64, 64))], text=[text], return_tensors="np")
    except Exception as error:  # a processor can raise anything
        return f" On the last it fails ({type(error).__name__}: {error})."
    return ""


def _count(processor, text: str, image_token: int) -> int:
    """How many image tokens the processor makes of a prompt and one image; 0 where it fails."""
    from transformers.utils import logging  # here: a study is opened without transformers

    picture = Image.fromarray(np.full((64, 64, 3), 128, np.uint8))
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # PaliGemma's warns of the missing word that is tried here
    try:
        ids = processor(images=[picture], text=[text], return_tensors="np")["input_ids"]
    except Exception:  # a processor can raise anything at a prompt without its word
        return 0
    finally:
        logging.set_verbosity(level)
    return int((np.asarray(ids) == image_token).sum())
