"""What the experiments have in common: examples one by one with their answers, and groups of positions by name."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.inputs.batch import Answers, Inputs, as_batches, by_batch
from mechvlm.inputs.tokens import TokenMap
from mechvlm.ndif.requests import together
from mechvlm.progress import track
from mechvlm.vlm.vlm import VLM


class Example(NamedTuple):
    """One example of an experiment: alone, without padding."""

    number: int
    inputs: Inputs
    answer: int | None

    def token(self, logits: Tensor) -> int:
        """The answer's first token: the one asked for, or else the model's own, from its clean logits."""
        return int(logits.argmax()) if self.answer is None else self.answer


class Examples(Sequence[Example]):
    """The examples of one or several batches, in their order."""

    def __init__(self, vlm: VLM, inputs: Inputs | Sequence, answers: Answers = None):
        batches = as_batches(inputs)
        self._rows = [(batch, row) for batch in batches for row in range(len(batch))]
        self._answers: list[int] | None = None
        if answers is not None:
            given = zip(batches, by_batch(batches, answers), strict=True)
            self._answers = [token for batch, some in given for token in vlm.answer_tokens(batch, some).tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self) -> list[list[Example]]:
        """The examples by the batch that they were given in."""
        numbers = range(len(self))
        return [[self[n] for n in some] for _, some in groupby(numbers, lambda n: id(self._rows[n][0]))]

    def __getitem__(self, number):
        batch, row = self._rows[number]
        return Example(number, batch[row], None if self._answers is None else self._answers[number])


def each(vlm: VLM, examples: "Examples", work: Callable, arguments: Callable[[Example], tuple], what: str) -> list:
    """work(vlm, example, *arguments(example)) of every example, in order, with a progress bar that says `what`.

    On NDIF the examples of one batch are one request, and only what `work` returns comes back.
    """
    groups = examples.batches() if vlm.remote else [[example] for example in examples]
    found = []
    for group in track(groups, what):
        found += together(vlm, _all, work, [(example, *arguments(example)) for example in group])
    return found


def _all(vlm: VLM, work: Callable, jobs: list[tuple]) -> list:
    return [work(vlm, *job) for job in jobs]


def positions(tokens: TokenMap, names: str) -> Int[Tensor, " n"]:
    """Positions by a name of `TokenMap.select`, or by several of them: "question + last".

    Raises:
        ValueError: for an unknown name or an empty group.
    """
    return torch.cat([tokens.select(name.strip()) for name in names.split("+")]).unique()
