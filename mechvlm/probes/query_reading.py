"""Where on the image each query reads: the Q-Former's cross-attention (InstructBLIP, Dai et al. 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from jaxtyping import Float
from torch import Tensor

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


@dataclass(frozen=True)
class QueryReading:
    """Probe: where on the image each query reads, [query row col], in the same forward as everything else."""

    reads: ClassVar[frozenset[str]] = frozenset({"queries"})

    def prepare(self, vlm, inputs):
        if not vlm.cross_attentions:
            raise ValueError(
                f"{vlm.record.hf_class} has no queries: its visual tokens are patches, and tokens.cell(position) says where "
                "each lies."
            )
        n_queries = len(inputs.token_maps[0].image)
        grid = inputs.token_maps[0].grids[0]
        return n_queries, grid.rows, grid.cols

    def at_queries(self, plan, layer, q, k, scale):
        n_queries, rows, cols = plan
        # The Q-Former's first positions are the queries, its last the instruction's; the encoder's first is its class token.
        weights = (q[:, :, :n_queries] @ k.transpose(-1, -2) * scale).float().softmax(-1).mean(1)
        return {"weight": weights[..., -rows * cols :].unflatten(-1, (rows, cols))}

    def result(self, plan, rows, vlm, inputs) -> QueryReadingResult:
        return QueryReadingResult(stack([row["weight"] for row in rows]), vlm.name)
