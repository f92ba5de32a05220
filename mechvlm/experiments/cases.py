"""Shared by the experiments: single examples with their answers, and named groups of positions."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.inputs.batch import Answers, Inputs, as_batches, by_batch
from mechvlm.inputs.tokens import TokenMap
from mechvlm.ndif.requests import in_one_request
from mechvlm.progress import track
from mechvlm.vlm.vlm import VLM


class Example(NamedTuple):
    """One example of an experiment, alone and without padding.

    number: its place among all examples.
    answer: the token id of the given answer, or None to follow the model's own.
    """

    number: int
    inputs: Inputs
    answer: int | None

    def token(self, logits: Tensor) -> int:
        """The id of the answer's first token: the given one, else the model's own.

        `logits` [d_vocab] are those of the last position in the clean forward.
        """
        return int(logits.argmax()) if self.answer is None else self.answer


class Examples(Sequence[Example]):
    """The examples of one or several batches, in their order."""

    def __init__(self, vlm: VLM, inputs: Inputs | Sequence, answers: Answers = None):
        batches = as_batches(inputs)
        self._rows = [(batch, row) for batch in batches for row in range(len(batch))]
        self._answers: list[int] | None = None
        if answers is not None:
            pairs = zip(batches, by_batch(batches, answers), strict=True)
            self._answers = [token for batch, words in pairs for token in vlm.answer_tokens(batch, words).tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number):
        batch, row = self._rows[number]
        return Example(number, batch[row], None if self._answers is None else self._answers[number])

    def batches(self) -> list[list[Example]]:
        """The examples, grouped by the batch that they came in."""
        grouped = groupby(range(len(self)), lambda number: id(self._rows[number][0]))
        return [[self[number] for number in numbers] for _, numbers in grouped]


def for_each(vlm: VLM, examples: Examples, work: Callable, arguments: Callable[[Example], tuple], label: str) -> list:
    """work(vlm, example, *arguments(example)) of every example, in order, under a progress bar.

    On NDIF the examples of one batch are one request, and only what `work` returns comes back.
    """
    groups = examples.batches() if vlm.remote else [[example] for example in examples]
    results = []
    for group in track(groups, label):
        results += in_one_request(vlm, _run_all, work, [(example, *arguments(example)) for example in group])
    return results


def _run_all(vlm: VLM, work: Callable, jobs: list[tuple]) -> list:
    return [work(vlm, *job) for job in jobs]


def positions(tokens: TokenMap, names: str) -> Int[Tensor, " n"]:
    """Positions by a name of `TokenMap.select`, or by several of them: "question + last".

    Raises:
        ValueError: for an unknown name or an empty group.
    """
    return torch.cat([tokens.select(name.strip()) for name in names.split("+")]).unique()
