"""Contextualization: how alike the states of two groups of tokens are (Wei et al. 2024; Ethayarajh 2019)."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.figures.style import LINES, axes, curve, layer_axis, style
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import Modality
from mechvlm.probes.probe import Model, Row, State
from mechvlm.results import Result, long_frame, stack

MODALITY_PAIRS = ("inter", "image", "text")


def mean_unit(
    states: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch d_model"]:
    """Mean of the masked positions' unit vectors, float32: all that a mean of pairwise cosines needs of a set.

    (1/mn) Σ_i Σ_j cos(v_i, w_j) = (1/m Σ_i v_i/‖v_i‖) · (1/n Σ_j w_j/‖w_j‖), so eq. (1) of Wei et al. costs O((m+n) d).
    Tested: equals the mean of all pairwise cosines.
    """
    x = states.float()
    weight = mask.to(x) / torch.linalg.vector_norm(x, dim=-1).clamp(min=1e-12)
    return torch.einsum("bp,bpd->bd", weight, x) / mask.sum(-1, keepdim=True)


def without_self(mean: Float[Tensor, "*axes"], n: Float[Tensor, "*#axes"]) -> Float[Tensor, "*axes"]:
    """A mean over all n² ordered pairs within one set, less the n pairs of a vector with itself (cosine 1).

    (n² s - n) / (n² - n). NaN for a single vector, which has no other.
    """
    return torch.where(n > 1, (n * mean - 1) / (n - 1).clamp(min=1), torch.nan)


@dataclass(frozen=True, repr=False)
class ContextualizationResult(Result):
    """Mean pairwise cosines by layer, -1 to 1.

    Attributes:
        inter: between image and text tokens, s(l) of eq. (1).
        image, text: within the image tokens, within the text tokens.
        baseline: Ethayarajh's anisotropy baseline for the three, in the order of `MODALITY_PAIRS`: the mean cosine of tokens
            from DIFFERENT examples, at the same layer. NaN with fewer than two examples.
        self_pairs: whether `image` and `text` count a vector's cosine to itself, as eq. (1) as printed does.
        special: whether text includes special tokens.
        adjusted: whether the baseline has been subtracted.
        model: the model's name.
        sum_image, sum_text, same: sums over examples of each one's mean unit vectors, and of their dot products in the
            order of `MODALITY_PAIRS`: what the baseline of several batches together is made of.
    """

    units: ClassVar[str] = "cosine"

    inter: Float[Tensor, "layer example"]
    image: Float[Tensor, "layer example"]
    text: Float[Tensor, "layer example"]
    baseline: Float[Tensor, "3 layer"]
    self_pairs: bool
    special: bool
    adjusted: bool
    model: str
    sum_image: Float[Tensor, "layer d_model"]
    sum_text: Float[Tensor, "layer d_model"]
    same: Float[Tensor, "3 layer"]

    def to_frame(self) -> pd.DataFrame:
        """One row per pair ("inter", "image", "text"), layer and example."""
        n_layers, n_examples = self.inter.shape
        frames = [
            long_frame(getattr(self, pair), layer=range(n_layers), example=range(n_examples)).assign(pair=pair)
            for pair in MODALITY_PAIRS
        ]
        return pd.concat(frames, ignore_index=True)[["pair", "layer", "example", "value"]]

    def minus_baseline(self) -> "ContextualizationResult":
        """The same with the anisotropy baseline subtracted from every curve.

        Raises:
            ValueError: with fewer than two examples, or when it was subtracted already.
        """
        if self.adjusted:
            raise ValueError("The baseline has been subtracted already.")
        if self.inter.shape[1] < 2:
            raise ValueError("The anisotropy baseline compares tokens of different examples: read at least two.")
        values = {p: getattr(self, p) - self.baseline[i][:, None] for i, p in enumerate(MODALITY_PAIRS)}
        return ContextualizationResult(**{**vars(self), **values, "adjusted": True})

    def plot(self, ax: Axes | None = None) -> Axes:
        """The three curves by state: means over examples, with bands of their standard deviation."""
        with style():
            ax = axes(ax)
            n = self.inter.shape[0] - 1
            for pair in ("inter", "image", "text"):
                curve(ax, range(n + 1), getattr(self, pair).numpy().T, LINES[pair])
            layer_axis(ax, n)
            ax.set_ylabel("mean cosine" + (" less baseline" if self.adjusted else ""))
            ax.set_title(f"Contextualization, {self.model}")
            ax.legend()
        return ax


def merge(results: list[ContextualizationResult]) -> ContextualizationResult:
    """Several batches as one result; the baseline is that of all their examples together.

    Raises:
        ValueError: when they were made by different models or with different options.
    """
    settings = {(r.self_pairs, r.special, r.adjusted, r.model) for r in results}
    if len(settings) != 1 or results[0].adjusted:
        raise ValueError(
            f"These results cannot be merged: (self_pairs, special, adjusted, model) are {sorted(settings)}."
        )
    sums = {name: torch.stack([getattr(r, name) for r in results]).sum(0) for name in ("sum_image", "sum_text", "same")}
    curves = {pair: torch.cat([getattr(r, pair) for r in results], dim=1) for pair in MODALITY_PAIRS}
    n = curves["inter"].shape[1]
    return ContextualizationResult(
        **{**vars(results[0]), **curves, **sums, "baseline": anisotropy_baseline(n=n, **sums)}
    )


def anisotropy_baseline(sum_image: Tensor, sum_text: Tensor, same: Tensor, n: int) -> Float[Tensor, "3 layer"]:
    """Mean cosine over all ordered pairs of different examples: (|Σ_a ā|² - Σ_a |ā|²) / (n² - n), and so between sets.

    Every token of an example is equally likely to be drawn: this is the expectation of Ethayarajh's random tokens, exactly.
    """
    total = torch.stack([(sum_image * sum_text).sum(-1), (sum_image**2).sum(-1), (sum_text**2).sum(-1)])
    return (total - same) / (n * n - n) if n > 1 else torch.full_like(total, torch.nan)


class ContextualizationPlan(NamedTuple):
    """Which positions hold image and which text."""

    image: Bool[Tensor, "batch pos"]
    text: Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class Contextualization:
    """Probe: eq. (1), the mean pairwise cosine between image and text tokens and within each, at every layer.

    Args:
        self_pairs: count a vector's cosine to itself within one modality (eq. (1) as printed). False leaves it out.
        special: count special tokens such as `<s>` as text.
        subtract_baseline: subtract Ethayarajh's anisotropy baseline, estimated from the examples of the batch.

    Layer n_layers is the state before the final norm (Hugging Face's last hidden state is after it).
    """

    self_pairs: bool = True
    special: bool = False
    subtract_baseline: bool = False

    def prepare(self, vlm: Model, inputs: Inputs) -> ContextualizationPlan:
        """Which positions of each example are image, and which text."""
        if self.subtract_baseline and len(inputs) < 2:
            raise ValueError("The anisotropy baseline compares tokens of different examples: give at least two.")
        modality = torch.stack([m.modality for m in inputs.token_maps])
        text = modality == Modality.TEXT
        if self.special:
            text |= modality == Modality.SPECIAL
        masks = modality == Modality.IMAGE, text
        for kind, mask in zip(("image", "text"), masks, strict=True):
            empty = (~mask.any(-1)).nonzero().squeeze(-1).tolist()
            if empty:
                raise ValueError(f"Example(s) {empty} have no {kind} tokens: there is nothing to compare.")
        return ContextualizationPlan(*masks)

    def at_state(self, plan: ContextualizationPlan, state: State) -> Row:
        """The mean unit vectors' dot products by example, and their sums over the batch."""
        image, text = (mean_unit(state.resid, mask.to(state.resid.device)) for mask in plan)
        dots = torch.stack([(image * text).sum(-1), (image**2).sum(-1), (text**2).sum(-1)])
        # Per layer: three numbers an example, and two vectors for the whole batch.
        return {"dots": dots, "sum_image": image.sum(0), "sum_text": text.sum(0)}

    def result(
        self, plan: ContextualizationPlan, rows: list[Row], vlm: Model, inputs: Inputs
    ) -> ContextualizationResult:
        """The curves, with the baseline of the batch."""
        inter, image, text = stack([row["dots"] for row in rows]).unbind(1)
        sums = {name: stack([row[name] for row in rows]) for name in ("sum_image", "sum_text")}
        same = torch.stack([inter.sum(-1), image.sum(-1), text.sum(-1)])
        baseline = anisotropy_baseline(same=same, n=len(inputs), **sums)
        if not self.self_pairs:
            image, text = (without_self(x, m.sum(-1).float()) for x, m in zip((image, text), plan, strict=True))
        made = ContextualizationResult(
            inter, image, text, baseline, self.self_pairs, self.special, False, vlm.name, same=same, **sums
        )
        return made.minus_baseline() if self.subtract_baseline else made
