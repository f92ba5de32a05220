"""Numbers and images packed into a page as short text, which a browser unpacks by itself.

1. Values become whole steps of their row's maximum, one byte each (`to_steps`, `pack_rows`).
2. The bytes are compressed with gzip and written as base64 (`pack`).
3. Images become PNG or JPEG data URLs (`data_url`).
"""

import base64
import gzip
import io
import json

import numpy as np
from PIL import Image

LEVELS = (255, 127, 63, 31)
"""Steps that a single head's row may be stored in, finest first: the first with which a
destination's rows stay within `ROW_ROOM` is taken. Values are off by at most 0.2 to 1.6 % of their
row's maximum."""
ROW_ROOM = 560_000
"""Characters that the packed rows of one destination may take up on a page."""
IMAGE_SIDE = 1024
"""Larger images are reduced to this many pixels on their longer side."""


def pack(*arrays: np.ndarray) -> str:
    """The arrays' bytes one after the other, little-endian, through gzip and base64."""
    data = b"".join(np.ascontiguousarray(a.astype(a.dtype.newbyteorder("<"))).tobytes() for a in arrays)
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def to_steps(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(x / max) of each row (last axis) in whole steps of 1/255, and the rows' maxima.

    The values come back as max · (step / 255)². They are off by at most 0.4 % of the maximum, and
    by less towards 0: the square root keeps small values apart beside one large value.
    """
    share, top = _share_of_max(x)
    return np.rint(255 * np.sqrt(share)).astype(np.uint8), top


def _share_of_max(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x / max of each row (last axis), 0 where the maximum is 0; and the rows' maxima."""
    top = x.max(-1, keepdims=True)
    return np.divide(x, top, out=np.zeros_like(x), where=top > 0), top[..., 0].astype(np.float32)


def pack_rows(raw: np.ndarray, norm: np.ndarray, parts: list[slice], groups: list[np.ndarray]) -> tuple[str, int]:
    """One destination's rows, packed; and the number of steps in which single heads are stored.

    Each of the `parts` of the sources has a maximum of its own: one large weight on `<s>` would
    otherwise flatten the image. All heads together are stored by `to_steps`. Single heads are
    nearly all of the bytes. They are stored in equal steps, in which the many small values of a row
    become zeros that compress to almost nothing. Norms are stored as their difference from the
    weights. The share of each of the `groups` in each row is stored too, because a sum of steps
    would not give it exactly.

    Order of the bytes, where 2 stands for weights and norms, u1 and u2 are unsigned integers of one
    and two bytes and f4 is a 32-bit float:
        maxima f4 [2 layer 1+head part];
        shares u2 [2 layer 1+head group];
        all heads u1 [2 layer src];
        weights u1 [layer head src];
        norms less weights, modulo 256, u1 [layer head src].

    Args:
        raw: attention weights [layer, 1 + head, src], with all heads together first.
        norm: norms, in the same order.
        parts: slices of the sources.
        groups: numbers of the sources in each group.
    """
    both = np.stack([raw, norm])
    total = both.sum(-1, keepdims=True)
    share = np.stack([both[..., g].sum(-1) for g in groups], -1)
    share = np.rint(65535 * np.divide(share, total, out=np.zeros_like(share), where=total > 0)).astype(np.uint16)
    relative, top = zip(*[_share_of_max(both[..., part]) for part in parts], strict=True)
    together = np.concatenate([to_steps(both[:, :, 0, part])[0] for part in parts], -1)
    heads = np.concatenate(relative, -1)[:, :, 1:]
    for levels in LEVELS:
        weights, norms = np.rint(levels * heads).astype(np.uint8)
        packed = pack(np.stack(top, -1), share, together, weights, norms - weights)
        if len(packed) <= ROW_ROOM:
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
