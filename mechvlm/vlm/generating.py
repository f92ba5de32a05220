"""Answers that the model writes itself, with their tokens' log-probabilities."""

from collections.abc import Sequence
from typing import Any

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.inputs.answer import Answer, AnswerList
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import as_batches
from mechvlm.inputs.pieces import token_texts
from mechvlm.ndif.requests import ONE_AT_A_TIME, backend_for
from mechvlm.progress import track

GREEDY = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None, "bad_words_ids": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "guidance_scale": None,
    "watermarking_config": None, "prompt_lookup_num_tokens": None, "token_healing": False, "stop_strings": None,
    "max_time": None,
}  # fmt: skip
"""Options of `generate` under which each token is the one of the largest logit. A checkpoint's
generation_config.json may say otherwise, and would win over any option that is not given."""
OURS = (
    "return_dict_in_generate", "output_logits", "output_scores", "output_attentions", "output_hidden_states", "max_length",
)  # fmt: skip
"""Options that answers do not have: what a generation computes is read by `mv.read` afterwards."""


def write(vlm: Any, inputs: Any, max_new_tokens: int, options: dict[str, Any]) -> AnswerList:
    """The model's answers to one batch or several; see `VLM.generate`."""
    if refused := [name for name in OURS if name in options]:
        raise InputError(
            f"generate has no option {', '.join(refused)}. It has max_new_tokens and Hugging Face's options of sampling; "
            "attention and states of the answer are read by mv.read(vlm, answer.inputs, ...)."
        )
    if options.get("num_return_sequences", 1) != 1:
        raise InputError(
            "num_return_sequences was given, and an example has one answer: repeat the example, "
            "vlm.inputs([image] * 3, prompt)."
        )
    batches = as_batches(inputs)
    prompts, answers = [], []
    for number in track(range(len(batches)), "answers, batches"):
        prompts.append(batches[number])
        answers += _batch(vlm, prompts[-1], {**GREEDY, **options, "max_new_tokens": max_new_tokens})
    return AnswerList(answers, prompts)


@torch.no_grad()
def _batch(vlm: Any, inputs: Inputs, options: dict[str, Any]) -> list[Answer]:
    n_prompt = inputs.encoding["input_ids"].shape[1]
    options = {
        "pad_token_id": vlm.tokenizer.pad_token_id, **options, "return_dict_in_generate": True, "output_logits": True,
        **({"tokenizer": vlm.tokenizer} if options["stop_strings"] else {}),
    }  # fmt: skip
    if vlm.remote:
        with vlm.model.generate(**vlm.encoding(inputs), **options, backend=backend_for(vlm)) as tracer:
            out = tracer.result
            new = nnsight.save(out.sequences[:, n_prompt:])
            logprobs = nnsight.save(chosen_logprobs(new, out.logits, out.get("beam_indices")))
    else:
        with ONE_AT_A_TIME:
            out = vlm.hf.generate(**vlm.encoding(inputs), **options)
        new = out.sequences[:, n_prompt:]
        logprobs = chosen_logprobs(new, out.logits, out.get("beam_indices"))
    new, logprobs, ends = new.cpu(), logprobs.cpu(), _end_ids(vlm, options)
    return [_answer(vlm, inputs, row, ids, own, ends) for row, (ids, own) in enumerate(zip(new, logprobs, strict=True))]


def chosen_logprobs(
    new: Tensor, logits: Sequence[Tensor], beam_indices: Tensor | None
) -> Float[Tensor, "example token"]:
    """Log-probabilities of the tokens that were chosen, in nats.

    Args:
        new: the tokens, [example token].
        logits: of each step, [example d_vocab], or [beam d_vocab] with beams.
        beam_indices: of each token, which beam wrote it; negative after its end.
    """
    rows = torch.arange(len(new), device=new.device)
    chosen = []
    for step, own in enumerate(logits[: new.shape[1]]):
        if beam_indices is not None:
            rows = beam_indices[:, step].clamp(min=0)
        at = own[rows.to(own.device)].float()
        chosen.append(at.gather(1, new[:, step, None].to(at.device))[:, 0] - at.logsumexp(-1))
    return torch.stack(chosen, 1)


def _end_ids(vlm: Any, options: dict[str, Any]) -> list[int]:
    """The tokens that end an answer.

    InstructBLIP's decoder writes with a generation_config of its own.
    """
    if options.get("eos_token_id") is not None:
        given = [options["eos_token_id"]]
    else:
        writers = vlm.hf, getattr(vlm.hf, "language_model", None)
        given = [getattr(getattr(writer, "generation_config", None), "eos_token_id", None) for writer in writers]
    return [id for ids in given if ids is not None for id in (ids if isinstance(ids, list | tuple) else [ids])]


def _answer(vlm: Any, inputs: Inputs, row: int, ids: Tensor, logprobs: Tensor, ends: list[int]) -> Answer:
    """One example's answer, up to the token that ended it."""
    n, filler = len(ids), {*ends, vlm.tokenizer.pad_token_id}
    while n and int(ids[n - 1]) in filler:
        n -= 1
    # What ended it is the first token that does so and has nothing behind it.
    stop = next((i for i in range(n, len(ids)) if int(ids[i]) in ends), None)
    n = len(ids) if stop is None else stop
    text = vlm.tokenizer.decode(ids[:n], skip_special_tokens=True).strip()
    strings = token_texts(ids[:n].tolist(), vlm.tokenizer)
    return Answer.written(text, strings, ids[:n], logprobs[:n], stop is not None, inputs, row)
