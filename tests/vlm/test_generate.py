"""Answers are greedy: generation_config.json of a checkpoint changes none of their tokens."""

import copy

import pytest
import torch
from transformers import GenerationConfig

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import instructblip, llava

FAMILIES = {"llava": llava, "instructblip": instructblip}


def forwards(vlm, inputs, n):
    """The n tokens of the largest logit, each by a whole forward of Hugging Face's."""
    encoding, tokens = vlm.encoding(inputs), []
    for _ in range(n):
        with torch.no_grad():
            tokens.append(vlm.hf(**encoding).logits[:, -1:].argmax(-1))
        encoding["input_ids"] = torch.cat([encoding["input_ids"], tokens[-1]], 1)
        encoding["attention_mask"] = torch.cat([encoding["attention_mask"], torch.ones_like(tokens[-1])], 1)
    return torch.cat(tokens, 1)


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request):
    """A model whose generation_config a test may replace, inputs, and their greedy tokens."""
    hf, processor = FAMILIES[request.param]()
    vlm = mv.load(copy.deepcopy(hf), processor)
    inputs = vlm.inputs([noise_image(0), noise_image(1)], ["what is this a scene", "a"])
    return vlm, inputs, forwards(vlm, inputs, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 50.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": "first"},
        {"begin_suppress_tokens": "first"},
        {"bad_words_ids": "first"},
        {"forced_bos_token_id": 9},
        {"forced_eos_token_id": 9},
        {"num_beams": 3},
        {"do_sample": True, "temperature": 50.0},
        {"max_time": 1e-9},
        {"stop_strings": ["a", "e", "i"]},
        {"return_dict_in_generate": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_checkpoints_settings_do_not_change_the_answer(case, settings):
    vlm, inputs, tokens = case
    first = tokens[:, 0].tolist()
    values = {"bad_words_ids": [[id] for id in first]}
    settings = {name: values.get(name, first) if value == "first" else value for name, value in settings.items()}
    decoder = getattr(vlm.hf, "language_model", vlm.hf)
    decoder = decoder if hasattr(decoder, "generate") else vlm.hf
    before = decoder.generation_config
    decoder.generation_config = GenerationConfig(**settings, eos_token_id=before.eos_token_id)
    try:
        answers = vlm.generate(inputs, max_new_tokens=4)
    finally:
        decoder.generation_config = before
    assert answers == [vlm.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
    assert vlm.next_tokens(inputs).tolist() == first
