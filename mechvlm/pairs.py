"""MEASURE: Winoground's scores, from how likely each of two captions is for each of two images."""

from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechvlm.intervals import mean_interval

CHANCE = {"text": 25.0, "image": 25.0, "group": 100 / 6}
"""Of a model whose four likelihoods stand in any order alike often, in percent (Thrush et al. 2022)."""


class PairScores(NamedTuple):
    """Which pairs are right, by each of the three scores."""

    text: Bool[Tensor, " pair"]
    image: Bool[Tensor, " pair"]
    group: Bool[Tensor, " pair"]

    def to_frame(self, seed: int = 0) -> pd.DataFrame:
        """One row per score: score, percent of pairs, its 95 % bootstrap interval low and high, chance, n pairs."""
        found = mean_interval(100 * torch.stack(list(self), -1).double(), seed=seed)
        ends = {name: getattr(found, name).tolist() for name in ("low", "high")}
        percent = {"score": list(CHANCE), "percent": found.mean.tolist()}
        return pd.DataFrame({**percent, **ends, "chance": list(CHANCE.values()), "n": len(self.group)})


def pair_scores(s: Float[Tensor, "pair caption image"]) -> PairScores:
    """The text, image and group score of each pair of two captions and two images; caption i is true of image i.

        text:  s(C0, I0) > s(C1, I0) and s(C1, I1) > s(C0, I1)      each image's own caption is the likelier
        image: s(C0, I0) > s(C0, I1) and s(C1, I1) > s(C1, I0)      each caption's own image makes it likelier
        group: both

    Equal values count as wrong. Chance is 25, 25 and 16.7 %.

    Source: Thrush et al. 2022, "Winoground: Probing Vision and Language Models for Visio-Linguistic Compositionality".
    Tested: equals values worked by hand; random values give chance.

    Raises:
        ValueError: for another shape than [pair 2 2], or a value that is NaN.
    """
    if s.ndim != 3 or tuple(s.shape[1:]) != (2, 2) or not len(s):
        raise ValueError(f"s is [pair caption image] of two captions and two images, not {list(s.shape)}.")
    if s.isnan().any():
        raise ValueError(f"s is NaN in pairs {s.isnan().flatten(1).any(1).nonzero().flatten().tolist()}.")
    (c0i0, c0i1), (c1i0, c1i1) = (row.unbind(-1) for row in s.unbind(1))
    text = (c0i0 > c1i0) & (c1i1 > c0i1)
    image = (c0i0 > c0i1) & (c1i1 > c1i0)
    return PairScores(text, image, text & image)
