"""What the experiments have in common: examples one by one with their answers, and groups of positions by name."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.answers import answer_tokens
from mechvlm.errors import InputError
from mechvlm.inputs import Inputs
from mechvlm.tokens import TokenMap
from mechvlm.vlm import VLM

Answers = str | int | Sequence[str | int] | None


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
        batches = [inputs] if isinstance(inputs, Inputs) else list(inputs)
        strange = [type(b).__name__ for b in batches if not isinstance(b, Inputs)]
        if strange or not batches:
            raise InputError(
                f"Give what vlm.inputs(images, prompts) gives, or a list of it; got {strange or 'nothing'}."
            )
        self._rows = [(batch, row) for batch in batches for row in range(len(batch))]
        self._answers: list[int] | None = None
        if answers is not None:
            each = [answers] * len(self) if isinstance(answers, str | int) else list(answers)
            if len(each) != len(self):
                raise InputError(
                    f"{len(each)} answers were given for {len(self)} examples: give one for all, or one each."
                )
            given = iter(each)
            self._answers = [
                t for b in batches for t in answer_tokens(vlm, b, [next(given) for _ in range(len(b))]).tolist()
            ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number):
        batch, row = self._rows[number]
        return Example(number, batch[row], None if self._answers is None else self._answers[number])


def positions(tokens: TokenMap, names: str) -> Int[Tensor, " n"]:
    """Positions by a name of `TokenMap.select`, or by several of them: "question + last".

    Raises:
        ValueError: for an unknown name or an empty group.
    """
    return torch.cat([tokens.select(name.strip()) for name in names.split("+")]).unique()
