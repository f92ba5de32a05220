"""Confidence intervals of a mean over examples, by the bootstrap."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

N_RESAMPLES = 2000
RESAMPLES_PER_BLOCK = 100
"""Resamples whose draws are numbers of eight bytes at once: with a hundred thousand examples all of them would take gigabytes."""
NUMBERS_PER_CHUNK = 2**23
"""Numbers that the resampled means may take up at once (64 MB): a large `rest` is worked off in chunks."""


class Interval(NamedTuple):
    """A mean over examples, and the ends of its confidence interval."""

    mean: Float[Tensor, "*rest"]
    low: Float[Tensor, "*rest"]
    high: Float[Tensor, "*rest"]


def mean_interval(values: Float[Tensor, "example *rest"], level: float = 0.95, seed: int = 0) -> Interval:
    """The mean over examples and its percentile bootstrap interval, in the unit of `values`; the same for the same seed.

    Examples are drawn with replacement, as many as there are, 2000 times; the interval holds the middle `level` of the
    means. All entries of `rest` see the same draws. An entry's NaN examples are left out of its mean; of fewer than two
    there is no interval (low = high = NaN), and of none no mean.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", ch. 13. Tested: equals scipy.stats.bootstrap.

    Raises:
        ValueError: for a level that is not between 0 and 1, or no example.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} was asked for; it is a share between 0 and 1, such as 0.95.")
    if values.ndim == 0 or len(values) == 0:
        raise ValueError("There is no example to take a mean of.")
    n, rest = len(values), values.shape[1:]
    x = values.detach().cpu().double().numpy().reshape(n, -1)
    seen = ~np.isnan(x)
    x = np.where(seen, x, 0.0)
    # How often each draw holds each example (a byte: never 256 times): its mean is then a matrix product.
    rng, pieces = np.random.default_rng(seed), range(0, N_RESAMPLES, RESAMPLES_PER_BLOCK)
    draws = [rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES_PER_BLOCK).astype(np.uint8) for _ in pieces]
    low, high = np.full((2, x.shape[1]), np.nan)
    tail = 100 * (1 - level) / 2
    with np.errstate(invalid="ignore"):
        mean = x.sum(0) / seen.sum(0)
        columns = np.flatnonzero(seen.sum(0) > 1)
        for start in range(0, len(columns), NUMBERS_PER_CHUNK // N_RESAMPLES):
            some = columns[start : start + NUMBERS_PER_CHUNK // N_RESAMPLES]
            # NaN where only NaN examples were drawn.
            means = np.concatenate(
                [(d @ x[:, some]) / (d @ seen[:, some]) for d in (few.astype(float) for few in draws)]
            )
            percentile = np.nanpercentile if np.isnan(means).any() else np.percentile  # the first one is slow
            low[some], high[some] = percentile(means, [tail, 100 - tail], axis=0)
    back = (torch.from_numpy(a).reshape(rest).to(values.dtype) for a in (mean, low, high))
    return Interval(*back)
