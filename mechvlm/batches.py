"""What an experiment is given: one batch or a list of them, and whose answers are whose."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.answers import answer_tokens
from mechvlm.errors import InputError
from mechvlm.inputs import Inputs

Answers = str | int | Sequence[str | int] | Tensor | None
"""A word or a token id for all examples, or one per example; None for the model's own."""


def as_batches(inputs: Any) -> list[Inputs]:
    """One batch, or several, as a list.

    Raises:
        InputError: for anything else, or an empty list.
    """
    batches = [inputs] if isinstance(inputs, Inputs) else list(inputs)
    strange = sorted({type(one).__name__ for one in batches if not isinstance(one, Inputs)})
    if strange or not batches:
        raise InputError(
            f"Give what vlm.inputs(images, prompts) gives, or a list of such batches, not {strange or 'an empty list'}."
        )
    return batches


def by_batch(batches: Sequence[Inputs], answers: Answers) -> list[Any]:
    """The answers of each batch, where a sequence holds one for every example of all batches in order.

    Raises:
        InputError: for another number of answers than examples.
    """
    answers = answers.tolist() if isinstance(answers, Tensor) else answers
    if answers is None or isinstance(answers, str | int):
        return [answers] * len(batches)
    given, sizes = list(answers), [len(one) for one in batches]
    if len(given) != sum(sizes):
        raise InputError(
            f"{len(given)} answers were given for {sum(sizes)} examples: give one for all, or one each, over all batches "
            "in order."
        )
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [given[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def measured_tokens(vlm, inputs: Inputs, answers: Answers) -> Int[Tensor, " example"]:
    """Token ids of the answers' first tokens; None: the token that the model itself would write first (one forward)."""
    if answers is not None:
        return answer_tokens(vlm, inputs, answers)
    return vlm.next_tokens(inputs)


def pieces(vlm, tokens: Int[Tensor, " n"]) -> tuple[str, ...]:
    """The tokenizer's pieces, `▁` and all; vocabularies are padded, and ids past the tokenizer's last read `<id>`."""
    ids = tokens.tolist()
    found = vlm.tokenizer.convert_ids_to_tokens(ids)
    return tuple(p if p is not None else f"<{i}>" for i, p in zip(ids, found, strict=True))
