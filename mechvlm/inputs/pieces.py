"""Tokens as text, by the tokenizer's own decoder.

Each kind of vocabulary has its own way to write a token: byte-level BPE writes bytes as letters
(`Ġ` is a space, `Ã©` an é), SentencePiece `▁` for a space and `<0xC3>` for a byte, WordPiece `##`
where no space stands. Only the tokenizer's decoder reads them all, and only here is it asked.

1. `token_texts` decodes each token behind another one, so that its leading space stays.
2. `spell` puts characters together that are split over several tokens.
"""

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

TOKENIZING = threading.RLock()
"""Held while a tokenizer works: Hugging Face's may be changed by a call, and then fail in another.

A study prepares its next inputs in a thread of their own."""
BROKEN = "\ufffd"
"""Stands for bytes that are no whole character, as in Unicode's own replacement of them."""
LONGEST_SPLIT = 16
"""Tokens over which characters may be split, one running into the next."""


def token_texts(ids: Sequence[int], tokenizer) -> tuple[str, ...]:
    """The text of each token, with the space that it begins with.

    A token with a part of a character holds "\\ufffd" in its place. A token that the decoder leaves
    out is shown as it stands in the vocabulary. Vocabularies are padded: an id past the
    tokenizer's last reads `<id>`.

    >>> token_texts(tokenizer("a red café").input_ids, tokenizer)
    (' a', ' red', ' café')

    Tested: joined, the texts are `tokenizer.decode(ids)`, where no character is split.
    """
    with TOKENIZING:
        size, known = _KNOWN.get(tokenizer, (0, {}))
        if size != len(tokenizer):  # tokens were added
            known = {}
            _KNOWN[tokenizer] = len(tokenizer), known
        if new := [id for id in dict.fromkeys(ids) if id not in known]:
            pieces = tokenizer.convert_ids_to_tokens(new)
            for id, piece, text in zip(new, pieces, _decode([[id] for id in new], tokenizer), strict=True):
                known[id] = f"<{id}>" if piece is None else text or piece
    return tuple(known[id] for id in ids)


_KNOWN: WeakKeyDictionary[Any, tuple[int, dict[int, str]]] = WeakKeyDictionary()
"""By tokenizer: its length, and the texts of its tokens by id, each decoded once."""


def spell(ids: Sequence[int], texts: Sequence[str], tokenizer) -> tuple[str, ...]:
    """The texts of a sequence, with the characters whole that are split over several tokens.

    Of tokens that share a character the first holds their text, and the others hold "". A character
    that stays broken remains "\\ufffd".

    Args:
        ids: of the sequence.
        texts: of each token by itself (`token_texts`).
        tokenizer: that both came from.
    """
    spelled, at = list(texts), 0
    while at < len(ids):
        end = at + 1
        while end < len(ids) and end - at < LONGEST_SPLIT and BROKEN in texts[at] and BROKEN in texts[end]:
            end += 1
            with TOKENIZING:
                (whole,) = _decode([ids[at:end]], tokenizer)
            if BROKEN not in whole:
                spelled[at:end] = [whole] + [""] * (end - at - 1)
                break
        else:
            end = at + 1
        at = end
    return tuple(spelled)


def _decode(groups: Sequence[Sequence[int]], tokenizer) -> list[str]:
    """Each group of tokens decoded, as it reads within a sequence."""
    # Decoders drop the space that a sequence begins with, so each group stands behind a token.
    first = next(iter(tokenizer.all_special_ids), 0)
    as_it_is = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    start = tokenizer.decode([first], **as_it_is)
    decoded = tokenizer.batch_decode([[first, *group] for group in groups], **as_it_is)
    return [text.removeprefix(start) for text in decoded]
