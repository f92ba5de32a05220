"""What the experiment on Winoground's pairs finds: scores, and measures with the true caption against the other one."""

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.intervals import Interval, mean_interval
from mechvlm.pairs import PairScores, pair_scores
from mechvlm.results import Result, long_frame

MEASURES = ("precision", "recall", "contextualization", "norm attention", "log-likelihood")
CONDITIONS = ("matched", "mismatched")


@dataclass(frozen=True, repr=False)
class WinogroundResult(Result):
    """Every measure of every pair, with each of its captions on each of its images.

    Attributes:
        values: by `measures`; NaN where a measure has no such layer (norm-based attention begins at 1, and the likelihood is
            the model's own, at n_layers) or no value (the precision of no word).
        pairs: their ids.
        set_aside: (id, reason) of the pairs that could not be read.
        prompt: what the captions answered.
        model: the model's name.
    """

    units: ClassVar[str] = "share of words, cosine, residual-stream units, nats"
    measures: ClassVar[tuple[str, ...]] = MEASURES

    values: Float[Tensor, "measure layer pair caption image"]
    pairs: tuple[str, ...]
    set_aside: tuple[tuple[str, str], ...]
    prompt: str
    model: str

    @property
    def logprob(self) -> Float[Tensor, "pair caption image"]:
        """log p(caption | image, prompt), in nats."""
        return self.values[MEASURES.index("log-likelihood"), -1]

    @property
    def scores(self) -> PairScores:
        """Which pairs are right by the text, image and group score; `scores.to_frame()` gives percentages and chance."""
        return pair_scores(self.logprob)

    @property
    def by_condition(self) -> Float[Tensor, "condition measure layer pair image"]:
        """Each image with its own caption ("matched") and with the other ("mismatched")."""
        own = torch.stack([self.values[..., i, i] for i in (0, 1)], -1)
        other = torch.stack([self.values[..., 1 - i, i] for i in (0, 1)], -1)
        return torch.stack([own, other])

    @property
    def difference(self) -> Interval:
        """Matched less mismatched, the mean over pairs [measure layer] with its 95 % bootstrap interval.

        A pair's two images count as one value, their mean: they are no independent examples.
        """
        return self.difference_by(seed=0)

    def difference_by(self, seed: int) -> Interval:
        """`difference`, with the bootstrap's seed."""
        matched, mismatched = self.by_condition
        return mean_interval((matched - mismatched).nanmean(-1).movedim(-1, 0), seed=seed)

    def to_frame(self) -> pd.DataFrame:
        """One row per measure, layer, pair, image and condition ("matched", "mismatched"); layers that a measure lacks are
        left out."""
        names = dict(zip(range(len(self.pairs)), self.pairs, strict=True))
        layers = range(self.values.shape[1])
        axes = {"condition": CONDITIONS, "measure": MEASURES, "layer": layers, "pair": names, "image": (0, 1)}
        frame = long_frame(self.by_condition, **axes)
        frame["pair"] = frame["pair"].map(names)
        lacking = {"norm attention": frame["layer"] > 0, "log-likelihood": frame["layer"] == layers[-1]}
        for measure, there in lacking.items():
            frame = frame[(frame["measure"] != measure) | there.loc[frame.index]]
        return frame[["pair", "image", "measure", "layer", "condition", "value"]].reset_index(drop=True)
