"""Confidence intervals of a mean over examples, by the bootstrap."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

N_RESAMPLES = 2000
RESAMPLES_PER_BLOCK = 100
"""Resamples drawn at once: of 100,000 examples, all of them would take gigabytes."""
NUMBERS_PER_CHUNK = 2**23
"""Resampled means in memory at once, 64 MB of them: a large `rest` is worked off in chunks."""


class Interval(NamedTuple):
    """A mean over examples, and the ends of its confidence interval."""

    mean: Float[Tensor, "*rest"]
    low: Float[Tensor, "*rest"]
    high: Float[Tensor, "*rest"]


def mean_interval(values: Float[Tensor, "example *rest"], level: float = 0.95, seed: int = 0) -> Interval:
    """The mean over examples and its percentile bootstrap interval.

    Each of 2000 resamples draws as many examples as there are, with replacement. The interval holds
    the middle `level` of the resamples' means. All entries of `rest` share the same draws.

    An entry's NaN examples are left out of its mean. With fewer than two examples left the entry
    has no interval (low = high = NaN), and with none no mean.

    >>> mean_interval(torch.tensor([1.0, 2.0, 3.0])).mean
    tensor(2.)

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", ch. 13.
    Tested: equals scipy.stats.bootstrap.

    Args:
        values: one value per example, or a tensor of them.
        level: share of the resampled means inside the interval, between 0 and 1.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        `Interval(mean, low, high)`, each [*rest], in the unit and dtype of `values`, on the CPU.

    Raises:
        ValueError: for a level that is not between 0 and 1, or no example.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} was asked for; it is a share between 0 and 1, such as 0.95.")
    if values.ndim == 0 or len(values) == 0:
        raise ValueError("There is no example to take a mean of.")
    n, rest = len(values), values.shape[1:]
    x = values.detach().cpu().double().numpy().reshape(n, -1)
    is_number = ~np.isnan(x)
    x = np.where(is_number, x, 0.0)
    # How often each resample draws each example, [resample example] per block. The mean of a
    # resample is then a matrix product. A byte holds the count: it never comes near 256.
    rng, blocks = np.random.default_rng(seed), range(0, N_RESAMPLES, RESAMPLES_PER_BLOCK)
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES_PER_BLOCK).astype(np.uint8) for _ in blocks]
    low, high = np.full((2, x.shape[1]), np.nan)
    tail = 100 * (1 - level) / 2
    with np.errstate(invalid="ignore"):
        mean = x.sum(0) / is_number.sum(0)
        columns = np.flatnonzero(is_number.sum(0) > 1)
        for start in range(0, len(columns), NUMBERS_PER_CHUNK // N_RESAMPLES):
            chunk = columns[start : start + NUMBERS_PER_CHUNK // N_RESAMPLES]
            # [resample column]; NaN where a resample drew only NaN examples.
            means = np.concatenate(
                [(w @ x[:, chunk]) / (w @ is_number[:, chunk]) for w in (block.astype(float) for block in counts)]
            )
            # nanpercentile is slow, and seldom needed.
            percentile = np.nanpercentile if np.isnan(means).any() else np.percentile
            low[chunk], high[chunk] = percentile(means, [tail, 100 - tail], axis=0)
    return Interval(*(torch.from_numpy(a).reshape(rest).to(values.dtype) for a in (mean, low, high)))
