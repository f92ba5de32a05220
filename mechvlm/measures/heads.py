"""Rankings of heads: from a number of each head to an ordered table, and two measures of maps."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.intervals import mean_interval

TOUCHING = np.ones((3, 3), dtype=int)
"""Neighbours of a cell, diagonals as well."""


def rank_heads(values: Float[Tensor, "example layer head"], top: int, name: str) -> pd.DataFrame:
    """The heads of the largest mean over examples, the first one first.

    Heads of one mean follow each other by layer, then by head.

    >>> rank_heads(shares, 10, "share")[["layer", "head", "share"]]

    Args:
        values: a number of each head; NaN examples of a head are left out of its mean.
        top: how many heads.
        name: of the column that holds the means.

    Returns:
        One row a head: layer, head, the mean, and low and high, the ends of its 95 % bootstrap
        interval over examples (NaN for one example; the draws have seed 0).

    Raises:
        ValueError: for less than one head.
    """
    if top < 1:
        raise ValueError(f"top={top} was asked for: at least 1 head.")
    n_heads = values.shape[2]
    mean, low, high = (x.flatten() for x in mean_interval(values))
    order = mean.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:top]
    table = {"layer": (order // n_heads).tolist(), "head": (order % n_heads).tolist()}
    columns = {name: mean, "low": low, "high": high}
    return pd.DataFrame(table | {column: x[order].numpy() for column, x in columns.items()})


def elbow(values: Float[Tensor, " n"]) -> float:
    """Where a sorted curve bends most: its value farthest from the chord between its two ends.

    The points (rank, value), rank and value scaled to 0..1; of several equally far the largest.

    >>> elbow(torch.tensor([0.0, 0.0, 0.1, 0.2, 1.0]))
    0.2

    Source: the criterion of Kang et al. 2025, "Your Large Vision-Language Model Only Needs A Few
    Attention Heads For Visual Grounding" (arXiv 2503.06287).

    Raises:
        ValueError: for no value.
    """
    if not len(values):
        raise ValueError("There is no value, so no curve with an elbow.")
    curve = values.double().sort(descending=True).values
    spread = float(curve[0] - curve[-1])
    if len(curve) < 3 or not spread:
        return float(curve[0])
    rank = torch.linspace(0, 1, len(curve), dtype=torch.float64)
    height = (curve - curve[-1]) / spread
    # The chord goes from (0, 1) to (1, 0); sqrt(2) times the distance to it.
    return float(curve[int((height + rank - 1).abs().argmax())])


def spatial_entropy(maps: Float[Tensor, "*rest row col"]) -> Float[Tensor, "*rest"]:
    """How scattered each map is: the entropy of the areas of its bright regions, in nats.

    m = map > mean(map); C_i are the connected regions of m (diagonals connect); P_i = |C_i| / |m|;
    H = -Σ P_i log P_i. One region has 0, two of equal area log 2. A map without any cell above its
    mean, a constant one, has no region: infinity.

    Source: Kang et al. 2025, arXiv 2503.06287, criterion 2.
    Tested: by hand, and with a flood fill.
    """
    rest = maps.shape[:-2]
    flat = maps.detach().cpu().float().reshape(-1, *maps.shape[-2:])
    bright = (flat > flat.double().mean((1, 2), keepdim=True)).numpy()
    return torch.tensor([_entropy_of_areas(own) for own in bright], dtype=torch.float32).reshape(rest)


def _entropy_of_areas(bright: np.ndarray) -> float:
    from scipy import ndimage  # a quarter of a second to import, and nothing else needs it

    labels, n = ndimage.label(bright, TOUCHING)
    if not n:
        return float("inf")
    shares = np.bincount(labels.ravel())[1:] / bright.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0
