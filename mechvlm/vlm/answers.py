"""Tokens of an answer after its prompt: the first one, or all of them written into the inputs."""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.inputs.batch import Inputs, padding_id
from mechvlm.inputs.pieces import spell, token_texts
from mechvlm.inputs.prompts import check_characters
from mechvlm.inputs.tokens import Modality, TokenMap

GREEDY = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None, "bad_words_ids": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "guidance_scale": None,
    "watermarking_config": None, "prompt_lookup_num_tokens": None, "token_healing": False, "stop_strings": None,
    "max_time": None,
}  # fmt: skip
"""Options of `generate` under which each token is the one of the largest logit. A checkpoint's
generation_config.json may say otherwise, and would win over any option that is not given."""


def first_tokens(
    inputs: Inputs, answers: str | int | Sequence[str | int] | Tensor, tokenizer, d_vocab: int
) -> Int[Tensor, " example"]:
    """Token ids of the answers' first tokens; see `VLM.answer_tokens`."""
    answers = answers.tolist() if isinstance(answers, Tensor) else answers
    by_example = [answers] * len(inputs) if isinstance(answers, str | int) else list(answers)
    if len(by_example) != len(inputs):
        raise InputError(
            f"{len(by_example)} answers were given for {len(inputs)} examples: give one for all, or one each."
        )
    pairs = zip(inputs.texts, by_example, strict=True)
    return torch.tensor([_first_token(text, answer, tokenizer, d_vocab) for text, answer in pairs])


def _first_token(text: str, answer: Any, tokenizer, d_vocab: int) -> int:
    if isinstance(answer, Integral) and not isinstance(answer, bool):
        if not 0 <= int(answer) < d_vocab:
            raise InputError(f"The answer {answer} is no token id: the vocabulary has 0 to {d_vocab - 1}.")
        return int(answer)
    return _tokens_after(text, answer, tokenizer)[0]


def _tokens_after(text: str, answer: Any, tokenizer) -> list[int]:
    """The answer's tokens after the prompt `text`."""
    if not isinstance(answer, str) or not answer.strip():
        raise InputError(f"An answer is a word or a token id, not {answer!r}.")
    check_characters(answer, "answer")
    if text.endswith(" "):
        raise InputError(
            f"The prompt {text[-30:]!r} ends in a space, and an answer's first token brings its own: remove the space."
        )
    gap = "" if text.endswith("\n") else " "
    prompt = tokenizer(text).input_ids
    whole = tokenizer(f"{text}{gap}{answer.strip()}").input_ids
    if whole[: len(prompt)] != prompt:
        raise InputError(
            f"The tokenizer joins {answer!r} with the end of the prompt {text[-30:]!r}: give its token id instead."
        )
    return whole[len(prompt) :]


def write_answers(
    inputs: Inputs, answers: Sequence[str], tokenizer, image_token: int, max_length: int
) -> tuple[Inputs, tuple[int, ...]]:
    """The inputs with answers after their prompts, and the answers' lengths; see `VLM.answered`."""
    if len(answers) != len(inputs):
        raise InputError(f"{len(answers)} answers were given for {len(inputs)} examples: give one each.")
    by_example = [_tokens_after(text, answer, tokenizer) for text, answer in zip(inputs.texts, answers, strict=True)]
    longest, pad = max(map(len, by_example)), padding_id(tokenizer, image_token)
    rows, masks, maps = [], [], []
    for row, (tokens, prompt) in enumerate(zip(by_example, inputs.token_maps, strict=True)):
        if image_token in tokens:
            raise InputError(f"The answer of example {row} holds the image token, which belongs to the prompt.")
        n = len(prompt.all) + len(tokens)
        if n > max_length:
            raise InputError(
                f"The answer of example {row} leaves no room: with its prompt it has {n} tokens, and the model takes "
                f"{max_length}."
            )
        shift = longest - len(tokens)  # padding stays on the left
        answer, mask = torch.tensor(tokens), inputs.encoding["attention_mask"][row]
        ids = torch.cat([torch.full((shift,), pad), inputs.encoding["input_ids"][row], answer])
        rows.append(ids)
        masks.append(torch.cat([mask.new_zeros(shift), mask, mask.new_ones(len(tokens))]))
        maps.append(_map_with_answer(ids, prompt, len(tokens), tokenizer))
    encoding = {**inputs.encoding, "input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
    return replace(inputs, encoding=encoding, token_maps=tuple(maps)), tuple(map(len, by_example))


def _map_with_answer(ids: Tensor, prompt: TokenMap, n: int, tokenizer) -> TokenMap:
    """The token map of a prompt whose answer is the last n of `ids`."""
    padding = torch.full((len(ids) - n - len(prompt),), int(Modality.PADDING))
    answer = torch.full((n,), int(Modality.TEXT))
    answer[torch.isin(ids[-n:], torch.tensor(tokenizer.all_special_ids))] = Modality.SPECIAL
    strings = token_texts(ids.tolist(), tokenizer)
    spelled = spell(ids.tolist(), strings, tokenizer)
    modality = torch.cat([padding, prompt.modality, answer])
    return TokenMap(ids, strings, spelled, modality, prompt.grids, prompt.patches)
