"""The logit lens: intermediate states through the unembedding (nostalgebraist 2020; on visual tokens, Wei et al. 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.results import Result, stack

CHUNK = 1024
"""Positions that are unembedded at once: bounds the logits that exist to CHUNK x d_vocab. Fewer than some 300 cost time: the
whole unembedding matrix is read for every chunk."""
CACHED = 32
"""On the CPU, rows of logits that are worked on at once: what the cache holds (4 MB of 32,000 logits each)."""


def top_tokens(
    states: Float[Tensor, "point d_model"], unembed, k: int
) -> tuple[Int[Tensor, "point k"], Float[Tensor, "point k"]]:
    """The k likeliest tokens of each state and their probabilities, softmax(unembed(state)), likeliest first.

    The softmax runs in float32; logits are formed for `CHUNK` states at a time and dropped.
    Tested: equals softmax(unembed(states)).topk(k) of all states at once.
    """
    found = []
    for part in states.split(CHUNK):
        logits = unembed(part)
        rows = logits.split(CACHED if logits.device.type == "cpu" else CHUNK)
        found += [some.float().softmax(-1).topk(k, dim=-1) for some in rows]
    return torch.cat([best.indices for best in found]), torch.cat([best.values for best in found])


@dataclass(frozen=True, repr=False)
class LogitLensResult(Result):
    """Top-k tokens of chosen positions at chosen layers.

    The positions of all examples of the batch stand behind each other on the axis `point`; `of(example)` takes one's.

    Attributes:
        tokens: token ids, likeliest first.
        probs: their probabilities (0 to 1).
        layers: the states read: 0 the embeddings, n_layers what the model itself unembeds.
        example, position: where each point is from.
        vocabulary: the tokenizer's piece for every id in `tokens`, as (id, piece) pairs.
        final_norm: whether states went through the model's final norm.
        model: the model's name.
    """

    units: ClassVar[str] = "probability"

    tokens: Int[Tensor, "layer point k"]
    probs: Float[Tensor, "layer point k"]
    layers: tuple[int, ...]
    example: Int[Tensor, " point"]
    position: Int[Tensor, " point"]
    vocabulary: tuple[tuple[int, str], ...]
    final_norm: bool
    model: str

    def of(self, example: int) -> "LogitLensResult":
        """One example's points, in the order of its positions.

        Raises:
            IndexError: when the result holds no such example.
        """
        mine = self.example == example
        if not mine.any():
            raise IndexError(
                f"Example {example} was asked for; this result holds {sorted(set(self.example.tolist()))}."
            )
        return self._points(mine)

    def at(self, positions: Int[Tensor, " n"]) -> "LogitLensResult":
        """The points at these positions, of every example that has them."""
        return self._points(torch.isin(self.position, positions))

    def _points(self, mine: Tensor) -> "LogitLensResult":
        return LogitLensResult(
            self.tokens[:, mine], self.probs[:, mine], self.layers, self.example[mine], self.position[mine],
            self.vocabulary, self.final_norm, self.model,
        )  # fmt: skip

    def pieces(self) -> list[list[list[str]]]:
        """The tokens as the tokenizer's pieces, `▁` and all: [layer][point][k]."""
        name = dict(self.vocabulary)
        return [[[name[t] for t in point] for point in layer] for layer in self.tokens.tolist()]

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, point and rank: example, position, token, piece, probability."""
        n_layers, n_points, k = self.tokens.shape
        name = dict(self.vocabulary)
        ids = self.tokens.reshape(-1).tolist()
        return pd.DataFrame(
            {
                "layer": [layer for layer in self.layers for _ in range(n_points * k)],
                "example": self.example.repeat_interleave(k).repeat(n_layers).numpy(),
                "position": self.position.repeat_interleave(k).repeat(n_layers).numpy(),
                "rank": list(range(1, k + 1)) * (n_layers * n_points),
                "token": ids,
                "piece": [name[i] for i in ids],
                "probability": self.probs.reshape(-1).numpy(),
            }
        )


@dataclass(frozen=True)
class LogitLens:
    """Probe: the k likeliest tokens at chosen positions and layers.

    Args:
        k: how many tokens a position.
        positions: by name ("image", "text", "all", "last", ...) or numbers, the same for every example.
        layers: states 0 to n_layers; default all.
        final_norm: put states through the model's final norm first, as the model does before it unembeds. False
            unembeds them raw.

    The last layer's tokens and probabilities are the model's own: n_layers is the state before the final norm, normed
    once. (Hugging Face's last hidden state is normed already; norming it again is the usual mistake.)
    """

    k: int = 5
    positions: str | Sequence[int] = "image"
    layers: Sequence[int] | None = None
    final_norm: bool = True

    reads: ClassVar[frozenset[str]] = frozenset({"states"})

    def prepare(self, vlm, inputs):
        if not 1 <= self.k <= vlm.d_vocab:
            raise ValueError(
                f"k={self.k} tokens were asked for; choose 1 to {vlm.d_vocab}, the size of the vocabulary."
            )
        layers = tuple(range(vlm.n_layers + 1)) if self.layers is None else tuple(self.layers)
        bad = [layer for layer in layers if not 0 <= layer <= vlm.n_layers]
        if bad or not layers:
            raise ValueError(f"Layers {bad or '(none)'} were asked for; there are 0 (embeddings) to {vlm.n_layers}.")
        found = [m.select(self.positions) for m in inputs.token_maps]
        example = torch.cat([torch.full_like(p, i) for i, p in enumerate(found)])
        return tuple(sorted(set(layers))), example, torch.cat(found)

    def at_state(self, plan, state):
        layers, example, position = plan
        if state.layer not in layers:
            return None
        points = state.resid[example.to(state.resid.device), position.to(state.resid.device)]
        tokens, probs = top_tokens(state.final_norm(points) if self.final_norm else points, state.unembed, self.k)
        return {"tokens": tokens, "probs": probs}

    def result(self, plan, rows, vlm, inputs) -> LogitLensResult:
        layers, example, position = plan
        tokens = stack([row["tokens"] for row in rows])
        ids = tokens.unique().tolist()
        pieces = vlm.tokenizer.convert_ids_to_tokens(ids)
        # Vocabularies are padded: ids past the tokenizer's last have no piece.
        vocabulary = tuple((i, p if p is not None else f"<{i}>") for i, p in zip(ids, pieces, strict=True))
        probs = stack([row["probs"] for row in rows])
        return LogitLensResult(tokens, probs, layers, example, position, vocabulary, self.final_norm, vlm.name)
