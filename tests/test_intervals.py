"""The interval of a mean: equal to scipy's bootstrap, with its nominal coverage, without NaN."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from mechvlm import intervals
from mechvlm.intervals import mean_interval


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_scipys_percentile_bootstrap():
    values = normal(40, 3, 2) * torch.tensor([1.0, 5.0]) + 2
    got = mean_interval(values, level=0.9)
    scipys = bootstrap(
        (values.numpy(),), np.mean, axis=0, confidence_level=0.9, method="percentile", n_resamples=9999,
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    torch.testing.assert_close(got.mean, values.mean(0))
    # Both are estimates by random draws. They differ by the noise of 2000 draws, far less than the
    # intervals' widths of 0.5 and 2.6.
    tolerance = torch.tensor([0.03, 0.15]).expand(3, 2)
    for end, scipys_end in ((got.low, scipys.low), (got.high, scipys.high)):
        assert ((end - torch.from_numpy(scipys_end)).abs() < tolerance).all()
    assert got.low.shape == (3, 2)
    assert got.low.dtype == torch.float32


def test_95_percent_of_intervals_hold_the_mean():
    """1000 experiments of 50 draws from a distribution with mean 1, skewed as probabilities are."""
    values = -torch.log(torch.rand(50, 1000, generator=torch.Generator().manual_seed(0)))
    got = mean_interval(values)
    share = ((got.low <= 1) & (got.high >= 1)).float().mean()
    # The percentile bootstrap of a skewed sample of 50 is known to fall a little short.
    assert 0.90 < share < 0.97


def test_the_same_at_every_call_and_in_chunks(monkeypatch):
    values = normal(10, 7)
    first = mean_interval(values)
    assert all(torch.equal(a, b) for a, b in zip(first, mean_interval(values), strict=True))
    monkeypatch.setattr(intervals, "NUMBERS_PER_CHUNK", 2 * intervals.N_RESAMPLES)
    for a, b in zip(first, mean_interval(values), strict=True):
        torch.testing.assert_close(a, b)


def test_the_seed_decides_the_draws():
    values = normal(10, 7)
    by_seed = [mean_interval(values, seed=seed) for seed in (0, 1)]
    assert torch.equal(by_seed[0].low, mean_interval(values).low), "0 by default"
    assert torch.equal(by_seed[0].mean, by_seed[1].mean)
    assert not torch.equal(by_seed[0].low, by_seed[1].low)


@given(st.integers(2, 12), st.floats(-3, 3), st.floats(-5, 5), st.integers(0, 5))
@settings(max_examples=15)
def test_an_interval_moves_and_scales_with_its_values(n, scale, shift, seed):
    """The draws are of examples, whatever their values: a factor below 0 exchanges the ends."""
    values = normal(n, 3, seed=seed).double()
    plain, moved = mean_interval(values, seed=seed), mean_interval(scale * values + shift, seed=seed)
    low, high = (plain.low, plain.high) if scale >= 0 else (plain.high, plain.low)
    for got, want in zip(moved, (plain.mean, low, high), strict=True):
        torch.testing.assert_close(got, scale * want + shift)
    # Units are whole examples: columns of the same examples share their draws.
    both = mean_interval(values[:, :1].repeat(1, 2), seed=seed)
    assert torch.equal(both.low[0], both.low[1])


def test_nan_examples_are_left_out():
    values = normal(12, 4)
    values[3:, 1] = torch.nan
    values[1:, 2] = torch.nan
    values[:, 3] = torch.nan
    got = mean_interval(values)
    torch.testing.assert_close(got.mean[:3], torch.stack([values[:, 0].mean(), values[:3, 1].mean(), values[0, 2]]))
    assert got.low[1] <= got.mean[1] <= got.high[1]
    assert values[:3, 1].min() <= got.low[1] < got.high[1] <= values[:3, 1].max()
    assert got.low.isnan().tolist() == got.high.isnan().tolist() == [False, False, True, True]
    assert got.mean[3].isnan()


def test_one_example_has_no_interval():
    got = mean_interval(torch.tensor([3.0]))
    assert got.mean == 3
    assert got.low.isnan()
    assert got.high.isnan()


def test_32_layers_of_32_heads_take_no_time():
    started = time.process_time()
    mean_interval(normal(50, 32, 32))
    assert time.process_time() - started < 5  # 0.1 s on one idle core


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match=r"level=95.0 was asked for"):
        mean_interval(torch.zeros(3), level=95.0)
    with pytest.raises(ValueError, match="no example"):
        mean_interval(torch.zeros(0, 3))
