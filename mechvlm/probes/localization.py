"""Localization heads: heads that look at one place of the image.

1. Of each head, S is the attention of one position to the image. Over all examples' mean S, sorted,
   the elbow gives τ; heads below it hardly look at the image.
2. Of each head and example, H is the entropy of the bright regions of its map of the image: 0 where
   it looks at one place.
3. In each example, the `per_example` heads of lowest H among those with S >= τ are selected. Heads
   are ranked by how often.

Kang et al. 2025, "Your Large Vision-Language Model Only Needs A Few Attention Heads For Visual
Grounding" (arXiv 2503.06287).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.decoder.attention import attention_rows
from mechvlm.errors import InputError
from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.head_map import head_map, head_map_size
from mechvlm.figures.headings import n_examples, short_name
from mechvlm.figures.style import text
from mechvlm.inputs.batch import Inputs
from mechvlm.measures.heads import elbow, rank_heads, spatial_entropy
from mechvlm.probes.norm_attention import NormAttention
from mechvlm.probes.probe import Attended, Model, Row
from mechvlm.results import Result, long_frame, stack

SKIPPED = 2
"""The first layers, which the paper leaves out."""
PER_EXAMPLE = 10


class MapPlan(NamedTuple):
    """The destination of each example, [example 1], its name, and where its patches stand."""

    dest: Int[Tensor, "example 1"]
    name: str
    patches: tuple[Int[Tensor, "row col"], ...]


@dataclass(frozen=True)
class LocalizationHeads:
    """Probe: which heads look at one place of the image; see the module for the criteria.

    >>> (found,) = mv.read(vlm, many, mv.LocalizationHeads(dst="last_text"))
    >>> found.heads(top=3)

    Args:
        dst: one position of each example; the paper takes the last token of the text, with prompts
            that end in the expression that is looked for.

    Maps are those of the view that shows the whole image. Differs: selection frequency has an
    interval over examples, where the paper draws five samples.

    Raises:
        InputError: from `read`, for prompts with several images.
        ValueError: from `read`, where visual tokens have no places (queries), or for more than one
            position.
    """

    dst: Any = "last_text"

    def part_of(self, numbers: range, n_examples: int) -> "LocalizationHeads":
        """The probe for some of the examples."""
        return LocalizationHeads(NormAttention(self.dst).part_of(numbers, n_examples).dst)

    def prepare(self, vlm: Model, inputs: Inputs) -> MapPlan:
        """Find the destinations and the patches."""
        dest, _, names, _ = NormAttention(self.dst).prepare(vlm, inputs)
        if dest.shape[1] != 1:
            raise ValueError(f"dst={self.dst!r} means {dest.shape[1]} positions; localization heads are those of one.")
        patches = []
        for row, tokens in enumerate(inputs.token_maps):
            if len(tokens.views) != 1:
                raise InputError(
                    f"Example {row} has {len(tokens.views)} images; localization heads are those of prompts with one."
                )
            if not tokens.patches:
                raise ValueError(tokens.layouts[0].reason)
            tokens.grids  # noqa: B018  (refuses an image that the model never sees as a whole)
            patches.append(tokens.views[0][0].positions)
        return MapPlan(dest, names[0], tuple(patches))

    def at_attention(self, plan: MapPlan, attended: Attended) -> Row:
        """Each head's map of the image, one example's after the other's, [head patch]."""
        rows = attention_rows(attended.parts, plan.dest)[:, :, 0]
        maps = [own[:, grid.flatten().to(own.device)] for own, grid in zip(rows, plan.patches, strict=True)]
        return {"maps": torch.cat(maps, -1)}

    def result(self, plan: MapPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> "LocalizationHeadsResult":
        """The image's attention and the maps' entropy; the maps themselves are not kept."""
        sums, entropies = [], []
        for layer in stack([row["maps"] for row in rows]):
            split = layer.split([grid.numel() for grid in plan.patches], -1)
            maps = [own.unflatten(-1, grid.shape) for own, grid in zip(split, plan.patches, strict=True)]
            sums.append(torch.stack([own.sum((-2, -1)) for own in maps]))
            entropies.append(torch.stack([spatial_entropy(own) for own in maps]))
        return LocalizationHeadsResult(stack(sums), stack(entropies), plan.name, vlm.name)


@dataclass(frozen=True, repr=False)
class LocalizationHeadsResult(Result):
    """How much each head looks at the image, and how scattered its map of it is.

    Attributes:
        image: S, the attention to the whole image's patches (0 to 1).
        entropy: H, of the map's bright regions (nats; infinity for a constant map).
        name: what the destination is called.
        model: the model's name.
    """

    units: ClassVar[str] = "entropy of a map's bright regions (nats)"

    image: Float[Tensor, "layer example head"]
    entropy: Float[Tensor, "layer example head"]
    name: str
    model: str

    def tau(self, skip_layers: int = SKIPPED) -> float:
        """The elbow of the heads' mean S: those below it hardly look at the image."""
        return elbow(self._later(skip_layers).mean(1).flatten())

    def selected(
        self, per_example: int = PER_EXAMPLE, skip_layers: int = SKIPPED
    ) -> Float[Tensor, "example layer head"]:
        """1 for the heads of lowest entropy of each example among those with S >= τ, else 0.

        Of heads with one entropy those with the larger S in the example come first; of those with
        the same S too, the earlier layer, then the lower head. A constant map is never selected.

        Raises:
            ValueError: for less than one head, or where no layer is left.
        """
        if per_example < 1:
            raise ValueError(f"per_example={per_example} was asked for: at least 1 head.")
        kept = self._later(skip_layers).mean(1) >= self.tau(skip_layers)
        n_layers, n, n_heads = self.image.shape
        chosen = torch.zeros(n, n_layers * n_heads)
        for example in range(n):
            entropy, image = self.entropy[skip_layers:, example].clone(), self.image[skip_layers:, example]
            entropy[~kept] = torch.inf
            by_image = image.flatten().argsort(descending=True, stable=True)
            order = by_image[entropy.flatten()[by_image].argsort(stable=True)]
            order = order[entropy.flatten()[order].isfinite()][:per_example]
            chosen[example, order + skip_layers * n_heads] = 1
        return chosen.reshape(n, n_layers, n_heads)

    def heads(self, top: int = 3, per_example: int = PER_EXAMPLE, skip_layers: int = SKIPPED) -> pd.DataFrame:
        """The heads that are selected most often.

        Heads of one frequency follow each other by layer, then by head.

        Returns:
            One row a head: layer, head, frequency (share of the examples that select it), and low
            and high, its 95 % bootstrap interval over examples (the draws have seed 0).

        Raises:
            ValueError: for less than one head, or where no layer is left.
        """
        return rank_heads(self.selected(per_example, skip_layers), top, "frequency")

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, example and head: image and entropy."""
        n_layers, n, n_heads = self.image.shape
        labels = {"layer": range(n_layers), "example": range(n), "head": range(n_heads)}
        frame = long_frame(self.image, **labels).rename(columns={"value": "image"})
        return self.with_ids(frame.assign(entropy=long_frame(self.entropy, **labels)["value"]))

    @plots(lambda self, **_: head_map_size(len(self.image), self.image.shape[2]))
    def plot(self, canvas: Canvas) -> None:
        """A map of how often each head is selected."""
        n_layers = len(self.image)
        values = self.selected(skip_layers=min(SKIPPED, n_layers - 1)).mean(0)
        head_map(canvas.ax, values, range(n_layers), "share of the examples", vmin=0, vmax=1)
        note = f"selected among the {PER_EXAMPLE} least scattered, for {text(self.name, 24)}; {n_examples(self.image.sum(2))}"
        canvas.head(f"Localization heads, {short_name(self.model)}", note)

    def _later(self, skip_layers: int) -> Tensor:
        if not 0 <= skip_layers < len(self.image):
            raise ValueError(
                f"skip_layers={skip_layers} was asked for, of {len(self.image)} layers: leave at least one."
            )
        return self.image[skip_layers:]
