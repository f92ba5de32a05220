"""A tokenizer's pieces as text, for files of earlier versions, which hold no tokenizer."""


def as_text(pieces):
    """Tokens as text out of a tokenizer's pieces, in tuples of any depth; numbers stay as they are.

    For files that hold no tokenizer. `Ġ` and `Ċ` tell byte-level pieces from SentencePiece's.
    """
    from tokenizers import decoders

    marks = set("".join(_strings(pieces)))
    if marks & set("ĠĊ") and "▁" not in marks:
        decoder = decoders.ByteLevel()
    else:
        decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

    def decoded(value):
        if isinstance(value, tuple):
            return tuple(map(decoded, value))
        return decoder.decode([value]) if isinstance(value, str) else value

    return decoded(pieces)


def _strings(value) -> list[str]:
    if isinstance(value, tuple):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []
