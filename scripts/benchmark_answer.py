"""Reading an answer of 60 tokens: its cost in bare forwards of prompt and answer."""

from itertools import pairwise

import torch
from benchmark_measure import peaks, times
from benchmark_models import QUESTION, build, noise

import mechvlm as mv
from mechvlm.experiments.word_reading import WordHeat
from mechvlm.probes.answer_reading import AnswerReading, OnPrompt

ANSWER = " ".join(f"w{i}" for i in range(60))
ANSWER_MEMORY_BAR = 1.25
"""Largest ratio to the bare forward's peak memory, of everything."""


def answer(layers: int, width: int, repeats: int, device: str, dtype: torch.dtype) -> list[dict]:
    """One row per case: seconds, ratio to the bare forward, peak memory."""
    vlm, hf = build("llava", layers, width, device, dtype)
    inputs = vlm.inputs(noise(0), QUESTION).answered(ANSWER)
    encoding, tokens = vlm.encoding(inputs), inputs.tokens
    assert tokens.n_answer == 60
    words = [tokens.writing[first:stop] for first, stop in pairwise(range(0, 61, 2))]
    own = AnswerReading(), mv.Likelihood(), WordHeat([words], tuple(range(layers)))
    prompt = tuple(map(OnPrompt, (mv.LogitLens(k=1, positions="all"), mv.Contextualization(), mv.NormAttention())))

    @torch.no_grad()
    def bare():
        hf(**encoding, logits_to_keep=1)

    cases = {
        "bare forward": bare,
        "answer: shares, lens, likelihood, heats": lambda: mv.read(vlm, inputs, *own),
        "a study's measures of the prompt": lambda: mv.read(vlm, inputs, *prompt),
        "everything in one read": lambda: mv.read(vlm, inputs, *prompt, *own),
    }
    seconds = times(cases, repeats, device, "bare forward")
    memory = peaks(cases, device, min(repeats, 3))
    rows = []
    for name, taken in seconds.items():
        row = {"case": name, "seconds": taken, "of a bare forward": taken / seconds["bare forward"]}
        if (peak := memory[name]) and (least := memory["bare forward"]):
            row |= {"peak GB": peak.total / 1e9, "peak of bare": peak.total / least.total, "above MB": peak.above / 1e6}
            row["memory bar"] = ANSWER_MEMORY_BAR
        rows.append(row)
    return rows
