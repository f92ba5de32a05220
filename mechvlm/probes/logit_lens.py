"""The logit lens: the k likeliest tokens of a state, as if it were the last one.

Every state goes through the model's final norm and unembedding, as only the last one does in the
model (nostalgebraist 2020; on visual tokens, Wei et al. 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.errors import InputError, refuse_renamed
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.numbers import shortened, state_numbers, whole_numbers
from mechvlm.inputs.selections import part_of_selection, positions_of
from mechvlm.probes.lens_picture import LensPicture
from mechvlm.probes.likeliest import top_tokens
from mechvlm.probes.probe import Model, Row, State
from mechvlm.results import Result, stack


class LensPlan(NamedTuple):
    """The states that are read, and the points in each: an example and one of its positions."""

    states: tuple[int, ...]
    example: Int[Tensor, " point"]
    position: Int[Tensor, " point"]


@refuse_renamed(layers="states")
@dataclass(frozen=True)
class LogitLens:
    """Probe: the k likeliest tokens of chosen states at chosen positions.

    >>> (lens,) = mv.read(vlm, inputs, mv.LogitLens(k=5, positions="image"))
    >>> lens.words(state=8, row=3, col=4)  # what that patch reads as, with probabilities

    Args:
        k: how many tokens per position.
        positions: by name ("image", "text", "all", "last", ...), by a word of the text, or by
            number; or a list with one of these per example (`mechvlm.inputs.selections`).
        states: one or several, 0 (embeddings) to n_layers, negative from the end; default all.
        final_norm: put states through the model's final norm first, as the model does before it
            unembeds. False unembeds them raw.

    The last state's tokens and probabilities are the model's own: n_layers is the state before the
    final norm, normed once. (Hugging Face's last hidden state is normed already; norming it again
    is the usual mistake.)

    Raises:
        TypeError: for the option's earlier name, `layers`.
        ValueError: from `read`, for a k, a state or a position that is not there.
    """

    k: int = 5
    positions: Any = "image"
    states: Any = None
    final_norm: bool = True

    def part_of(self, numbers: range, n_examples: int) -> "LogitLens":
        """The probe for some of the examples."""
        return replace(self, positions=part_of_selection(self.positions, numbers, n_examples, "positions"))

    def prepare(self, vlm: Model, inputs: Inputs) -> LensPlan:
        """Find the states and the points that are read."""
        if not 1 <= self.k <= vlm.d_vocab:
            raise ValueError(
                f"k={self.k} tokens were asked for; choose 1 to {vlm.d_vocab}, the size of the vocabulary."
            )
        given = range(vlm.n_layers + 1) if self.states is None else self.states
        states = tuple(state_numbers(given, vlm.n_layers, "LogitLens"))
        by_example = positions_of(self.positions, inputs, "positions")
        example = torch.cat([torch.full_like(positions, i) for i, positions in enumerate(by_example)])
        return LensPlan(states, example, torch.cat(by_example))

    def at_state(self, plan: LensPlan, state: State) -> Row | None:
        """The likeliest tokens of the points, [point k]."""
        if state.number not in plan.states:
            return None
        points = state.resid[plan.example.to(state.resid.device), plan.position.to(state.resid.device)]
        tokens, probs = top_tokens(state.final_norm(points) if self.final_norm else points, state.unembed, self.k)
        return {"tokens": tokens, "probs": probs}

    def result(self, plan: LensPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> "LogitLensResult":
        """The tokens with their texts, and the points' places in the sequence and the image."""
        ids = stack([row["tokens"] for row in rows])
        distinct = torch.bincount(ids.flatten()).nonzero()[:, 0]  # no sort, of 10^6 ids perhaps
        vocabulary = tuple(zip(distinct.tolist(), vlm.to_str_tokens(distinct), strict=True))
        probs = stack([row["probs"] for row in rows])
        patches = all(tokens.patches for tokens in inputs.token_maps)
        cells = torch.stack([tokens.whole_cells for tokens in inputs.token_maps])[plan.example, plan.position]
        length = len(inputs.token_maps[0])
        return LogitLensResult(ids, probs, *plan, vocabulary, self.final_norm, vlm.name, cells, patches, length)


@dataclass(frozen=True, repr=False)
class LogitLensResult(LensPicture, Result):
    """Top-k tokens of chosen states at chosen positions.

    >>> lens.words(state=8, row=3, col=4)   # of a patch
    >>> lens.words(state=8, position=-1)    # of the last token

    The axis `point` holds the positions of all examples of the batch, one example after the other;
    `of(example)` takes those of one.

    Attributes:
        ids: token ids, likeliest first.
        probs: their probabilities (0 to 1).
        states: those that were read: 0 the embeddings, n_layers the one that the model itself
            unembeds.
        example, position: the example of each point, and its position in the (padded) sequence.
        vocabulary: the text of every id in `ids`, as (id, text) pairs.
        final_norm: whether states went through the model's final norm.
        model: the model's name.
        cells: (image, row, col) of each point's patch; -1 where it is none. None in files of
            earlier versions.
        patches: False where visual tokens have no place on the image, as queries.
        n_positions: the length of the padded sequences in which `position` counts; None in files of
            earlier versions.
    """

    units: ClassVar[str] = "probability"
    renamed: ClassVar[dict[str, str]] = {"tokens": "ids", "layers": "states"}
    texts: ClassVar[tuple[str, ...]] = ("vocabulary",)
    computed: ClassVar[tuple[str, ...]] = ("vocabulary",)

    ids: Int[Tensor, "state point k"]
    probs: Float[Tensor, "state point k"]
    states: tuple[int, ...]
    example: Int[Tensor, " point"]
    position: Int[Tensor, " point"]
    vocabulary: tuple[tuple[int, str], ...]
    final_norm: bool
    model: str
    cells: Int[Tensor, "point 3"] | None = None
    patches: bool = True
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

    def of(self, example: Any) -> "LogitLensResult":
        """The points of one example or several (a number, a list, a range, an array, a tensor).

        Raises:
            IndexError: for an example that the result does not hold.
        """
        numbers = whole_numbers(example, "example")
        held = sorted(set(self.example.tolist()))
        if missing := [number for number in numbers if number not in held]:
            raise IndexError(f"Example {shortened(missing)} was asked for; this result holds {shortened(held)}.")
        return self._subset(torch.isin(self.example, torch.tensor(numbers)))

    def at(self, positions: Any) -> "LogitLensResult":
        """The points at these positions, of every example that has them.

        Args:
            positions: a number, a list, a range, an array or a tensor; negative from the end.

        Raises:
            IndexError: for a position that no example of this result has.
        """
        numbers = whole_numbers(positions, "positions")
        if any(number < 0 for number in numbers):
            numbers = [number + (self.seq_length or 0) if number < 0 else number for number in numbers]
        if missing := sorted(set(numbers) - set(self.position.tolist())):
            read = shortened(sorted(set(self.position.tolist())))
            raise IndexError(f"Positions {shortened(missing)} were not read; the lens holds {read}.")
        return self._subset(torch.isin(self.position, torch.tensor(numbers)))

    def single(self, example: int) -> "LogitLensResult":
        """The points of one example, which keep its number."""
        return self.of(example)

    def _subset(self, chosen: Tensor) -> "LogitLensResult":
        by_point = {"example", "position", "cells"}
        values = {name: getattr(self, name) for name in by_point}
        values = {name: None if value is None else value[chosen] for name, value in values.items()}
        return replace(self, ids=self.ids[:, chosen], probs=self.probs[:, chosen], **values)

    def words(
        self,
        state: int,
        position: int | None = None,
        *,
        row: int | None = None,
        col: int | None = None,
        image: int = 0,
        example: int | None = None,
    ) -> pd.Series:
        """The k words that a state reads as, likeliest first, with their probabilities (0 to 1).

        >>> lens.words(state=8, row=3, col=4)
        red       0.91
        circle    0.04

        Args:
            state: its number, 0 (embeddings) to n_layers.
            position: in the sequence, as a `TokenMap` gives it; negative from the end.
            row: of a patch, instead of a position.
            col: of the same patch.
            image: which of the prompt's images `row` and `col` are of.
            example: which of the batch; by default the only one that this result holds.

        Returns:
            Probabilities by word, without the space before it.

        Raises:
            IndexError: for a state, position, patch or example that was not read; it says which
                were.
            ValueError: without a place, for two places at once, for several examples and none
                chosen, and for rows and columns where visual tokens are queries.
        """
        example = self._only(example, "words")
        at, point = self._state(state), self._point(position, row, col, image, example)
        name = dict(self.vocabulary)
        shown = [name[i].strip(" ") or name[i] for i in self.ids[at, point].tolist()]
        return pd.Series(self.probs[at, point].tolist(), index=pd.Index(shown, name="word"), name="probability")

    def pieces(self, example: int | None = None) -> dict[int, dict[int, list[str]]]:
        """The texts of one example's tokens: {state: {position: [the k texts]}}.

        Keys are the states' own numbers and the positions in the sequence. A text keeps the space
        that it begins with.

        >>> lens.pieces(example=0)[8][5]
        [' red', ' circle']

        Args:
            example: which of the batch; by default the only one that this result holds.

        Raises:
            ValueError: for several examples and none chosen.
            IndexError: for an example that was not read.
        """
        own = self.of(self._only(example, "pieces"))
        name, positions = dict(self.vocabulary), own.position.tolist()
        return {
            state: {p: [name[i] for i in ids] for p, ids in zip(positions, points, strict=True)}
            for state, points in zip(own.states, own.ids.tolist(), strict=True)
        }

    def _state(self, state: int) -> int:
        if state not in self.states:
            raise IndexError(f"State {state} was not read; the lens holds the states {shortened(list(self.states))}.")
        return self.states.index(state)

    def _only(self, example: int | None, call: str) -> int:
        """The example, or the only one that this result holds."""
        held = sorted(set(self.example.tolist()))
        if example is None and len(held) > 1:
            raise ValueError(f"This result holds the examples {shortened(held)}: choose one, {call}(..., example=...).")
        return held[0] if example is None else example

    def _point(self, position: int | None, row: int | None, col: int | None, image: int, example: int) -> int:
        """The number of the point at a place, along the axis `point`."""
        if (position is None) == (row is None) or (row is None) != (col is None):
            raise ValueError(
                f"words() takes a position, or the row and col of a patch, not position={position}, row={row}, col={col}."
            )
        if position is None:
            places, kind = self._patches(), "(image, row, col)"
            place: tuple = (image, row, col)
        else:
            places, place, kind = self.position[:, None], (position,), "positions"
            places = places - (self.seq_length or 0) if position < 0 else places
        self.of(example)  # refuses an example that was not read
        own = self.example == example
        match = (own & (places == torch.tensor(place)).all(-1)).nonzero()[:, 0].tolist()
        if not match:
            held = [tuple(p) if position is None else p[0] for p in places[own].tolist() if position or p[-1] >= 0]
            named = f"Position {position}" if row is None else f"The patch at row {row}, col {col} of image {image}"
            there = f"the {kind} {shortened(held)}" if held else f"no {kind}"
            raise IndexError(f"{named} was not read; of example {example} the lens holds {there}.")
        return match[0]

    def _patches(self) -> Int[Tensor, "point 3"]:
        if not self.patches:
            raise ValueError(
                "These visual tokens have no row and column, as queries: each reads the whole image. Give a position, and see "
                "mechvlm.query_reading for where a Q-Former's query reads."
            )
        if self.cells is None:
            raise ValueError("This lens was saved by an earlier version, without rows and columns: give a position.")
        return self.cells

    def to_frame(self) -> pd.DataFrame:
        """One row per state, point and rank: example, position, token, its text, probability."""
        n_states, n_points, k = self.ids.shape
        name = dict(self.vocabulary)
        ids = self.ids.reshape(-1).tolist()
        frame = pd.DataFrame(
            {
                "state": [state for state in self.states for _ in range(n_points * k)],
                "example": self.example.repeat_interleave(k).repeat(n_states).numpy(),
                "position": self.position.repeat_interleave(k).repeat(n_states).numpy(),
                "rank": list(range(1, k + 1)) * (n_states * n_points),
                "token": ids,
                "piece": [name[i] for i in ids],
                "probability": self.probs.reshape(-1).numpy(),
            }
        )
        return self.with_ids(frame)
