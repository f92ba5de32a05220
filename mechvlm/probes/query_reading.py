"""Where on the image each query reads: the Q-Former's cross-attention (InstructBLIP, Dai et al. 2023)."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.figures.style import HEAT, axes, style
from mechvlm.inputs.batch import Inputs
from mechvlm.probes.probe import Model, Queried, Row
from mechvlm.results import Result, long_frame, stack


@dataclass(frozen=True, repr=False)
class QueryReadingResult(Result):
    """The cross-attention weights of the queries over the image's patches.

    Attributes:
        weight: by cross-attention layer of the Q-Former, mean over its heads. The rest to 1 lies on the vision encoder's
            class token, which has no place.
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
        return long_frame(self.weight, **{name: range(n) for name, n in zip(names, self.weight.shape, strict=True)})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Where each query of the first example reads: small maps in one tiling, in the order of the queries."""
        with style():
            maps = self.map[0].numpy()
            n, rows, cols = maps.shape
            across = int(np.ceil(np.sqrt(n)))
            down = int(np.ceil(n / across))
            tiled = np.full((down * (rows + 1) - 1, across * (cols + 1) - 1), np.nan)
            for i, one in enumerate(maps):
                top, left = (i // across) * (rows + 1), (i % across) * (cols + 1)
                tiled[top : top + rows, left : left + cols] = one
            ax = axes(ax, width=6, height=5.2)
            mesh = ax.imshow(tiled, cmap=HEAT, vmin=0, interpolation="nearest")
            for i in range(n):
                ax.text(
                    (i % across) * (cols + 1) - 0.4, (i // across) * (rows + 1) - 0.4, str(i), fontsize=6, va="top",
                    color="#0072B2", weight="bold",
                )  # fmt: skip
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            ax.set_title(f"Where each query reads, example 0, {self.model}")
            ax.figure.colorbar(mesh, ax=ax, label="attention weight (mean over layers and heads)", pad=0.02)
        return ax


class QueryPlan(NamedTuple):
    """How many queries there are, and the grid of patches that they read."""

    n_queries: int
    rows: int
    cols: int


@dataclass(frozen=True)
class QueryReading:
    """Probe: where on the image each query reads, [query row col], in the same forward as everything else."""

    def prepare(self, vlm: Model, inputs: Inputs) -> QueryPlan:
        """How many queries there are, and on which grid they read."""
        if not vlm.cross_attentions:
            raise ValueError(
                f"{vlm.record.hf_class} has no queries: its visual tokens are patches, and tokens.cell(position) says where "
                "each lies."
            )
        n_queries = len(inputs.token_maps[0].image)
        grid = inputs.token_maps[0].grids[0]
        return QueryPlan(n_queries, grid.rows, grid.cols)

    def at_queries(self, plan: QueryPlan, queried: Queried) -> Row:
        """The queries' weights on the patches, mean over heads."""
        q, k, _, _, scale = queried.parts
        # The Q-Former's first positions are the queries, its last the instruction's; the encoder's first is its class token.
        weights = (q[:, :, : plan.n_queries] @ k.transpose(-1, -2) * scale).float().softmax(-1).mean(1)
        return {"weight": weights[..., -plan.rows * plan.cols :].unflatten(-1, (plan.rows, plan.cols))}

    def result(self, plan: QueryPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> QueryReadingResult:
        """The weights of all cross-attentions."""
        return QueryReadingResult(stack([row["weight"] for row in rows]), vlm.name)
