"""What the causal experiments find: results over examples, with their tables."""

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechvlm.intervals import Interval, mean_interval
from mechvlm.results import Result, long_frame


@dataclass(frozen=True, repr=False)
class InformationFlowResult(Result):
    """How the answer's probability changes where attention between two groups of positions is knocked out.

    Attributes:
        p: of the answer's first token, undisturbed.
        p_knocked: with the flow knocked out in the window around each layer.
        flows: "source -> destination", by the names of a `TokenMap`.
        windows: (first, last + 1) of each window, in the decoder's layers 0 to n_layers - 1.
        answers: the tokens whose probability is measured, as the tokenizer's pieces.
        model: the model's name.
    """

    units: ClassVar[str] = "change of the answer's probability (%)"

    p: Float[Tensor, " example"]
    p_knocked: Float[Tensor, "flow layer example"]
    flows: tuple[str, ...]
    windows: tuple[tuple[int, int], ...]
    answers: tuple[str, ...]
    model: str

    @property
    def change(self) -> Float[Tensor, "flow layer example"]:
        """100 (p' - p) / p, in percent: -100 where the answer is lost altogether."""
        return 100 * (self.p_knocked - self.p) / self.p

    @property
    def interval(self) -> Interval:
        """The mean change over examples and its 95 % bootstrap interval, [flow layer] each.

        An answer of probability 0 has no relative change: its example is left out.
        """
        return mean_interval(self.change.where(self.change.isfinite(), torch.nan).movedim(-1, 0))

    def to_frame(self) -> pd.DataFrame:
        """One row per flow, layer (the window's center) and example: p, p_knocked and change (%)."""
        axes = {"flow": self.flows, "layer": range(len(self.windows)), "example": range(len(self.p))}
        frame = long_frame(self.p_knocked, **axes).rename(columns={"value": "p_knocked"})
        frame["p"] = self.p.numpy()[frame["example"]]
        return frame.assign(change=long_frame(self.change, **axes)["value"])


@dataclass(frozen=True, repr=False)
class CausalTraceResult(Result):
    """How much of the answer a few clean states bring back into a corrupted forward.

    Attributes:
        p: of the answer's first token, undisturbed.
        p_corrupt: with the image or the words corrupted.
        p_restored: corrupted, with a group's states restored in the window around each layer.
        groups: names of the groups of positions.
        layers: layers as states: with at="resid_pre" l is the state that enters the decoder's layer l (0: the
            embeddings), else 1 to n_layers is the layer that wrote.
        windows: (first, last + 1) of each window, as indices of the decoder's layers.
        at, corrupt: the site that is restored, and what was corrupted.
        answers: the tokens whose probability is measured, as the tokenizer's pieces.
        model: the model's name.
    """

    units: ClassVar[str] = "probability of the answer brought back"

    p: Float[Tensor, " example"]
    p_corrupt: Float[Tensor, " example"]
    p_restored: Float[Tensor, "layer group example"]
    groups: tuple[str, ...]
    layers: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    at: str
    corrupt: str
    answers: tuple[str, ...]
    model: str

    @property
    def effect(self) -> Float[Tensor, "layer group example"]:
        """The indirect effect: p_restored - p_corrupt, a difference of probabilities (Meng et al. 2022)."""
        return self.p_restored - self.p_corrupt

    @property
    def total_effect(self) -> Float[Tensor, " example"]:
        """p - p_corrupt: what the corruption took, and a full restoration brings back."""
        return self.p - self.p_corrupt

    @property
    def interval(self) -> Interval:
        """The mean effect over examples and its 95 % bootstrap interval, [layer group] each."""
        return mean_interval(self.effect.movedim(-1, 0))

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, group and example: p, p_corrupt, p_restored and effect."""
        axes = {"layer": self.layers, "group": self.groups, "example": range(len(self.p))}
        frame = long_frame(self.p_restored, **axes).rename(columns={"value": "p_restored"})
        for name in ("p", "p_corrupt"):
            frame[name] = getattr(self, name).numpy()[frame["example"]]
        return frame.assign(effect=frame["p_restored"] - frame["p_corrupt"])


@dataclass(frozen=True, repr=False)
class ObjectAblationResult(Result):
    """Whether an object is still named when its visual tokens are gone, against as many others.

    Attributes:
        correct: whether the model's first token is the answer's, undisturbed.
        correct_ablated: the same with tokens ablated (0 or 1; of "random" the mean over its draws). NaN where the picture
            holds too few tokens outside of the object to compare with.
        p, p_ablated: the answer's probability, likewise.
        n_tokens: how many tokens were ablated.
        conditions: "own" (the object's), "random" and "highest norm" (others, as many).
        margins: patches around the object that were ablated with it.
        answers: the tokens that count as right, as the tokenizer's pieces.
        model: the model's name.
    """

    units: ClassVar[str] = "drop in naming accuracy (percentage points)"

    correct: Bool[Tensor, " example"]
    correct_ablated: Float[Tensor, "condition margin example"]
    p: Float[Tensor, " example"]
    p_ablated: Float[Tensor, "condition margin example"]
    n_tokens: Int[Tensor, "margin example"]
    conditions: tuple[str, ...]
    margins: tuple[int, ...]
    answers: tuple[str, ...]
    model: str

    @property
    def drop(self) -> Float[Tensor, "condition margin example"]:
        """100 (correct - correct_ablated): the mean over examples is the drop in naming accuracy, in percentage points."""
        return 100 * (self.correct.float() - self.correct_ablated)

    @property
    def interval(self) -> Interval:
        """The mean drop over examples (percentage points) and its 95 % bootstrap interval, [condition margin] each."""
        return mean_interval(self.drop.movedim(-1, 0))

    def to_frame(self) -> pd.DataFrame:
        """One row per condition, margin and example: n_tokens, correct, correct_ablated, drop, p and p_ablated."""
        axes = {"condition": self.conditions, "margin": self.margins, "example": range(len(self.p))}
        frame = long_frame(self.correct_ablated, **axes).rename(columns={"value": "correct_ablated"})
        frame["p_ablated"] = long_frame(self.p_ablated, **axes)["value"]
        frame["drop"] = long_frame(self.drop, **axes)["value"]
        for name in ("p", "correct"):
            frame[name] = getattr(self, name).numpy()[frame["example"]]
        rows = frame["margin"].map({m: i for i, m in enumerate(self.margins)})
        return frame.assign(n_tokens=self.n_tokens.numpy()[rows, frame["example"]])
