"""Contextualization: how alike two groups of tokens are, at every state of the decoder.

The measure is the mean pairwise cosine between image and text tokens, and within each of the two
(Wei et al. 2024, eq. 1). States of any two tokens have some cosine in common; Ethayarajh's
anisotropy baseline (2019), the mean cosine of tokens from different examples, says how much.

1. At each state, every example's tokens of a modality become one vector, the mean of their unit
   vectors (`mean_unit`).
2. The dot products of these vectors are the mean pairwise cosines.
3. Their sums over the batch give the baseline (`anisotropy_baseline`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.headings import ALONE, n_examples, short_name
from mechvlm.figures.legends import legend_above
from mechvlm.figures.style import LINES, curve, state_axis
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import Modality, image_mask
from mechvlm.probes.probe import Model, Row, State
from mechvlm.results import Result, concat, long_frame, stack

MODALITY_PAIRS = ("inter", "image", "text")
"""Between image and text tokens, within the image tokens, within the text tokens."""


def mean_unit(
    states: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch d_model"]:
    """Mean of the unit vectors at the masked positions, in float32.

    A mean of pairwise cosines needs no more of a set of vectors than this:
    (1/mn) Σ_i Σ_j cos(v_i, w_j) = (1/m Σ_i v_i/‖v_i‖) · (1/n Σ_j w_j/‖w_j‖),
    so eq. (1) of Wei et al. costs O((m+n) d).

    Tested: equals the mean of all pairwise cosines.
    """
    x = states.float()
    weight = mask.to(x) / torch.linalg.vector_norm(x, dim=-1).clamp(min=1e-12)
    return torch.einsum("bp,bpd->bd", weight, x) / mask.sum(-1, keepdim=True)


def without_self(mean: Float[Tensor, "*axes"], n: Float[Tensor, "*#axes"]) -> Float[Tensor, "*axes"]:
    """A mean s over all n² ordered pairs within one set, less the n pairs of a vector with itself.

    Those have cosine 1: (n² s - n) / (n² - n). NaN for a single vector, which has no other.
    """
    return torch.where(n > 1, (n * mean - 1) / (n - 1).clamp(min=1), torch.nan)


def anisotropy_baseline(sum_image: Tensor, sum_text: Tensor, same: Tensor, n: int) -> Float[Tensor, "3 state"]:
    """Mean cosine over all ordered pairs of different examples, in the order of `MODALITY_PAIRS`.

    With ā the mean unit vector of example a: (|Σ_a ā|² - Σ_a |ā|²) / (n² - n) within a modality,
    and likewise between the two. Every token of an example is equally likely to be drawn: this is
    the expectation of Ethayarajh's random tokens, exactly.

    Args:
        sum_image: Σ_a of the images' mean unit vectors, [state d_model].
        sum_text: the same of the texts'.
        same: Σ_a of the dot products within one example, [3 state].
        n: how many examples the sums are over. With fewer than two the baseline is NaN.
    """
    total = torch.stack([(sum_image * sum_text).sum(-1), (sum_image**2).sum(-1), (sum_text**2).sum(-1)])
    return (total - same) / (n * n - n) if n > 1 else torch.full_like(total, torch.nan)


class ContextualizationPlan(NamedTuple):
    """Which positions hold image tokens, and which text tokens."""

    image: Bool[Tensor, "batch pos"]
    text: Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class Contextualization:
    """Probe: the mean pairwise cosine of image and text tokens at every state, between and within.

    Eq. (1) of Wei et al. 2024.

    >>> (cosines,) = mv.read(vlm, inputs, mv.Contextualization())
    >>> cosines.inter  # between image and text tokens, [state example]

    Args:
        self_pairs: count a vector's cosine to itself within one modality (eq. (1) as printed).
            False leaves it out.
        special: count special tokens such as `<s>` as text.
        subtract_baseline: subtract Ethayarajh's anisotropy baseline, estimated from the examples of
            the batch.

    State n_layers is the one before the final norm. (Hugging Face's last hidden state is after
    it.)

    Raises:
        ValueError: from `read`, for an example without image or text tokens, or when a single
            example has its baseline subtracted.
    """

    self_pairs: bool = True
    special: bool = False
    subtract_baseline: bool = False

    def part_of(self, numbers: range, n_examples: int) -> "Contextualization":
        """The probe for some of the examples: the baseline is that of all, and comes at the end."""
        if self.subtract_baseline and n_examples < 2:
            raise ValueError("The anisotropy baseline compares tokens of different examples: give at least two.")
        return replace(self, subtract_baseline=False)

    def join(self, results: list["ContextualizationResult"]) -> "ContextualizationResult":
        """The results of all parts as one."""
        curves = concat(results)
        return curves.minus_baseline() if self.subtract_baseline else curves

    def prepare(self, vlm: Model, inputs: Inputs) -> ContextualizationPlan:
        """Find the positions of image and text in each example."""
        if self.subtract_baseline and len(inputs) < 2:
            raise ValueError("The anisotropy baseline compares tokens of different examples: give at least two.")
        modality = torch.stack([tokens.modality for tokens in inputs.token_maps])
        text = modality == Modality.TEXT
        if self.special:
            text |= modality == Modality.SPECIAL
        masks = image_mask(inputs.token_maps), text
        for kind, mask in zip(("image", "text"), masks, strict=True):
            empty = (~mask.any(-1)).nonzero().squeeze(-1).tolist()
            if empty:
                raise ValueError(f"Example(s) {empty} have no {kind} tokens: there is nothing to compare.")
        return ContextualizationPlan(*masks)

    def at_state(self, plan: ContextualizationPlan, state: State) -> Row:
        """Three dot products per example [3 example], and two sums over the batch [d_model]."""
        image, text = (mean_unit(state.resid, mask.to(state.resid.device)) for mask in plan)
        dots = torch.stack([(image * text).sum(-1), (image**2).sum(-1), (text**2).sum(-1)])
        return {"dots": dots, "sum_image": image.sum(0), "sum_text": text.sum(0)}

    def result(
        self, plan: ContextualizationPlan, rows: list[Row], vlm: Model, inputs: Inputs
    ) -> "ContextualizationResult":
        """The curves, with the baseline of the batch."""
        inter, image, text = stack([row["dots"] for row in rows]).unbind(1)
        sums: dict[str, Any] = {name: stack([row[name] for row in rows]) for name in ("sum_image", "sum_text")}
        same = torch.stack([inter.sum(-1), image.sum(-1), text.sum(-1)])
        baseline = anisotropy_baseline(same=same, n=len(inputs), **sums)
        if not self.self_pairs:
            image, text = (without_self(x, mask.sum(-1).float()) for x, mask in zip((image, text), plan, strict=True))
        curves = ContextualizationResult(
            inter, image, text, baseline, self.self_pairs, self.special, False, vlm.name, same=same, **sums
        )
        return curves.minus_baseline() if self.subtract_baseline else curves


@dataclass(frozen=True, repr=False)
class ContextualizationResult(Result):
    """Mean pairwise cosines by state, -1 to 1.

    Attributes:
        inter: between image and text tokens, s(l) of eq. (1).
        image, text: within the image tokens, within the text tokens.
        baseline: Ethayarajh's anisotropy baseline for the three, in the order of `MODALITY_PAIRS`:
            the mean cosine of tokens from DIFFERENT examples, at the same state. NaN with fewer
            than two examples.
        self_pairs: whether `image` and `text` count a vector's cosine to itself, as eq. (1) as
            printed does.
        special: whether text includes special tokens.
        adjusted: whether the baseline has been subtracted.
        model: the model's name.
        sum_image, sum_text: sums over examples of their mean unit vectors. With `same` they give
            the baseline of several batches together.
        same: sums over examples of the dot products of their own mean unit vectors, in the order of
            `MODALITY_PAIRS`.
    """

    units: ClassVar[str] = "cosine"
    computed: ClassVar[tuple[str, ...]] = ("baseline", "sum_image", "sum_text", "same")

    inter: Float[Tensor, "state example"]
    image: Float[Tensor, "state example"]
    text: Float[Tensor, "state example"]
    baseline: Float[Tensor, "3 state"]
    self_pairs: bool
    special: bool
    adjusted: bool
    model: str
    sum_image: Float[Tensor, "state d_model"]
    sum_text: Float[Tensor, "state d_model"]
    same: Float[Tensor, "3 state"]

    def to_frame(self) -> pd.DataFrame:
        """One row per pair ("inter", "image", "text"), state and example."""
        n_states, n_examples = self.inter.shape
        frames = [
            long_frame(getattr(self, pair), state=range(n_states), example=range(n_examples)).assign(pair=pair)
            for pair in MODALITY_PAIRS
        ]
        return self.with_ids(pd.concat(frames, ignore_index=True)[["pair", "state", "example", "value"]])

    @classmethod
    def joined(cls, results: Sequence["ContextualizationResult"]) -> dict[str, Any]:
        """The sums over all examples, and the baseline and curves that follow from them."""
        sums = {
            name: torch.stack([getattr(result, name) for result in results]).sum(0)
            for name in ("sum_image", "sum_text", "same")
        }
        baseline = anisotropy_baseline(n=sum(result.count_examples() for result in results), **sums)
        if not results[0].adjusted:
            return {**sums, "baseline": baseline}
        curves = {}
        for i, pair in enumerate(MODALITY_PAIRS):
            raw = [getattr(result, pair) + result.baseline[i][:, None] for result in results]
            curves[pair] = torch.cat(raw, dim=1) - baseline[i][:, None]
        return {**sums, **curves, "baseline": baseline}

    def minus_baseline(self) -> "ContextualizationResult":
        """The same result with the anisotropy baseline subtracted from every curve.

        Raises:
            ValueError: with fewer than two examples, or when it was subtracted already.
        """
        if self.adjusted:
            raise ValueError("The baseline has been subtracted already.")
        if self.inter.shape[1] < 2:
            raise ValueError("The anisotropy baseline compares tokens of different examples: read at least two.")
        values = {pair: getattr(self, pair) - self.baseline[i][:, None] for i, pair in enumerate(MODALITY_PAIRS)}
        return ContextualizationResult(**{**vars(self), **values, "adjusted": True})

    @plots()
    def plot(self, canvas: Canvas) -> None:
        """The three curves by state: means over examples, in bands of their standard deviation."""
        ax, (n_states, n) = canvas.ax, self.inter.shape
        for pair in MODALITY_PAIRS:
            curve(ax, range(n_states), getattr(self, pair).numpy().T, LINES[pair])
        state_axis(ax, n_states - 1)
        ax.set_ylabel("mean cosine" + (" less baseline" if self.adjusted else ""))
        note = f"{n_examples(self.inter)}, means; band: one standard deviation" if n > 1 else ALONE
        canvas.head(f"Contextualization, {short_name(self.model)}", note)
        legend_above(ax)
