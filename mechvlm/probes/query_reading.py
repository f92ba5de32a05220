"""Where on the image each query reads: the cross-attention of InstructBLIP's Q-Former.

The Q-Former (Dai et al. 2023) turns the patches into a few queries, which are the visual tokens.
A query has no place on the image. Its attention weights over the patches say where it reads.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.headings import short_name
from mechvlm.figures.style import HEAT, color_bar, no_ticks
from mechvlm.inputs.batch import Inputs
from mechvlm.probes.probe import Model, Queried, Row
from mechvlm.results import Result, long_frame, stack


class QueryPlan(NamedTuple):
    """The number of queries, and the grid of patches that they read."""

    n_queries: int
    rows: int
    cols: int


@dataclass(frozen=True)
class QueryReading:
    """Probe: where on the image each query reads.

    The result holds the weights [layer example query row col] of every cross-attention, means over
    its heads.

    >>> (reading,) = mv.read(vlm, inputs, mv.QueryReading())
    >>> reading.map[0, 3]  # where query 3 of the first example reads, [row col]

    Raises:
        ValueError: from `read`, for a model whose visual tokens are patches.
    """

    def prepare(self, vlm: Model, inputs: Inputs) -> QueryPlan:
        """Count the queries, and find the grid that they read."""
        tokens = inputs.token_maps[0]
        if not vlm.cross_attentions and not tokens.patches:
            raise ValueError(
                f"Where the visual tokens of {vlm.record.hf_class} read the image cannot be read: they come from no Q-Former. "
                f"{tokens.layouts[0].reason}"
            )
        if not vlm.cross_attentions:
            raise ValueError(
                f"{vlm.record.hf_class} has no queries: its visual tokens are patches, and tokens.cell(position) says where "
                "each lies."
            )
        n_queries = len(inputs.token_maps[0].image)
        grid = inputs.token_maps[0].grids[0]
        return QueryPlan(n_queries, grid.rows, grid.cols)

    def at_queries(self, plan: QueryPlan, queried: Queried) -> Row:
        """The weights of the queries on the patches, [example query row col], means over heads."""
        q, k, scale = queried.parts.q, queried.parts.k, queried.parts.scale
        # q [batch head pos d_head] holds the queries first, then the instruction's tokens;
        # k [batch head src d_head] holds the encoder's class token first, then the patches.
        weights = (q[:, :, : plan.n_queries] @ k.transpose(-1, -2) * scale).float().softmax(-1).mean(1)
        return {"weight": weights[..., -plan.rows * plan.cols :].unflatten(-1, (plan.rows, plan.cols))}

    def result(self, plan: QueryPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> "QueryReadingResult":
        """The weights of all cross-attentions."""
        return QueryReadingResult(stack([row["weight"] for row in rows]), vlm.name)


@dataclass(frozen=True, repr=False)
class QueryReadingResult(Result):
    """The cross-attention weights of the queries over the image's patches.

    Attributes:
        weight: by cross-attention layer of the Q-Former, mean over its heads (0 to 1). The rest to
            1 lies on the vision encoder's class token, which has no place.
        model: the model's name.
    """

    units: ClassVar[str] = "attention weight"

    weight: Float[Tensor, "layer example query row col"]
    model: str

    @property
    def map(self) -> Float[Tensor, "example query row col"]:
        """Mean over the cross-attention layers: where each query reads."""
        return self.weight.mean(0)

    def to_frame(self) -> pd.DataFrame:
        """One row per cross-attention layer, example, query, row and col."""
        names = ("layer", "example", "query", "row", "col")
        labels = {name: range(n) for name, n in zip(names, self.weight.shape, strict=True)}
        return self.with_ids(long_frame(self.weight, **labels))

    @plots((6, 5.2))
    def plot(self, canvas: Canvas) -> None:
        """Where each query of the first example reads: one small map per query, in their order."""
        maps = self.map[0].numpy()
        n_queries, rows, cols = maps.shape
        across = int(np.ceil(np.sqrt(n_queries)))
        corners = [((i // across) * (rows + 1), (i % across) * (cols + 1)) for i in range(n_queries)]
        ax = canvas.ax
        mesh = ax.imshow(tiled(maps, corners), cmap=HEAT, vmin=0, interpolation="nearest", origin="upper")
        for query, (top, left) in enumerate(corners):
            at = left - 0.4, top - 0.4
            ax.text(
                *at, str(query), fontsize="xx-small", va="top", color="#222222", clip_on=True,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )  # fmt: skip
        no_ticks(ax)
        canvas.head(
            f"Where each query reads, {short_name(self.model)}",
            "" if self.map.shape[0] == 1 else "example 0, the first",
        )
        color_bar(ax, mesh, "attention weight (mean over layers and heads)")


def tiled(maps: np.ndarray, corners: list[tuple[int, int]]) -> np.ndarray:
    """All maps [query row col] in one picture, each at its (top, left) corner; NaN between them."""
    _, rows, cols = maps.shape
    tops, lefts = zip(*corners, strict=True)
    picture = np.full((max(tops) + rows, max(lefts) + cols), np.nan)
    for query_map, (top, left) in zip(maps, corners, strict=True):
        picture[top : top + rows, left : left + cols] = query_map
    return picture
