"""Packing: what comes back of any numbers and any words."""

import base64
import gzip
import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mechvlm.view.packing import pack, pack_rows, pack_words, to_steps, without_zeros

shares = st.floats(0, 1, width=32)


def unpacked(text: str) -> bytes:
    return gzip.decompress(base64.b64decode(text))


@given(arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 7)), elements=shares))
def test_arrays_come_back_byte_for_byte(x):
    data = unpacked(pack(x, x.T, x.astype(">f8")))
    size = 4 * x.size
    assert np.array_equal(np.frombuffer(data[:size], "<f4").reshape(x.shape), x)
    assert np.array_equal(np.frombuffer(data[size : 2 * size], "<f4").reshape(x.T.shape), x.T)
    assert np.array_equal(np.frombuffer(data[2 * size :], "<f8").reshape(x.shape), x)


@given(arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=shares))
def test_steps_are_near_their_values(x):
    steps, top = to_steps(x)
    back = top[:, None] * (steps / 255.0) ** 2
    assert (abs(back - x) <= 0.004 * top[:, None] + 1e-7).all()
    assert (back[x == x.max(-1, keepdims=True)] == np.repeat(top, (x == x.max(-1, keepdims=True)).sum(-1))).all()


def filled(gaps: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """What `without_zeros` left out, put back one by one."""
    out, at, taken = np.zeros((len(values), length), np.uint8), 0, 0
    for gap in gaps.tolist():
        at += gap
        if gap < 255:
            out[:, at] = values[:, taken]
            at, taken = at + 1, taken + 1
    assert taken == values.shape[1]
    return out


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255), st.integers(0, 255)), max_size=9))
def test_zeros_are_counted(runs):
    """Long runs of zeros, values of 0 in one array alone, and zeros at the end."""
    first = np.concatenate([np.zeros(0, np.uint8), *(np.array([0] * n + [a], np.uint8) for n, a, _ in runs)])
    second = np.concatenate([np.zeros(0, np.uint8), *(np.array([0] * n + [b], np.uint8) for n, _, b in runs)])
    gaps, *values = without_zeros(first, second)
    assert np.array_equal(filled(gaps, np.stack(values), len(first)), np.stack([first, second]))
    assert not any((a, b) == (0, 0) for a, b in zip(*values, strict=True))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(3, 8), st.integers(0, 10))
def test_rows_come_back_layer_by_layer(n_layers, n_heads, n_src, seed):
    rng = np.random.default_rng(seed)
    raw, norm = rng.random((2, n_layers, 1 + n_heads, n_src)).astype(np.float32)
    parts, groups = [slice(0, 2), slice(2, n_src)], [np.array([0]), np.arange(1, n_src)]
    text, levels = pack_rows(raw, norm, parts, groups)
    data, at = unpacked(text), 0

    def take(dtype, *shape):
        nonlocal at
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        at += size
        return np.frombuffer(data[at - size : at], dtype).reshape(shape)

    both = np.stack([raw, norm])
    n_gaps, n_values = take("<u4", 2)
    planes = take("u1", 3, 2, n_layers, 1 + n_heads, 2).astype(np.uint32)
    top = (planes[0] << 8 | planes[1] << 16 | planes[2] << 24).view("f4")
    low, high = take("u1", 2, 2, n_layers, 1 + n_heads, 2).astype(int)
    share = (low + 256 * high) / 65535
    together = take("u1", 2, n_layers, n_src)
    gaps, values = take("u1", n_gaps), take("u1", 2, n_values)
    assert at == len(data)
    weights, difference = filled(gaps, values, n_layers * n_heads * n_src).reshape(2, n_layers, n_heads, n_src)
    for number, part in enumerate(parts):
        np.testing.assert_allclose(top[..., number], both[..., part].max(-1), rtol=2**-16)
        most = top[:, :, 0, number, None]
        np.testing.assert_allclose(most * (together[..., part] / 255) ** 2, both[:, :, 0, part], atol=0.004)
        for measure, steps in enumerate((weights, weights + difference)):
            back = top[measure, :, 1:, number, None] * steps[..., part] / levels
            np.testing.assert_allclose(back, both[measure, :, 1:, part], atol=0.6 / levels)
    for number, group in enumerate(groups):
        np.testing.assert_allclose(share[..., number], both[..., group].sum(-1) / both.sum(-1), atol=1e-5)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.lists(st.text(), min_size=1, max_size=6), st.data())
def test_words_come_back(n_layers, n_points, k, words, data):
    ids = data.draw(arrays(np.int64, (n_layers, n_points, k), elements=st.integers(0, len(words) - 1)))
    probs = np.linspace(0, 1, ids.size).reshape(ids.shape)
    text = unpacked(pack_words(ids, probs, {i: word for i, word in enumerate(words)}))
    planes = np.frombuffer(text[: 3 * ids.size], "u1").reshape(3, n_layers, k, n_points).astype(int)
    chances = np.frombuffer(text[3 * ids.size : 4 * ids.size], "u1").reshape(n_layers, k, n_points)
    listed = json.loads(text[4 * ids.size :])
    codes = planes[0] + 256 * planes[1] + 65536 * planes[2]
    for layer, point, place in np.ndindex(*ids.shape):
        assert listed[codes[layer, place, point]] == words[ids[layer, point, place]]
    np.testing.assert_allclose((chances / 255) ** 2, probs.transpose(0, 2, 1), atol=0.004)
