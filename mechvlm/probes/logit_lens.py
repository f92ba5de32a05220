"""The logit lens: the k likeliest tokens of a state, as if it were the last one.

Every state goes through the model's final norm and unembedding, as only the last one does in the
model (nostalgebraist 2020; on visual tokens, Wei et al. 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.figures.style import LAYER, axes, position_ticks, style, text
from mechvlm.inputs.batch import Inputs
from mechvlm.probes.probe import Model, Row, State
from mechvlm.results import Result, stack

POSITIONS_PER_CHUNK = 1024
"""Positions unembedded at once, so that at most [POSITIONS_PER_CHUNK, d_vocab] logits exist.

Fewer than some 300 cost time: every chunk reads the whole unembedding matrix.
"""
ROWS_IN_CACHE = 32
"""Rows of logits that the CPU works on at once.

As many as its cache holds: 4 MB, where the vocabulary has 32,000 tokens.
"""
WORDS_UP_TO = 80
"""Positions up to which a picture shows the words; with more of them they would overlap."""


def top_tokens(
    states: Float[Tensor, "point d_model"], unembed, k: int
) -> tuple[Int[Tensor, "point k"], Float[Tensor, "point k"]]:
    """The k likeliest tokens of each state and their probabilities, likeliest first.

    softmax(unembed(state)), in float32. Logits are formed for `POSITIONS_PER_CHUNK` states at a
    time and dropped.

    Tested: equals softmax(unembed(states)).topk(k) of all states at once.
    """
    best = []
    for chunk in states.split(POSITIONS_PER_CHUNK):
        logits = unembed(chunk)
        blocks = logits.split(ROWS_IN_CACHE if logits.device.type == "cpu" else POSITIONS_PER_CHUNK)
        best += [block.float().softmax(-1).topk(k, dim=-1) for block in blocks]
    return torch.cat([top.indices for top in best]), torch.cat([top.values for top in best])


class LensPlan(NamedTuple):
    """The states that are read, and the points in each: an example and one of its positions."""

    layers: tuple[int, ...]
    example: Int[Tensor, " point"]
    position: Int[Tensor, " point"]


@dataclass(frozen=True)
class LogitLens:
    """Probe: the k likeliest tokens at chosen positions and layers.

    >>> (lens,) = mv.read(vlm, inputs, mv.LogitLens(k=5, positions="image"))
    >>> lens.of(0).pieces()[-1]  # the first example's tokens at the last layer, [point][k]

    Args:
        k: how many tokens per position.
        positions: by name ("image", "text", "all", "last", ...) or by number, the same for every
            example.
        layers: one state or several, 0 to n_layers; default all.
        final_norm: put states through the model's final norm first, as the model does before it
            unembeds. False unembeds them raw.

    The last layer's tokens and probabilities are the model's own: n_layers is the state before the
    final norm, normed once. (Hugging Face's last hidden state is normed already; norming it again
    is the usual mistake.)

    Raises:
        ValueError: from `read`, for a k, a layer or a position that is not there.
    """

    k: int = 5
    positions: str | Sequence[int] = "image"
    layers: int | Sequence[int] | None = None
    final_norm: bool = True

    def prepare(self, vlm: Model, inputs: Inputs) -> LensPlan:
        """Find the states and the points that are read."""
        if not 1 <= self.k <= vlm.d_vocab:
            raise ValueError(
                f"k={self.k} tokens were asked for; choose 1 to {vlm.d_vocab}, the size of the vocabulary."
            )
        given = range(vlm.n_layers + 1) if self.layers is None else self.layers
        layers = (given,) if isinstance(given, int) else tuple(given)
        bad = [layer for layer in layers if not 0 <= layer <= vlm.n_layers]
        if bad or not layers:
            raise ValueError(f"Layers {bad or '(none)'} were asked for; there are 0 (embeddings) to {vlm.n_layers}.")
        by_example = [tokens.select(self.positions) for tokens in inputs.token_maps]
        example = torch.cat([torch.full_like(positions, i) for i, positions in enumerate(by_example)])
        return LensPlan(tuple(sorted(set(layers))), example, torch.cat(by_example))

    def at_state(self, plan: LensPlan, state: State) -> Row | None:
        """The likeliest tokens of the points, [point k]."""
        if state.layer not in plan.layers:
            return None
        points = state.resid[plan.example.to(state.resid.device), plan.position.to(state.resid.device)]
        tokens, probs = top_tokens(state.final_norm(points) if self.final_norm else points, state.unembed, self.k)
        return {"tokens": tokens, "probs": probs}

    def result(self, plan: LensPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> "LogitLensResult":
        """The tokens with the tokenizer's pieces for them."""
        ids = stack([row["tokens"] for row in rows])
        distinct = ids.unique()
        vocabulary = tuple(zip(distinct.tolist(), vlm.to_str_tokens(distinct), strict=True))
        probs = stack([row["probs"] for row in rows])
        length = len(inputs.token_maps[0])
        return LogitLensResult(ids, probs, *plan, vocabulary, self.final_norm, vlm.name, length)


@dataclass(frozen=True, repr=False)
class LogitLensResult(Result):
    """Top-k tokens of chosen positions at chosen layers.

    The axis `point` holds the positions of all examples of the batch, one example after the other;
    `of(example)` takes those of one.

    Attributes:
        ids: token ids, likeliest first.
        probs: their probabilities (0 to 1).
        layers: the states that were read: 0 the embeddings, n_layers the state that the model
            itself unembeds.
        example, position: the example of each point, and its position there.
        vocabulary: the tokenizer's piece for every id in `ids`, as (id, piece) pairs.
        final_norm: whether states went through the model's final norm.
        model: the model's name.
        n_positions: the length of the padded sequences in which `position` counts; None in files of
            earlier versions.
    """

    units: ClassVar[str] = "probability"
    renamed: ClassVar[dict[str, str]] = {"tokens": "ids"}
    computed: ClassVar[tuple[str, ...]] = ("vocabulary",)

    ids: Int[Tensor, "layer point k"]
    probs: Float[Tensor, "layer point k"]
    layers: tuple[int, ...]
    example: Int[Tensor, " point"]
    position: Int[Tensor, " point"]
    vocabulary: tuple[tuple[int, str], ...]
    final_norm: bool
    model: str
    n_positions: int | None = None

    @property
    def seq_length(self) -> int | None:
        if self.n_positions is None:
            raise InputError(
                "This LogitLensResult comes from an earlier version, whose files do not say how far sequences were padded: "
                "its positions cannot be joined with others. Read it again."
            )
        return self.n_positions

    def padded(self, length: int) -> "LogitLensResult":
        return replace(self, position=self.position + length - (self.seq_length or 0), n_positions=length)

    def count_examples(self) -> int:
        held = sorted(set(self.example.tolist()))
        if held != list(range(len(held))) or (self.example_ids is not None and len(self.example_ids) != len(held)):
            raise InputError(
                f"A LogitLensResult holds only the examples {held} of its batch. Join whole results first, then take of(example)."
            )
        return len(held)

    @classmethod
    def joined(cls, results: Sequence["LogitLensResult"]) -> dict[str, Any]:
        """The examples' numbers, counted on, and the pieces of all ids."""
        starts = accumulate((result.count_examples() for result in results), initial=0)
        numbers = [result.example + start for result, start in zip(results, starts, strict=False)]
        pieces = sorted({pair for result in results for pair in result.vocabulary})
        return {"example": torch.cat(numbers), "vocabulary": tuple(pieces)}

    def of(self, example: int) -> "LogitLensResult":
        """One example's points, in the order of its positions.

        Raises:
            IndexError: when the result does not hold the example.
        """
        chosen = self.example == example
        if not chosen.any():
            raise IndexError(
                f"Example {example} was asked for; this result holds {sorted(set(self.example.tolist()))}."
            )
        return self._subset(chosen)

    def at(self, positions: Int[Tensor, " n"]) -> "LogitLensResult":
        """The points at these positions, of every example that has them."""
        return self._subset(torch.isin(self.position, positions))

    def _subset(self, chosen: Tensor) -> "LogitLensResult":
        ids, probs = self.ids[:, chosen], self.probs[:, chosen]
        return replace(self, ids=ids, probs=probs, example=self.example[chosen], position=self.position[chosen])

    def pieces(self) -> list[list[list[str]]]:
        """The tokens as the tokenizer's pieces, the `▁` of a word's start included.

        Nested lists, [layer][point][k].
        """
        name = dict(self.vocabulary)
        return [[[name[t] for t in point] for point in layer] for layer in self.ids.tolist()]

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, point and rank: example, position, token, piece, probability."""
        n_layers, n_points, k = self.ids.shape
        name = dict(self.vocabulary)
        ids = self.ids.reshape(-1).tolist()
        frame = pd.DataFrame(
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
        return self.with_ids(frame)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Each position's likeliest token at each layer, on the color of its probability.

        Of more than 80 positions the colors alone.
        """
        n_layers, n_points, _ = self.ids.shape
        with style():
            ax = axes(ax, width=min(2 + 0.5 * n_points, 24), height=1.6 + 0.28 * n_layers)
            top = self.probs[:, :, 0].numpy()  # [layer point]
            mesh = ax.imshow(top, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
            if n_points <= WORDS_UP_TO:
                self._write_words(ax, top)
            ax.set_yticks(range(n_layers), [str(layer) for layer in self.layers])
            position_ticks(ax, self.position.tolist())
            ax.set_ylabel(LAYER)
            ax.set_xlabel("position")
            dropped = "" if n_points <= WORDS_UP_TO else f" (words left out: {n_points} positions)"
            ax.set_title(f"Logit lens: likeliest token, {self.model}{dropped}")
            ax.grid(False)
            ax.figure.colorbar(mesh, ax=ax, label="probability", pad=0.01)
        return ax

    def _write_words(self, ax: Axes, top: np.ndarray) -> None:
        """Write the likeliest token of each cell into it; `top` holds the probabilities."""
        longest = 8 if self.ids.shape[1] <= 48 else 6
        for row, points in enumerate(self.pieces()):
            for col, pieces in enumerate(points):
                color = "white" if top[row, col] > 0.6 else "#222222"
                ax.text(col, row, text(pieces[0], longest), ha="center", va="center", fontsize=6, color=color)
