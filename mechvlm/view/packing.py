"""Numbers and pictures packed into a page: small as text, and quick to read with what a browser has built in."""

import base64
import gzip
import io

import numpy as np
from PIL import Image

LEVELS = 255
"""Steps in which square roots are stored: an error of at most 0.4 % of the maximum."""
HEAD_LEVELS = (255, 127, 63, 31)
"""For single heads, the finest of these with which a query's rows stay within `ROWS`; with 31, at most 3.2 %."""
ROWS = 520_000
"""Characters that one query's rows may take up on the page before they are stored in coarser steps."""
SIDE = 1024
"""Longer side in pixels to which larger images are reduced."""


def pack(*arrays: np.ndarray) -> str:
    """The arrays' bytes behind each other, little-endian, through gzip and base64."""
    data = b"".join(np.ascontiguousarray(a.astype(a.dtype.newbyteorder("<"))).tobytes() for a in arrays)
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def quantise(x: np.ndarray, levels: int = LEVELS) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(x / max) of each row (the last axis) in whole steps of 1 / levels, and the rows' maxima.

    x is back as maximum * (steps / levels)². The square root keeps small values apart that one large value would level.
    """
    top = x.max(-1, keepdims=True)
    steps = np.rint(levels * np.sqrt(np.divide(x, top, out=np.zeros_like(x), where=top > 0)))
    return steps.astype(np.uint8), top[..., 0].astype(np.float32)


def pack_rows(raw: np.ndarray, norm: np.ndarray, parts: list[slice], groups: list[np.ndarray]) -> tuple[str, int]:
    """One query's rows, [layer, 1 + head, src] with all heads together first, and the levels of the single heads.

    Each of the `parts` of the sources has a maximum of its own: one large weight on `<s>` would level the image. The
    shares of the `groups` in each row are stored beside it, because steps that are summed would not give them exactly.
    Per-head norms are stored as what their steps differ from those of the weights.

    Order: maxima f4 [2 layer 1+head part], shares u2 [2 layer 1+head group], all heads u1 [2 layer src], weights u1
    [layer head src], norms less weights u1 [layer head src].
    """
    both = np.stack([raw, norm])
    total = both.sum(-1, keepdims=True)
    share = np.stack([both[..., g].sum(-1) for g in groups], -1)
    share = np.rint(65535 * np.divide(share, total, out=np.zeros_like(share), where=total > 0)).astype(np.uint16)
    top = np.stack([quantise(both[..., part])[1] for part in parts], -1)
    steps = np.concatenate([quantise(both[:, :, 0, part])[0] for part in parts], -1)
    for levels in HEAD_LEVELS:
        heads = np.concatenate([quantise(both[:, :, 1:, part], levels)[0] for part in parts], -1)
        packed = pack(top, share, steps, heads[0], heads[1] - heads[0])  # modulo 256
        if len(packed) <= ROWS:
            break
    return packed, levels


def pack_words(tokens: np.ndarray, probs: np.ndarray, pieces: dict[int, str]) -> tuple[str, list[str]]:
    """Top-k tokens [layer, point, k] as codes into a list of their pieces, the commonest first; and that list.

    Order: codes in three planes of bytes, low to high, u1 [3 layer k point]; square roots of probabilities u1 [layer k point].
    """
    ids, code, count = np.unique(tokens, return_inverse=True, return_counts=True)
    order = np.argsort(-count, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    codes = rank[code.reshape(tokens.shape)].transpose(0, 2, 1)
    planes = np.stack([codes >> shift & 255 for shift in (0, 8, 16)]).astype(np.uint8)
    steps = np.rint(LEVELS * np.sqrt(probs.clip(0, 1))).astype(np.uint8).transpose(0, 2, 1)
    return pack(planes, steps), [pieces[int(i)] for i in ids[order]]


def picture(image: Image.Image) -> str:
    """The image as a data address, at most `SIDE` pixels a side: PNG or JPEG, whichever is smaller."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    made = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 82, "optimize": True})):
        file = io.BytesIO()
        small.save(file, kind, **options)
        made.append((len(file.getvalue()), f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"))
    return min(made)[1]
