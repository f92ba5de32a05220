"""Which token an answer begins with: what the causal experiments measure the probability of."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.inputs import Inputs
from mechvlm.vlm import VLM


def answer_tokens(
    vlm: VLM, inputs: Inputs, answers: str | int | Sequence[str | int] | Tensor
) -> Int[Tensor, " example"]:
    """Token ids of the answers' FIRST tokens, as the tokenizer writes them after each example's prompt.

    `answers` is a word (or a token id) for all examples, or one per example. Of several tokens the first one counts.

    A prompt that ends in a line break is followed by the answer itself, any other by a space and the answer.

    Raises:
        InputError: for another number of answers than examples, an empty answer, an id outside the vocabulary, or a word
            whose first token the tokenizer joins with the prompt.
    """
    answers = answers.tolist() if isinstance(answers, Tensor) else answers
    given = [answers] * len(inputs) if isinstance(answers, str | int) else list(answers)
    if len(given) != len(inputs):
        raise InputError(f"{len(given)} answers were given for {len(inputs)} examples: give one for all, or one each.")
    return torch.tensor([_first(vlm, text, answer) for text, answer in zip(inputs.texts, given, strict=True)])


def _first(vlm: VLM, text: str, answer: Any) -> int:
    if isinstance(answer, Integral):
        if not 0 <= int(answer) < vlm.d_vocab:
            raise InputError(f"The answer {answer} is no token id: the vocabulary has 0 to {vlm.d_vocab - 1}.")
        return int(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise InputError(f"An answer is a word or a token id, not {answer!r}.")
    if text.endswith(" "):
        raise InputError(f"The prompt {text[-30:]!r} ends in a space, where no answer begins: leave it out.")
    gap = "" if text.endswith("\n") else " "
    prompt = vlm.tokenizer(text).input_ids
    both = vlm.tokenizer(f"{text}{gap}{answer.strip()}").input_ids
    if both[: len(prompt)] != prompt:
        raise InputError(
            f"The tokenizer joins {answer!r} with the end of the prompt {text[-30:]!r}: give its token id instead."
        )
    return both[len(prompt)]
