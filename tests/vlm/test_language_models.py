"""LLaVA's class takes any decoder: each is read rightly, or refused with what cannot be read."""

import nnsight
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    NemotronConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava, randomise

SIZES = {
    "vocab_size": 32064, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
PROMPTS = ["what is this , and what is it for", "a"]


def model_of(text_config):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14,
            projection_dim=16,
        ),
        text_config=text_config, image_token_index=32000, vision_feature_layer=-2,
    )  # fmt: skip
    return randomise(LlavaForConditionalGeneration(config), 2), llava()[1]


@pytest.mark.parametrize(
    "text_config",
    [
        MistralConfig(**SIZES, sliding_window=6),
        Qwen2Config(**SIZES, tie_word_embeddings=True),
        Qwen3Config(**SIZES),
        Phi3Config(**SIZES),
    ],
    ids=lambda config: config.model_type,
)
def test_other_decoders_are_read_rightly(text_config):
    """The parts of the logit sum to Hugging Face's, and the pattern is its eager attention's."""
    hf, processor = model_of(text_config)
    vlm = mv.load(hf, processor)
    inputs = vlm.inputs([noise_image(0), noise_image(1)], PROMPTS)
    with torch.no_grad(), vlm.trace(inputs):
        patterns = nnsight.save([vlm.pattern[layer] for layer in range(2)])
    parts = mv.logit_attribution(vlm, inputs, 300)
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        out = hf(**inputs.encoding, output_attentions=True)
    torch.testing.assert_close(parts.total, out.logits[:, -1, 300], rtol=1e-4, atol=1e-4)
    real = inputs.encoding["attention_mask"].bool()
    for pattern, attention in zip(patterns, out.attentions, strict=True):
        for row in range(2):
            torch.testing.assert_close(pattern[row][:, real[row]], attention[row][:, real[row]], rtol=0, atol=1e-5)


def test_a_norm_that_adds_one_to_its_weight_is_refused():
    """Gemma's norm multiplies by 1 + weight. Directions and attributions take it to be weight."""
    hf, processor = model_of(GemmaConfig(**SIZES))
    with pytest.raises(
        mv.ModelError, match=r"language model: gemma\).*\n- final norm\(x\) = x / rms\(x\) \* its weight"
    ):
        mv.load(hf, processor)


@pytest.mark.parametrize(
    ("text_config", "says"),
    [
        (
            GPTNeoXConfig(
                vocab_size=32064, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                bos_token_id=1, eos_token_id=2,
            ),
            r"\(gpt_neox\) that is not built as a Llama decoder \(.*embed_tokens",
        ),
        (NemotronConfig(**SIZES), r"language model: nemotron\), but cannot be traced by its record.*rms_norm_eps"),
    ],
)  # fmt: skip
def test_decoders_of_another_build_are_named(text_config, says):
    with pytest.raises(mv.ModelError, match=says):
        mv.load(*model_of(text_config))


def test_one_matrix_for_queries_keys_and_values_has_no_w_q():
    vlm = mv.load(*model_of(Phi3Config(**SIZES)))
    inputs = vlm.inputs(noise_image(0), "a")
    with pytest.raises(mv.ModelError, match=r"There is no q_proj in this model's attention.*vlm.attention\[layer\]"):
        vlm.W_Q[0]
    with pytest.raises(mv.ModelError, match="There is no v_proj"):
        vlm.OV(0)
    with pytest.raises(mv.ModelError, match=r"There is no k_proj"), vlm.trace(inputs):
        nnsight.save(vlm.k[0])


def test_normed_queries_and_keys_have_no_qk():
    vlm = mv.load(*model_of(Qwen3Config(**SIZES)))
    assert vlm.OV(0).shape == (4, 32, 32)
    with pytest.raises(mv.ModelError, match=r"norms its queries and keys \(q_norm, k_norm\) after W_Q and W_K"):
        vlm.QK(0)
