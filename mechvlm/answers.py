"""An answer's tokens, as they follow its prompt: the first one, which causal experiments measure, or all of them."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.inputs import Inputs
from mechvlm.tokens import Modality, TokenMap
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
    return _written(vlm, text, answer)[0]


def _written(vlm: VLM, text: str, answer: Any) -> list[int]:
    """The answer's tokens after the prompt `text`."""
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
    return both[len(prompt) :]


def answered(vlm: VLM, inputs: Inputs, answers: Sequence[str]) -> tuple[Inputs, tuple[int, ...]]:
    """The inputs with each example's answer written after its prompt, and how many tokens each answer has.

    The answer's tokens are the last ones of its example. What a Q-Former is given stays the prompt alone, as when the model
    writes the answer itself.

    Raises:
        InputError: for another number of answers than examples, an empty answer, one whose first token the tokenizer joins
            with the prompt, or one that leaves no room.
    """
    if len(answers) != len(inputs):
        raise InputError(f"{len(answers)} answers were given for {len(inputs)} examples: give one each.")
    written = [_written(vlm, text, answer) for text, answer in zip(inputs.texts, answers, strict=True)]
    longest, limit = max(map(len, written)), vlm.config.text_config.max_position_embeddings
    pad = vlm.tokenizer.pad_token_id or 0
    rows, masks, maps = [], [], []
    for row, (tokens, old) in enumerate(zip(written, inputs.token_maps, strict=True)):
        if vlm.config.image_token_index in tokens:
            raise InputError(f"The answer of example {row} holds the image token, which belongs to the prompt.")
        n = len(old.all) + len(tokens)
        if n > limit:
            raise InputError(f"The answer of example {row} leaves no room: {n} tokens, where the model takes {limit}.")
        shift = longest - len(tokens)  # padding stays on the left
        answer, before = torch.tensor(tokens), inputs.encoding["attention_mask"][row]
        ids = torch.cat([torch.full((shift,), pad), inputs.encoding["input_ids"][row], answer])
        rows.append(ids)
        masks.append(torch.cat([before.new_zeros(shift), before, before.new_ones(len(tokens))]))
        maps.append(_answered_map(vlm, ids, old, len(tokens)))
    encoding = {**inputs.encoding, "input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
    made = Inputs(encoding, tuple(maps), inputs.images, inputs.prompts, inputs.texts, inputs.model)
    return made, tuple(map(len, written))


def _answered_map(vlm: VLM, ids: Tensor, old: TokenMap, n: int) -> TokenMap:
    padding = torch.full((len(ids) - n - len(old),), int(Modality.PADDING))
    text = torch.full((n,), int(Modality.TEXT))
    text[torch.isin(ids[-n:], torch.tensor(vlm.tokenizer.all_special_ids))] = Modality.SPECIAL
    strings = tuple(vlm.tokenizer.convert_ids_to_tokens(ids.tolist()))
    return TokenMap(ids, strings, torch.cat([padding, old.modality, text]), old.grids, old.patches)
