"""`vlm.bridge()`: TransformerLens on the same memory, and a VLM that it does not disturb."""

import nnsight
import pytest
import torch
from torch import nn

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import FAMILIES, instructblip, llava
from mechvlm import bundled

SITES = ["resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]


def run(bridge, vlm, inputs):
    """A bridge's forward as the documentation shows it."""
    encoding = vlm.encoding(inputs)
    with torch.no_grad():
        return bridge.run_with_cache(encoding.pop("input_ids"), **encoding)


def everything(vlm, inputs) -> dict:
    """Every accessor of every layer, and the logits."""
    with torch.no_grad(), vlm.trace(inputs):
        values = nnsight.save({})
        for layer in range(vlm.n_layers):
            for site in SITES:
                values[f"{site}[{layer}]"] = getattr(vlm, site)[layer].clone()
        values["logits"] = vlm.logits
    return values


@pytest.fixture(
    scope="module", params=[*FAMILIES, *(pytest.param(name, marks=pytest.mark.long) for name in bundled.NAMES)]
)
def model(request) -> mv.VLM:
    """The random models and the bundled ones."""
    return mv.load(*FAMILIES[request.param]()) if request.param in FAMILIES else mv.load(request.param)


@pytest.fixture(scope="module")
def padded(model):
    return model.inputs(
        [noise_image(i) for i in range(3)], ["what is this", "describe the scene . a what is this", "a"]
    )


def test_hooks_equal_mechvlms_activations_on_a_padded_batch(model, padded):
    logits, cache = model.run_with_cache(padded)
    theirs, their_cache = run(model.bridge(), model, padded)
    real = model.encoding(padded)["attention_mask"].bool()
    assert not real.all()  # the batch is padded
    torch.testing.assert_close(logits[real], theirs[real], rtol=1e-5, atol=3e-5)
    blocks = [name for name in cache if name.startswith("blocks.")]
    assert len(blocks) == 13 * model.n_layers
    for name in [*blocks, "ln_final.hook_scale"]:
        ours, other = cache[name], their_cache[name]
        assert ours.shape == other.shape, name
        # Rows of padding mean nothing: bring a pattern's rows, [batch head dest src], forward.
        if name.endswith("pattern"):
            ours, other = ours.transpose(1, 2), other.transpose(1, 2)
        torch.testing.assert_close(ours[real], other[real], rtol=1e-5, atol=3e-5, msg=name)
    text = real & (padded.encoding["input_ids"] != model.config.image_token_index)
    torch.testing.assert_close(cache["hook_embed"][text], their_cache["hook_embed"][text], rtol=0, atol=0)


def test_each_family_has_its_adapter(model):
    own = {"LlavaForConditionalGeneration": "transformer_lens", "InstructBlipForConditionalGeneration": "mechvlm"}
    assert type(model.bridge().adapter).__module__.split(".")[0] == own[model.record.hf_class]


def test_the_projections_output_is_the_image_tokens(model, padded):
    _, cache = run(model.bridge(), model, padded)
    image = padded.encoding["input_ids"] == model.config.image_token_index
    features = cache["vision_projector.hook_out"].reshape(-1, model.d_model)
    torch.testing.assert_close(features, cache["blocks.0.hook_resid_pre"][image], rtol=0, atol=0)


def test_weights_under_transformer_lens_names(model):
    bridge = model.bridge()
    for layer in range(model.n_layers):
        attn = bridge.blocks[layer].attn
        assert torch.equal(model.W_Q[layer], attn.W_Q)
        assert torch.equal(model.W_O[layer], attn.W_O)
        group = model.n_heads // model.n_kv_heads  # TransformerLens keeps grouped heads once
        assert torch.equal(model.W_K[layer][::group], attn.W_K)
        assert torch.equal(model.W_V[layer][::group], attn.W_V)
        torch.testing.assert_close(model.OV(layer).AB, bridge.OV[layer].AB, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.QK(layer).AB, bridge.QK[layer].AB, rtol=0, atol=1e-6)
    assert torch.equal(model.W_U, bridge.W_U)
    assert torch.equal(model.W_E, bridge.W_E)


def test_weights_are_the_same_memory_and_modules_are_not(model):
    bridge = model.bridge()
    models = {t.untyped_storage().data_ptr() for t in (*model.hf.parameters(), *model.hf.buffers())}
    twins = [*bridge.original_model.parameters(), *bridge.parameters()]
    assert {p.untyped_storage().data_ptr() for p in twins} == {
        p.untyped_storage().data_ptr() for p in model.hf.parameters()
    }
    # One vector is allocated: TransformerLens' unembedding bias of zeros.
    new = {t.data_ptr(): t.numel() for t in bridge.buffers() if t.untyped_storage().data_ptr() not in models}
    assert list(new.values()) == [model.d_vocab]
    q = model.layers[1].self_attn.q_proj.weight
    assert bridge.blocks[1].attn.q.weight.data_ptr() == q.data_ptr()
    assert bridge.unembed.weight.data_ptr() == model.W_U.data_ptr()
    assert not {id(m) for m in model.hf.modules()} & {id(m) for m in bridge.modules()}
    assert not {id(m) for m in model.hf.modules()} & {id(m) for m in bridge.original_model.modules()}


def test_the_vlm_and_the_bridge_do_not_disturb_each_other(model, padded):
    before, answers = everything(model, padded), model.generate(padded, max_new_tokens=3)
    modules = [id(m) for m in model.hf.modules()]
    padding_side, special = model.tokenizer.padding_side, model.tokenizer.all_special_ids
    bridge = model.bridge()
    logits, first = run(bridge, model, padded)
    after = everything(model, padded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # A hook left on the bridge changes the bridge alone, and a VLM's trace changes the VLM alone.
    bridge.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x * 0)
    changed, _ = run(bridge, model, padded)
    assert (changed - logits).abs().max() > 1e-3
    assert torch.equal(everything(model, padded)["logits"], before["logits"])
    bridge.reset_hooks()
    with torch.no_grad(), model.trace(padded):
        model.mlp_out[0] = model.mlp_out[0] * 0
        other = nnsight.save(model.logits)
    assert not torch.equal(other, before["logits"])
    again, second = run(bridge, model, padded)
    assert torch.equal(again, logits)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert model.generate(padded, max_new_tokens=3) == answers
    assert [id(m) for m in model.hf.modules()] == modules
    assert (model.tokenizer.padding_side, model.tokenizer.all_special_ids) == (padding_side, special)


@pytest.mark.parametrize("family", [llava, instructblip])
def test_the_vlm_keeps_its_attention_implementation(family):
    vlm = mv.load(*family.__wrapped__())
    assert vlm.config.text_config._attn_implementation == "sdpa"
    before = vlm.config.to_dict()
    bridge = vlm.bridge()
    assert bridge.original_model.config.text_config._attn_implementation == "eager"
    assert vlm.config.text_config._attn_implementation == vlm.config._attn_implementation == "sdpa"
    assert vlm.layers[0]._module.self_attn.config._attn_implementation == "sdpa"
    assert vlm.config.to_dict() == before


def test_compatibility_mode_gives_the_bridge_new_weights_and_keeps_the_vlms(model, padded):
    weights = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    before = everything(model, padded)
    bridge = model.bridge()
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert (bridge.ln_final.weight == 1).all()  # folded into the unembedding
    folded, _ = run(bridge, model, padded)
    assert all(torch.equal(weights[name], p) for name, p in model.hf.named_parameters())
    after = everything(model, padded)
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Folding and centring leave the probabilities as they are.
    real = padded.encoding["attention_mask"].bool()
    theirs, ours = folded.log_softmax(-1)[real], before["logits"].log_softmax(-1)[real]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-4)


def test_a_bridge_that_is_cast_leaves_the_vlm(llava_vlm):
    bridge = llava_vlm.bridge()
    bridge.to(torch.float64)
    assert bridge.blocks[0].attn.q.weight.dtype == torch.float64
    assert llava_vlm.dtype == torch.float32
    assert llava_vlm.W_Q[0].dtype == torch.float32


def test_the_bridge_knows_the_tokenizer_and_the_processor(vlm):
    """From memory: these tokenizers were never saved, so TransformerLens could not load them."""
    bridge = vlm.bridge()
    assert bridge.tokenizer is not vlm.tokenizer
    assert bridge.processor is vlm.processor
    red = vlm.tokenizer.convert_tokens_to_ids("▁red")
    assert bridge.to_single_token("red") == red
    assert bridge.to_tokens("red", prepend_bos=True).tolist() == [[vlm.tokenizer.bos_token_id, red]]
    assert bridge.to_tokens("red", prepend_bos=False).tolist() == [[red]]
    assert (bridge.cfg.n_layers, bridge.cfg.n_heads, bridge.cfg.d_model) == (vlm.n_layers, vlm.n_heads, vlm.d_model)
    assert (bridge.cfg.d_head, bridge.cfg.d_vocab) == (vlm.d_head, vlm.d_vocab)


def test_tied_weights_stay_tied_and_dtypes_stay():
    vlm = mv.load(*llava.__wrapped__(kv_heads=1))
    bridge = vlm.bridge()
    assert bridge.cfg.dtype == torch.float32
    vlm.hf.lm_head.weight = vlm.hf.model.language_model.embed_tokens.weight
    tied = vlm.bridge()
    assert tied.unembed.original_component.weight is tied.embed.original_component.weight
    half = mv.load(*instructblip.__wrapped__(), check=False)
    half.hf.to(torch.bfloat16)
    assert half.bridge().cfg.dtype == torch.bfloat16
    assert {p.dtype for p in half.bridge().original_model.parameters()} == {torch.bfloat16}


def test_a_model_on_several_devices_has_no_bridge():
    vlm = mv.load(*llava.__wrapped__(layers=1))
    norm = vlm.hf.model.language_model.norm
    norm.weight = nn.Parameter(norm.weight.to("meta"))
    with pytest.raises(mv.ModelError, match=r"spread over cpu, meta.*Load it with device="):
        vlm.bridge()


def test_a_model_with_other_modules_than_its_class_has_no_bridge():
    vlm = mv.load(*llava.__wrapped__(layers=2))
    vlm.hf.model.language_model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(mv.ModelError, match=r"1 modules differ.*layers\.1\.mlp\.up_proj' is Identity"):
        vlm.bridge()
