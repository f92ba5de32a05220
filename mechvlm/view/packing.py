"""Numbers and pictures packed into a page: small as text, and quick to read with what a browser has built in."""

import base64
import gzip
import io
import json

import numpy as np
from PIL import Image

LEVELS = (255, 127, 63, 31)
"""Steps of a single head's rows: the finest with which a query stays within `ROW_ROOM`. Off by at most 0.2 to 1.6 %."""
ROW_ROOM = 560_000
"""Characters of the page that one query's rows may take up."""
IMAGE_SIDE = 1024
"""Longer side in pixels to which larger images are reduced."""


def pack(*arrays: np.ndarray) -> str:
    """The arrays' bytes behind each other, little-endian, through gzip and base64."""
    data = b"".join(np.ascontiguousarray(a.astype(a.dtype.newbyteorder("<"))).tobytes() for a in arrays)
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def steps(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(x / max) of each row (the last axis) in whole steps of 1/255, and the rows' maxima; x is back as max (step / 255)².

    Off by at most 0.4 % of the maximum, and finer towards 0: it keeps small values apart that one large value would level.
    """
    share, top = _share(x)
    return np.rint(255 * np.sqrt(share)).astype(np.uint8), top


def _share(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top = x.max(-1, keepdims=True)
    return np.divide(x, top, out=np.zeros_like(x), where=top > 0), top[..., 0].astype(np.float32)


def pack_rows(raw: np.ndarray, norm: np.ndarray, parts: list[slice], groups: list[np.ndarray]) -> tuple[str, int]:
    """One query's rows, [layer, 1 + head, src] with all heads together first; and in how many steps single heads are stored.

    Each of the `parts` of the sources has a maximum of its own: one large weight on `<s>` would level the image. All heads
    together are stored by `steps`; single heads, nearly all of the bytes, in equal steps, with which the many small values
    of a row become zeros that take no room. Their norms are stored as what they differ from the weights. The shares of the
    `groups` in each row stand beside them, because steps that are summed would not give them exactly.

    Order: maxima f4 [2 layer 1+head part], shares u2 [2 layer 1+head group], all heads u1 [2 layer src], weights u1
    [layer head src], norms less weights modulo 256 u1 [layer head src].
    """
    both = np.stack([raw, norm])
    total = both.sum(-1, keepdims=True)
    share = np.stack([both[..., g].sum(-1) for g in groups], -1)
    share = np.rint(65535 * np.divide(share, total, out=np.zeros_like(share), where=total > 0)).astype(np.uint16)
    relative, top = zip(*[_share(both[..., part]) for part in parts], strict=True)
    together = np.concatenate([steps(both[:, :, 0, part])[0] for part in parts], -1)
    heads = np.concatenate(relative, -1)[:, :, 1:]
    for levels in LEVELS:
        weights, norms = np.rint(levels * heads).astype(np.uint8)
        packed = pack(np.stack(top, -1), share, together, weights, norms - weights)
        if len(packed) <= ROW_ROOM:
            break
    return packed, levels


def pack_words(tokens: np.ndarray, probs: np.ndarray, pieces: dict[int, str]) -> str:
    """Top-k tokens [layer, point, k] as codes into a list of their pieces, the commonest first; their probabilities; the list.

    Order: codes in three planes of bytes, low to high, u1 [3 layer k point]; sqrt(probability) in steps of 1/255 u1 [layer k
    point]; the pieces as JSON.
    """
    ids, code, count = np.unique(tokens, return_inverse=True, return_counts=True)
    order = np.argsort(-count, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    codes = rank[code.reshape(tokens.shape)].transpose(0, 2, 1)
    planes = np.stack([codes >> shift & 255 for shift in (0, 8, 16)]).astype(np.uint8)
    chances = np.rint(255 * np.sqrt(probs.clip(0, 1))).astype(np.uint8).transpose(0, 2, 1)
    words = json.dumps([pieces[int(i)] for i in ids[order]]).encode()
    return pack(planes, chances, np.frombuffer(words, np.uint8))


def picture(image: Image.Image) -> str:
    """The image as a data address, at most `IMAGE_SIDE` pixels a side: PNG or JPEG, whichever is smaller."""
    small = image.convert("RGB")
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
    made = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 82, "optimize": True})):
        file = io.BytesIO()
        small.save(file, kind, **options)
        made.append((len(file.getvalue()), f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"))
    return min(made)[1]
