"""Tokenizers as checkpoints bring them: with another end, with any padding token, or with none."""

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import instructblip, llava


@pytest.mark.parametrize("family", [llava, instructblip])
def test_a_tokenizer_that_ends_the_prompt_is_refused(family):
    """With EOS after the prompt, the last position is past the place where the model answers."""
    hf, processor = family()
    processor = copy.deepcopy(processor)
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(mv.ModelError, match=r"adds </s> after the prompt.*add_eos_token=False"):
        mv.load(hf, processor)


@pytest.mark.parametrize("pad", ["<image>", "</s>", "<s>", None])
def test_padding_may_be_any_token(pad):
    """Image features go wherever the image's token stands, so padding must not be that token."""
    hf, processor = llava()
    prompts = ["what is this a scene", "a"]
    images = [noise_image(0), noise_image(1)]
    wanted = mv.load(hf, processor)
    processor = copy.deepcopy(processor)
    processor.tokenizer.pad_token = pad
    vlm = mv.load(hf, processor)
    lens, expected = (mv.logit_lens(one, one.inputs(images, prompts), positions="last") for one in (vlm, wanted))
    assert torch.equal(lens.probs, expected.probs)
    answered, _ = vlm.answered(vlm.inputs(images, prompts), ["a red cat", "a"])
    assert (answered.encoding["input_ids"] == 32000).sum() == 32
