"""What the records of the families say, against the processors and the models themselves."""

import copy

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import instructblip, llava


def test_without_a_chat_template_the_record_writes_llavas_prompt():
    model, processor = llava()
    processor = copy.deepcopy(processor)
    processor.chat_template = None
    vlm = mv.load(model, processor, check=False)
    assert vlm.inputs(noise_image(0), "a").texts == ("USER: <image>\na ASSISTANT:",)
    both = vlm.inputs([[noise_image(0), noise_image(1)]], "a")
    assert both.texts == ("USER: <image>\n<image>\na ASSISTANT:",)


def test_the_qformers_words_are_padded_on_the_right(blip_vlm):
    """Their positions are absolute: the same prompt has the same ids, padded or not."""
    prompts = ["a", "what is this a the scene"]
    batch = blip_vlm.inputs([noise_image(0), noise_image(1)], prompts).encoding
    ids, mask = batch["qformer_input_ids"], batch["qformer_attention_mask"]
    alone = blip_vlm.inputs(noise_image(0), prompts[0]).encoding["qformer_input_ids"][0]
    assert ids[0, : len(alone)].tolist() == alone.tolist()
    assert mask[0].tolist() == [1] * len(alone) + [0] * (ids.shape[1] - len(alone))
    assert batch["attention_mask"][0, 0] == 0, "the decoder's on the left"
    with torch.no_grad():
        both = blip_vlm.hf(**batch).logits[:, -1]
        own = blip_vlm.hf(**blip_vlm.inputs(noise_image(0), prompts[0]).encoding).logits[0, -1]
    torch.testing.assert_close(both[0], own, rtol=1e-3, atol=1e-4)


def test_the_cross_attentions_are_the_layers_that_have_one(monkeypatch):
    """The first and the third of four layers read the image, whatever the number of heads."""
    vlm = mv.load(*instructblip())
    has_one = [layer.has_cross_attention for layer in vlm.hf.qformer.encoder.layer]
    assert has_one == [True, False, True, False]
    assert len(vlm.cross_attentions) == 2
    monkeypatch.setattr(vlm.hf.config.qformer_config, "num_attention_heads", 1)
    assert len(vlm.cross_attentions) == 2


def test_a_prompt_too_long_for_the_qformer_is_refused(blip_vlm):
    """The Q-Former takes 64 words, and the decoder 2048 tokens."""
    with pytest.raises(mv.InputError, match=r"leaves no room: 7\d tokens in qformer_input_ids.*The model takes 64"):
        blip_vlm.inputs(noise_image(0), "what is this " * 24)
