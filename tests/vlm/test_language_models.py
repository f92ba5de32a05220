"""LLaVA's class takes any decoder: each is read rightly, or refused with what cannot be read."""

import nnsight
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    NemotronConfig,
    Phi3Config,
    PhiConfig,
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
GPT_NEOX = GPTNeoXConfig(
    vocab_size=32064, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
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
        GemmaConfig(**SIZES),
        Gemma2Config(**SIZES, query_pre_attn_scalar=8, sliding_window=6, attn_logit_softcapping=2.0),
        GPT_NEOX,
        NemotronConfig(**SIZES),
        GraniteConfig(**SIZES, residual_multiplier=0.22, embedding_multiplier=6.0, attention_multiplier=0.1),
        PhiConfig(**SIZES),
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


def test_one_matrix_for_queries_keys_and_values():
    """Phi-3: four query heads, two of keys, two of values, one below the other."""
    vlm = mv.load(*model_of(Phi3Config(**SIZES)))
    rows = vlm.hf.model.language_model.layers[1].self_attn.qkv_proj.weight.reshape(8, 8, 32)
    for head in range(4):
        assert torch.equal(vlm.W_Q[1][head], rows[head].T)
        assert torch.equal(vlm.W_K[1][head], rows[4 + head // 2].T)
        assert torch.equal(vlm.W_V[1][head], rows[6 + head // 2].T)


def test_heads_side_by_side_in_one_matrix():
    """GPT-NeoX: q, k and v of the first head, then those of the second."""
    vlm = mv.load(*model_of(GPT_NEOX))
    rows = vlm.hf.model.language_model.layers[1].attention.query_key_value.weight.reshape(4, 3, 8, 32)
    for head in range(4):
        for number, weight in enumerate((vlm.W_Q, vlm.W_K, vlm.W_V)):
            assert torch.equal(weight[1][head], rows[head, number].T)
    inputs = vlm.inputs(noise_image(0), "a")
    with pytest.raises(mv.ModelError, match="no state between attention and MLP"), vlm.trace(inputs):
        nnsight.save(vlm.resid_mid[0])


def test_a_part_of_a_fused_matrix_is_replaced_alone():
    vlm = mv.load(*model_of(Phi3Config(**SIZES)))
    inputs = vlm.inputs(noise_image(0), "a")
    with torch.no_grad(), vlm.trace(inputs):
        vlm.k[1] = 2 * vlm.k[1]
        twice = nnsight.save(vlm.attention[1])
    with torch.no_grad(), vlm.trace(inputs):
        once = nnsight.save(vlm.attention[1])
    torch.testing.assert_close(twice.k, 2 * once.k)
    assert torch.equal(twice.q, once.q)
    assert torch.equal(twice.v, once.v)


def test_normed_queries_and_keys_have_no_qk():
    vlm = mv.load(*model_of(Qwen3Config(**SIZES)))
    assert vlm.OV(0).shape == (4, 32, 32)
    with pytest.raises(mv.ModelError, match=r"norms its queries and keys \(q_norm, k_norm\) after W_Q and W_K"):
        vlm.QK(0)
