"""Results of `head_ablation`: a map of all heads, or sets of heads beside random ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.fitted import name_places
from mechvlm.figures.head_map import head_map, head_map_size
from mechvlm.figures.headings import ALONE, INTERVAL, answer_label, n_examples, short_name
from mechvlm.figures.legends import legend_above
from mechvlm.figures.settings import pen
from mechvlm.figures.style import SIGNED, hue, text
from mechvlm.intervals import Interval, mean_interval
from mechvlm.results import Result, long_frame

REPLACED = {"zero": "zero", "mean": "its mean", "resample": "another example's"}
"""What stands in for a head's output, as a picture's heading says it."""
APART = "each call replaces by what its own examples have. Give head_ablation all batches at once, as a list."


class _Effects:
    """The effects of ablations: fields `p`, `logit`, `p_ablated` and `logit_ablated` compared."""

    p: Tensor
    logit: Tensor
    p_ablated: Tensor
    logit_ablated: Tensor
    how: str

    @classmethod
    def joined(cls, results: Sequence[Any]) -> dict[str, Any]:
        """Refuse to join what was replaced by each call's own examples."""
        if results[0].how != "zero":
            raise InputError(f"Results of type {cls.__name__} with how={results[0].how!r} are not joined: {APART}")
        return {}

    def _effect(self, by: str, ablated: str = "ablated") -> Tensor:
        names = {"probability": "p", "logit": "logit"}
        if by not in names:
            raise ValueError(f"There is no effect by={by!r}: it is measured by 'probability' or 'logit'.")
        return getattr(self, f"{names[by]}_{ablated}") - getattr(self, names[by])

    @property
    def effect(self) -> Tensor:
        """p_ablated - p: the change of the answer's probability, below 0 where it is lost."""
        return self._effect("probability")

    @property
    def logit_effect(self) -> Tensor:
        """logit_ablated - logit: the change of the answer's logit."""
        return self._effect("logit")

    @property
    def interval(self) -> Interval:
        """The mean of `effect` over examples with its 95 % bootstrap interval."""
        return _interval(self.effect)

    @property
    def logit_interval(self) -> Interval:
        """The mean of `logit_effect` over examples with its 95 % bootstrap interval."""
        return _interval(self.logit_effect)


def _interval(values: Float[Tensor, "*rest example"]) -> Interval:
    return mean_interval(values.movedim(-1, 0))


@dataclass(frozen=True, repr=False)
class HeadAblationResult(_Effects, Result):
    """The answer's probability and logit with each head of the decoder ablated, one at a time.

    Attributes:
        p, logit: of the answer's first token, undisturbed.
        p_ablated, logit_ablated: with the output of one head replaced.
        how: what it was replaced by: "zero", "mean" or "resample".
        positions: where it was replaced, by name.
        answers: the tokens that are measured, as text.
        model: the model's name.
    """

    units: ClassVar[str] = "change of the answer's probability"
    per_example: ClassVar[tuple[str, ...]] = ("answers",)

    p: Float[Tensor, " example"]
    logit: Float[Tensor, " example"]
    p_ablated: Float[Tensor, "layer head example"]
    logit_ablated: Float[Tensor, "layer head example"]
    how: str
    positions: str
    answers: tuple[str, ...]
    model: str

    def heads(self, top: int = 10, by: str = "probability") -> pd.DataFrame:
        """The heads whose ablation changes the answer most, up or down, the strongest first.

        Heads of equal effect follow each other by (layer, head).

        >>> result.heads(top=3)
           layer  head    effect       low      high    others

        Args:
            top: how many.
            by: "probability" or "logit".

        Returns:
            One row per head: layer, head, effect (the mean over examples), low and high (its 95 %
            bootstrap interval), and others (the mean effect of the layer's other heads, which is
            what a random one of them has on average; NaN where there is no other).

        Raises:
            ValueError: for fewer than one head, or another `by`.
        """
        if top < 1:
            raise ValueError(f"top={top} was asked for: at least 1 head.")
        mean, low, high = _interval(self._effect(by))
        n_heads = mean.shape[1]
        others = (mean.sum(1, keepdim=True) - mean) / (n_heads - 1) if n_heads > 1 else torch.full_like(mean, torch.nan)
        order = mean.abs().flatten().argsort(descending=True, stable=True)[:top]
        columns = {"effect": mean, "low": low, "high": high, "others": others}
        table = {"layer": (order // n_heads).tolist(), "head": (order % n_heads).tolist()}
        return pd.DataFrame(table | {name: values.flatten()[order].numpy() for name, values in columns.items()})

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, head and example.

        Columns: p, p_ablated, effect, logit, logit_ablated, logit_effect.
        """
        n_layers, n_heads, n = self.p_ablated.shape
        labels = {"layer": range(n_layers), "head": range(n_heads), "example": range(n)}
        return self.with_ids(_compared(self, labels, "ablated"))

    @plots(lambda self, **_: head_map_size(*self.p_ablated.shape[:2]))
    def plot(self, canvas: Canvas, by: str = "probability") -> None:
        """A map of the mean effects [layer head], with a dot where the interval leaves out 0.

        Args:
            by: "probability" or "logit".
        """
        effect = self._effect(by)
        interval = _interval(effect)
        most = float(interval.mean.abs().max().clamp(min=1e-6))
        label = f"change of the answer's {by}"
        head_map(canvas.ax, interval.mean, range(len(effect)), label, cmap=SIGNED, vmin=-most, vmax=most)
        mark_sure(canvas.ax, interval)
        canvas.head(_title(self), f"{_done(self)}\n{map_note(effect)}")


@dataclass(frozen=True, repr=False)
class HeadSetsResult(_Effects, Result):
    """The answer's probability and logit with sets of heads ablated, and random sets as large.

    Attributes:
        p, logit: of the answer's first token, undisturbed.
        p_ablated, logit_ablated: with a set's heads replaced together.
        p_control, logit_control: with as many random heads of the same layers replaced, none of
            them in the set. NaN where a layer has too few others.
        sets: their names.
        members: the heads of each set, (layer, head).
        drawn: the heads of each random set, likewise; none where a layer has too few others.
        how: what the heads' outputs were replaced by: "zero", "mean" or "resample".
        positions: where they were replaced, by name.
        seed: of the random sets.
        answers: the tokens that are measured, as text.
        model: the model's name.
    """

    units: ClassVar[str] = "change of the answer's probability"
    per_example: ClassVar[tuple[str, ...]] = ("answers",)

    p: Float[Tensor, " example"]
    logit: Float[Tensor, " example"]
    p_ablated: Float[Tensor, "set example"]
    logit_ablated: Float[Tensor, "set example"]
    p_control: Float[Tensor, "set draw example"]
    logit_control: Float[Tensor, "set draw example"]
    sets: tuple[str, ...]
    members: tuple[tuple[tuple[int, int], ...], ...]
    drawn: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
    how: str
    positions: str
    seed: int
    answers: tuple[str, ...]
    model: str

    @property
    def control(self) -> Float[Tensor, "set draw example"]:
        """p_control - p: the effects of the random sets, in probability."""
        return self._effect("probability", "control")

    @property
    def control_interval(self) -> Interval:
        """The mean of `control` over draws and examples [set]; its interval is over examples."""
        return _interval(self.control.mean(1))

    @property
    def spread(self) -> Float[Tensor, " set"]:
        """The standard deviation over draws of the random sets' mean effect; NaN for one draw."""
        return self.control.mean(-1).std(-1)

    @property
    def difference(self) -> Interval:
        """The mean of `effect` less the mean random set's [set], example by example; 95 % interval.

        An interval that leaves out 0 says that the set does more than as many random heads.
        """
        return _interval(self.effect - self.control.mean(1))

    def to_frame(self) -> pd.DataFrame:
        """One row per set, draw and example; draw -1 is the set itself, 0 and up the random ones.

        Columns: n_heads, p, p_ablated, effect, logit, logit_ablated, logit_effect.
        """
        n = len(self.p)
        own = _compared(self, {"set": self.sets, "draw": [-1], "example": range(n)}, "ablated")
        draws = range(self.p_control.shape[1])
        random = _compared(self, {"set": self.sets, "draw": draws, "example": range(n)}, "control")
        frame = pd.concat([own, random], ignore_index=True)
        sizes = {name: len(heads) for name, heads in zip(self.sets, self.members, strict=True)}
        frame.insert(2, "n_heads", frame["set"].map(sizes))
        return self.with_ids(frame)

    @plots(lambda self, **_: (max(5.2, 2.2 + 1.3 * len(self.sets)), 3.8))
    def plot(self, canvas: Canvas, by: str = "probability") -> None:
        """A bar for each set and one for its random sets, with intervals, and a dot for each draw.

        Args:
            by: "probability" or "logit".
        """
        effect, control = self._effect(by), self._effect(by, "control")
        x = np.arange(len(self.sets))
        bars = (
            ("the set", "#0072B2", "", -0.2, effect), ("as many random heads", "#E69F00", "///", 0.2, control.mean(1)),
        )  # fmt: skip
        ax = canvas.ax
        for label, color, hatch, offset, values in bars:
            mean, low, high = (part.numpy() for part in _interval(values))
            ax.bar(x + offset, mean, 0.36, label=label, color=hue(color), hatch=hatch, edgecolor="white", linewidth=0)
            ax.vlines(x + offset, low, high, color=pen(), linewidth=1.2)
        by_draw = control.mean(-1).numpy()  # [set draw]
        around = np.linspace(0.12, 0.28, by_draw.shape[1]) if by_draw.shape[1] > 1 else np.array([0.2])
        ax.scatter(x[:, None] + around, by_draw, s=10, color=pen("#444444"), zorder=3, label="each draw")
        ax.axhline(0, color=pen("#444444"), linewidth=0.8)
        names = [
            f"{text(name, 20)}\n{len(heads)} head{'s' * (len(heads) > 1)}"
            for name, heads in zip(self.sets, self.members, strict=True)
        ]
        name_places(ax, names)
        ax.set_ylabel(f"change of the answer's {by}")
        legend_above(ax)
        note = f"{n_examples(effect)}; bars are means, lines their {INTERVAL}" if len(self.p) > 1 else ALONE
        canvas.head(_title(self), f"{_done(self)}\n{note}")


def mark_sure(ax: Axes, interval: Interval) -> None:
    """A dot on each cell [row column] of a map whose interval leaves out 0."""
    rows, columns = ((interval.low > 0) | (interval.high < 0)).nonzero().T.numpy()
    size = 9 if interval.mean.numel() < 400 else 2
    ax.scatter(columns, rows, s=size, color="#222222", edgecolors="white", linewidths=0.4)


def map_note(values: Tensor) -> str:
    """What a map of means of `values` [..., example] shows, under its title."""
    several = f"{n_examples(values)}, means; a dot where the {INTERVAL} leaves out 0 (1 in 20 by chance)"
    return several if values.shape[-1] > 1 else ALONE


def _title(result: HeadAblationResult | HeadSetsResult) -> str:
    return f"Head ablation, {short_name(result.model)}: {answer_label(result.answers)}"


def _done(result: HeadAblationResult | HeadSetsResult) -> str:
    where = "all positions" if result.positions == "all" else result.positions
    return f"the heads' outputs z set to {REPLACED[result.how]} at {where}"


def _compared(result: Any, labels: dict[str, Any], ablated: str) -> pd.DataFrame:
    """A table of probability and logit, undisturbed and ablated, and of their differences."""
    frame = None
    for name, effect in (("p", "effect"), ("logit", "logit_effect")):
        values = getattr(result, f"{name}_{ablated}").reshape([len(labels[axis]) for axis in labels])
        column = long_frame(values, **labels)
        frame = column.drop(columns="value") if frame is None else frame
        clean = getattr(result, name).numpy()[frame["example"]]
        frame[name], frame[f"{name}_ablated"] = clean, column["value"]
        frame[effect] = column["value"] - clean
    assert frame is not None
    return frame
