"""Rankings of heads, the elbow of a curve, and the entropy of a map's bright regions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from mechvlm.measures.heads import elbow, rank_heads, spatial_entropy


def test_heads_by_their_mean_and_ties_by_layer_and_head():
    values = torch.tensor([[[0.1, 0.6, 0.2], [0.6, 0.3, 0.9]], [[0.3, 0.4, 0.2], [0.4, 0.3, 0.7]]])
    table = rank_heads(values, 4, "share")
    assert table[["layer", "head"]].to_numpy().tolist() == [[1, 2], [0, 1], [1, 0], [1, 1]]
    assert np.allclose(table["share"], [0.8, 0.5, 0.5, 0.3])
    assert len(rank_heads(values, 99, "share")) == 6
    with pytest.raises(ValueError, match="top=0 was asked for: at least 1 head"):
        rank_heads(values, 0, "share")


def test_intervals_are_those_of_scipy():
    values = torch.rand(40, 2, 3, generator=torch.Generator().manual_seed(3))
    first = rank_heads(values, 1, "share").iloc[0]
    own = values[:, int(first["layer"]), int(first["head"])].double().numpy()
    wanted = bootstrap((own,), np.mean, confidence_level=0.95, method="percentile", n_resamples=20_000, rng=1)
    assert first["share"] == pytest.approx(own.mean(), abs=1e-6)
    assert [first["low"], first["high"]] == pytest.approx(wanted.confidence_interval, abs=0.01)


def test_a_head_without_numbers_comes_last():
    values = torch.tensor([[[torch.nan, -2.0], [-1.0, torch.nan]]])
    assert rank_heads(values, 4, "x")[["layer", "head"]].to_numpy().tolist() == [[1, 0], [0, 1], [0, 0], [1, 1]]


def test_the_elbow_separates_two_levels():
    """Many heads at one level and few above it: the curve bends at the best of the many."""
    low, high = torch.linspace(0.10, 0.12, 100), torch.linspace(0.6, 0.9, 8)
    assert elbow(torch.cat([low, high])) == pytest.approx(0.12)
    assert elbow(torch.tensor([0.3, 0.3, 0.3])) == pytest.approx(0.3)
    assert elbow(torch.tensor([0.1, 0.9])) == pytest.approx(0.9)
    # By hand: points (0, 1), (1/3, 0.5), (2/3, 0.1), (1, 0); x + y - 1 is -1/6 and -7/30.
    assert elbow(torch.tensor([0.0, 5.0, 10.0, 1.0])) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no value"):
        elbow(torch.tensor([]))


@given(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=30), st.floats(0.125, 8, width=32), st.integers(-3, 3))
def test_the_elbow_moves_with_scale_and_shift(values, scale, shift):
    curve = torch.tensor(values, dtype=torch.float64)
    # Values that a shift would merge decide no elbow.
    curve = (curve * 64).round() / 64
    assert elbow((curve * scale + shift).double()) == pytest.approx(elbow(curve) * scale + shift, abs=1e-6)
    assert elbow(curve.flip(0)) == elbow(curve)


def test_entropy_by_hand():
    single, two, corner, three = torch.zeros(4, 5, 7)
    single[1:3, 2:4] = 1
    two[0, 0:2] = two[4, 5:7] = 1
    corner[1, 1] = corner[2, 2] = 1  # diagonals connect
    three[0, 0:2] = three[2, 3] = three[4, 6] = 1
    assert spatial_entropy(torch.stack([single, two, corner])).tolist() == pytest.approx([0, math.log(2), 0])
    assert float(spatial_entropy(three)) == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4))
    assert float(spatial_entropy(torch.full((3, 4), 0.2))) == math.inf


def flood(bright):
    """Areas of the regions, by a flood fill."""
    left, areas = {tuple(cell) for cell in bright.nonzero().tolist()}, []
    while left:
        queue, size = [left.pop()], 0
        while queue:
            row, col = queue.pop()
            size += 1
            near = {(row + i, col + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            queue += near
        areas.append(size)
    return areas


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 9))
def test_entropy_equals_a_flood_fills(seed, rows, cols):
    maps = torch.rand(2, 3, rows, cols, generator=torch.Generator().manual_seed(seed))
    got = spatial_entropy(maps)
    for i in range(2):
        for j in range(3):
            areas = flood(maps[i, j] > maps[i, j].mean())
            shares = [area / sum(areas) for area in areas]
            assert float(got[i, j]) == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-5)
    assert torch.allclose(spatial_entropy(maps.flip(-1)), got), "a mirrored map is as scattered"
