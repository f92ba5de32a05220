"""Shared by the experiments: single examples with their answers, and named groups of positions."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import Answers, as_batches, by_batch
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
    """The examples of one or several batches, in their order.

    Attributes:
        ids: their names, or None.
    """

    def __init__(self, vlm: VLM, inputs: Any, answers: Answers = None):
        self._batches = as_batches(inputs)
        self.ids = self._batches.ids
        self._starts = list(accumulate(self._batches.sizes, initial=0))
        self._prepared: dict[int, Inputs] = {}
        self._answers: list[int] | None = None
        if answers is not None:
            pairs = zip(self._batches, by_batch(self._batches, answers), strict=True)
            self._answers = [token for batch, words in pairs for token in vlm.answer_tokens(batch, words).tolist()]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(f"Example {number} was asked for; there are 0 to {len(self) - 1}.")
        at = next(at for at, stop in enumerate(self._starts[1:]) if number < stop)
        answer = None if self._answers is None else self._answers[number]
        return Example(number, self._batch(at)[number - self._starts[at]], answer)

    def _batch(self, at: int) -> Inputs:
        """A batch. Two are kept, since causal tracing also takes images of the next one."""
        if at not in self._prepared:
            self._prepared = dict([*self._prepared.items()][-1:]) | {at: self._batches[at]}
        return self._prepared[at]

    def by_batch(self) -> list[range]:
        """The numbers of each batch's examples."""
        return [range(start, stop) for start, stop in pairwise(self._starts)]


def for_each(vlm: VLM, examples: Examples, work: Callable, arguments: Callable[[Example], tuple], label: str) -> list:
    """work(vlm, example, *arguments(example)) of every example, in order, under a progress bar.

    On NDIF the examples of one batch are one request, and only what `work` returns comes back.
    """
    groups = examples.by_batch() if vlm.remote else [range(number, number + 1) for number in range(len(examples))]
    results = []
    for group in track(groups, label):
        jobs = [(example, *arguments(example)) for example in map(examples.__getitem__, group)]
        results += in_one_request(vlm, _run_all, work, jobs)
    return results


def _run_all(vlm: VLM, work: Callable, jobs: list[tuple]) -> list:
    return [work(vlm, *job) for job in jobs]


def positions(tokens: TokenMap, names: str) -> Int[Tensor, " n"]:
    """Positions by a name of `TokenMap.select`, or by several of them: "question + last".

    Raises:
        ValueError: for an unknown name or an empty group.
    """
    return torch.cat([tokens.select(name.strip()) for name in names.split("+")]).unique()
