"""Tokens of an answer after its prompt: the first one, or all of them written into the inputs."""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.utils import ModelOutput

from mechvlm.errors import InputError
from mechvlm.inputs.batch import Inputs, text_keys
from mechvlm.inputs.build import padding_id
from mechvlm.inputs.pieces import spell, token_texts
from mechvlm.inputs.prompts import check_characters
from mechvlm.inputs.tokens import Modality, TokenMap


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
    pairs = zip(_texts(inputs), by_example, strict=True)
    return torch.tensor([_first_token(text, answer, tokenizer, d_vocab) for text, answer in pairs])


def _texts(inputs: Inputs) -> list[str]:
    """The prompts as they end where the answer begins: PaliGemma's processor adds a line break."""
    ends = [tokens.strings[tokens.last] for tokens in inputs.token_maps]
    return [
        text + "\n" * (end == "\n" and not text.endswith("\n")) for text, end in zip(inputs.texts, ends, strict=True)
    ]


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
    # Behind a space, as some chat templates end, the answer begins without one of its own.
    gap = "" if text.endswith((" ", "\n")) else " "
    prompt = tokenizer(text).input_ids
    whole = tokenizer(f"{text}{gap}{answer.strip()}").input_ids
    if whole[: len(prompt)] != prompt:
        remedy = "end the prompt without its space, or give" if text.endswith(" ") else "give"
        raise InputError(
            f"The tokenizer joins {answer!r} with the end of the prompt {text[-30:]!r}: {remedy} its token id instead."
        )
    return whole[len(prompt) :]


def write_answers(
    inputs: Inputs,
    answers: Sequence[str | Sequence[int]],
    tokenizer,
    hf,
    image_token: int | None,
    max_length: int | None,
) -> Inputs:
    """The inputs with answers after their prompts; see `Inputs.answered`.

    An answer is a text, or the token ids that the model wrote.
    """
    if any(tokens.n_answer for tokens in inputs.token_maps):
        raise InputError("These inputs hold an answer already: take those without one, as vlm.inputs gave them.")
    pairs = zip(_texts(inputs), answers, strict=True)
    by_example = [
        _spoken(text, answer, tokenizer) if isinstance(answer, str) else list(answer) for text, answer in pairs
    ]
    longest, pad = max(map(len, by_example)), padding_id(tokenizer, image_token)
    grown: dict[str, list[Tensor]] = {key: [] for key in text_keys(inputs)}
    maps = []
    for row, (tokens, prompt) in enumerate(zip(by_example, inputs.token_maps, strict=True)):
        if image_token in tokens:
            raise InputError(f"The answer of example {row} holds the image token, which belongs to the prompt.")
        n = len(prompt.all) + len(tokens)
        if max_length is not None and n > max_length:
            raise InputError(
                f"The answer of example {row} leaves no room: with its prompt it has {n} tokens, and the model takes "
                f"{max_length}."
            )
        sequences = _with_answer({key: inputs.encoding[key][[row]] for key in grown}, tokens, hf)
        for key, sequence in sequences.items():
            padding = sequence.new_full((1, longest - len(tokens), *sequence.shape[2:]), pad * (key == "input_ids"))
            grown[key].append(torch.cat([padding, sequence], 1))  # padding stays on the left
        maps.append(_map_with_answer(grown["input_ids"][row][0], prompt, len(tokens), tokenizer))
    encoding = {**inputs.encoding, **{key: torch.cat(rows) for key, rows in grown.items()}}
    return replace(inputs, encoding=encoding, token_maps=tuple(maps))


def _spoken(text: str, answer: str, tokenizer) -> list[int]:
    """The tokens of an answer after the prompt `text`; one without any text is refused."""
    tokens = _tokens_after(text, answer, tokenizer)
    if not tokenizer.decode(tokens, skip_special_tokens=True).strip():
        raise InputError(f"The answer {answer!r} holds control tokens alone, which say nothing: give it a text.")
    return tokens


def _with_answer(sequences: dict[str, Tensor], tokens: list[int], hf) -> dict[str, Tensor]:
    """One example's sequences with the answer behind them, as `generate` would make them longer.

    Hugging Face's own method is asked token by token: what a written token's type is, say, differs
    between families.
    """
    ids, others = sequences["input_ids"], {key: value for key, value in sequences.items() if key != "input_ids"}
    outputs = ModelOutput(image_hidden_states=None)  # Idefics asks for them
    for _ in tokens:
        options = {**others, "use_cache": False}  # Idefics would keep the last token's mask alone
        grown = hf._update_model_kwargs_for_generation(outputs, options, is_encoder_decoder=False)
        for key, value in others.items():
            if grown[key].shape[1] == value.shape[1] and key.endswith("token_type_ids"):
                grown[key] = torch.nn.functional.pad(value, (0, 1))  # Ernie's, where 0 is text
        others = {key: grown[key] for key in others}
    return {"input_ids": torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype)], 1), **others}


def _map_with_answer(ids: Tensor, prompt: TokenMap, n: int, tokenizer) -> TokenMap:
    """The token map of a prompt whose answer is the last n of `ids`."""
    padding = torch.full((len(ids) - n - len(prompt),), int(Modality.PADDING))
    answer = torch.full((n,), int(Modality.TEXT))
    answer[torch.isin(ids[len(ids) - n :], torch.tensor(tokenizer.all_special_ids))] = Modality.SPECIAL
    strings = token_texts(ids.tolist(), tokenizer)
    spelled = spell(ids.tolist(), strings, tokenizer)
    modality = torch.cat([padding, prompt.modality, answer])
    return TokenMap(ids, strings, spelled, modality, prompt.layouts, n)
