"""Numbers and images packed into a page as short text, which a browser unpacks by itself.

1. Values become whole steps of their row's maximum, one byte each (`to_steps`, `pack_rows`).
2. The bytes are compressed with gzip and written as base64 (`pack`).
3. Images become PNG or JPEG data URLs (`data_url`).
"""

import base64
import io
import json
import zlib

import numpy as np
from PIL import Image

LEVELS = (255, 127, 63, 31, 23)
"""Steps that a single head's row may be stored in, finest first: the first with which a
destination's rows stay within their room is taken. Values are off by at most 0.2 to 2.2 % of their
row's maximum."""
ROW_ROOM, SMALL_ROW_ROOM = 560_000, 180_000
"""Characters that the packed rows of one destination may take up on a page, of few and of many."""
ROWS_ROOM = 11_000_000
"""Characters that destinations share: of more than 19 each has less room, down to the smaller."""
IMAGE_SIDE = 1024
"""Larger images are reduced to this many pixels on their longer side."""


def row_room(n_dest: int) -> int:
    """Characters that the rows of each of `n_dest` destinations may take up."""
    return max(SMALL_ROW_ROOM, min(ROW_ROOM, ROWS_ROOM // max(1, n_dest)))


def pack(*arrays: np.ndarray, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> str:
    """The arrays' bytes one after the other, little-endian, through gzip and base64.

    `strategy` is zlib's: numbers without repeats get smaller where it does not look for any.
    """
    data = b"".join(np.ascontiguousarray(a.astype(a.dtype.newbyteorder("<"))).tobytes() for a in arrays)
    coder = zlib.compressobj(6, zlib.DEFLATED, 31, 9, strategy)
    return base64.b64encode(coder.compress(data) + coder.flush()).decode()


def to_steps(x: np.ndarray, levels: int = 255) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(x / max) of each row (last axis) in whole steps of 1/levels, and the rows' maxima.

    The values come back as max · (step / levels)². They are off by at most 0.4 % of the maximum,
    0.8 % for 127 levels, and by less towards 0: the square root keeps small values apart beside one
    large value.
    """
    share, top = _share_of_max(x)
    return np.rint(levels * np.sqrt(share)).astype(np.uint8), top


def to_planes(x: np.ndarray) -> np.ndarray:
    """32-bit floats, rounded to 16 digits of their fraction, in three planes of bytes, low to high.

    Bytes of the same place are alike, and get smaller together.
    """
    bits = np.ascontiguousarray(x, "<f4").view("<u4").ravel() + np.uint32(0x80)
    return bits.view(np.uint8).reshape(-1, 4)[:, 1:].T


def _share_of_max(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x / max of each row (last axis), 0 where the maximum is 0; and the rows' maxima."""
    top = x.max(-1, keepdims=True)
    return np.divide(x, top, out=np.zeros_like(x), where=top > 0), top[..., 0].astype(np.float32)


def without_zeros(*steps: np.ndarray) -> tuple[np.ndarray, ...]:
    """How many zeros lie before each value, and the values where any of the arrays is not 0.

    A gap of 255 stands for as many zeros without a value behind them.

    >>> without_zeros(np.array([0, 0, 7, 1], np.uint8))
    (array([2, 0], dtype=uint8), array([7, 1], dtype=uint8))
    """
    flat = [x.ravel() for x in steps]
    at = np.flatnonzero(np.any(flat, axis=0))
    gaps = np.diff(at, prepend=-1) - 1
    long = gaps // 255
    # Each value's gap comes behind its runs of 255 zeros.
    coded = np.full(len(gaps) + long.sum(), 255, np.uint8)
    coded[np.cumsum(long + 1) - 1] = gaps % 255
    return coded, *(x[at] for x in flat)


def pack_rows(
    raw: np.ndarray, norm: np.ndarray, parts: list[slice], groups: list[np.ndarray], room: int = ROW_ROOM
) -> tuple[str, int]:
    """One destination's rows, packed; and the number of steps in which single heads are stored.

    Each of the `parts` of the sources has a maximum of its own: one large weight on `<s>` would
    otherwise flatten the image. All heads together are stored by `to_steps`, in 255 levels, or 127
    where single heads have fewer than 255. Single heads are
    nearly all of the bytes. They are stored in equal steps, in which the many small values of a row
    become zeros that are only counted (`without_zeros`). Norms are stored as their difference from
    the weights. The share of each of the `groups` in each row is stored too, because a sum of steps
    would not give it exactly.

    Order of the bytes, where 2 stands for weights and norms, u1 and u2 are unsigned integers of one
    and two bytes and f4 is a 32-bit float:
        numbers of gaps and of values u4 [2];
        maxima u1 [3 | 2 layer 1+head part], by `to_planes`;
        shares u1 [2 | 2 layer 1+head group], u2 in two planes of bytes, low to high;
        all heads u1 [2 layer src];
        gaps u1, counted through [layer head src];
        weights u1, of each value;
        norms less weights, modulo 256, u1, likewise.

    Args:
        raw: attention weights [layer, 1 + head, src], with all heads together first.
        norm: norms, in the same order.
        parts: slices of the sources.
        groups: numbers of the sources in each group.
        room: characters that they may take up.
    """
    both = np.stack([raw, norm])
    total = both.sum(-1, keepdims=True)
    share = np.stack([both[..., g].sum(-1) for g in groups], -1)
    share = np.rint(65535 * np.divide(share, total, out=np.zeros_like(share), where=total > 0)).astype(np.uint16)
    relative, top = zip(*[_share_of_max(both[..., part]) for part in parts], strict=True)
    maxima, shares = to_planes(np.stack(top, -1)), np.stack([share & 255, share >> 8]).astype(np.uint8)
    heads = np.concatenate(relative, -1)[:, :, 1:]
    for levels in LEVELS:
        fine = 255 if levels == 255 else 127
        together = np.concatenate([to_steps(both[:, :, 0, part], fine)[0] for part in parts], -1)
        weights, norms = np.rint(levels * heads).astype(np.uint8)
        gaps, *values = without_zeros(weights, norms - weights)
        sizes = np.array([len(gaps), len(values[0])], np.uint32)
        packed = pack(sizes, maxima, shares, together, gaps, *values, strategy=zlib.Z_RLE)
        if len(packed) <= room:
            break
    return packed, levels


def pack_words(tokens: np.ndarray, probs: np.ndarray, vocabulary: dict[int, str]) -> str:
    """The lens's top-k tokens and probabilities, packed with the list of the tokens' strings.

    A token is stored as its number in that list, which starts with the most common token.

    Order of the bytes:
        token numbers u1 [3 layer k point], in three planes of bytes, low to high;
        sqrt(probability) in steps of 1/255, u1 [layer k point];
        the list of strings, as JSON.

    Args:
        tokens: token ids [layer, point, k].
        probs: their probabilities [layer, point, k].
        vocabulary: each id's string.
    """
    ids, code, count = np.unique(tokens, return_inverse=True, return_counts=True)
    order = np.argsort(-count, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    codes = rank[code.reshape(tokens.shape)].transpose(0, 2, 1)
    planes = np.stack([codes >> shift & 255 for shift in (0, 8, 16)]).astype(np.uint8)
    chances = np.rint(255 * np.sqrt(probs.clip(0, 1))).astype(np.uint8).transpose(0, 2, 1)
    words = json.dumps([vocabulary[int(i)] for i in ids[order]]).encode()
    return pack(planes, chances, np.frombuffer(words, np.uint8))


def data_url(image: Image.Image) -> str:
    """The image as a data URL, at most `IMAGE_SIDE` pixels a side; the shorter of PNG and JPEG."""
    small = image.convert("RGB")
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
    urls = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 82, "optimize": True})):
        file = io.BytesIO()
        small.save(file, kind, **options)
        urls.append((len(file.getvalue()), f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"))
    return min(urls)[1]
