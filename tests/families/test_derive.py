"""Records derived from tiny models: the known ones again, and what cannot be derived."""

from dataclasses import replace

import pytest
import torch

import mechvlm as mv
from helpers import families
from mechvlm.decoder.norms import parts_of
from mechvlm.families import derive as derive_module
from mechvlm.families.derive import derive
from mechvlm.families.known import LAYERS, architecture_of, known_record
from mechvlm.families.record import LayerKind, part
from mechvlm.vlm.records import example_arguments

ENDS = ("embed", "decoder", "layers", "norm", "unembed", "adds_between", "norm_centres")


@pytest.fixture(scope="module", params=families.cases(memories=False))
def built(request):
    return request.param, *families.build(request.param)


def derived(hf, processor):
    record = architecture_of(type(hf).__name__)
    return derive(hf, example_arguments(hf, processor, record), record)


def test_known_records_are_derived_again(built):
    _, hf, processor = built
    known = known_record(hf)
    if known is None:
        pytest.skip("its record is derived whenever it is loaded")
    again = derived(hf, processor)
    assert {end: getattr(again, end) for end in ENDS} == {end: getattr(known, end) for end in ENDS}
    for layer in range(len(part(hf, known.layers))):
        assert again.kind(layer) == known.kind(layer)
    text = hf.config.get_text_config(decoder=True)
    assert again.norm_eps == pytest.approx(getattr(text, known.norm_eps))
    assert again.logit_cap == (getattr(text, known.logit_cap, None) if known.logit_cap else None)


def test_half_precision_gives_the_same_record(built):
    name, hf, processor = built
    try:
        whole = derived(hf, processor)
    except mv.ModelError:
        pytest.skip("none can be derived")
    try:
        half = derived(families.build(name, torch.bfloat16)[0], processor)
    except mv.ModelError:
        return  # refused, and so never wrong
    for kind, other in zip(whole.kinds, half.kinds, strict=False):
        assert (kind.attention, kind.o_proj, kind.attn_out, kind.mlp_out, kind.mid_norm) == (
            other.attention, other.o_proj, other.attn_out, other.mlp_out, other.mid_norm
        )  # fmt: skip


def test_fused_columns_are_found():
    """Phi-3 has q, k and v one below the other, GPT-NeoX head by head."""
    phi3 = derived(*families.build("llava_phi3")).kind(0)
    assert phi3.q_proj == phi3.k_proj == phi3.v_proj == "qkv_proj"
    assert phi3.columns == ((0, 16), (64, 16), (96, 16))
    neox = derived(*families.build("llava_gpt_neox")).kind(0)
    assert neox.columns == ((0, 48), (16, 48), (32, 48))
    assert neox.mid_norm is None


def test_scales_and_caps_are_numbers_of_the_model():
    granite = derived(*families.build("llava_granite"))
    assert granite.kind(0).scale == pytest.approx(0.22)
    gemma = derived(*families.build("paligemma2"))
    hf, _ = families.build("paligemma2")
    assert gemma.logit_cap == hf.config.get_text_config().final_logit_softcapping


def test_a_layer_that_adds_otherwise_is_refused():
    """A layer whose output is twice the sum is no sum of its input and its modules' outputs."""
    hf, processor = families.build("llava")
    layer = hf.model.language_model.layers[1]
    layer.register_forward_hook(lambda module, args, out: torch.tanh(out))
    with pytest.raises(mv.ModelError, match="is no sum of its input"):
        derived_without_known(hf, processor)


def derived_without_known(hf, processor):
    # The build of a layer counts its modules: this one must be looked at by itself.
    hf.model.language_model.layers[1].own = torch.nn.Identity()
    return derived(hf, processor)


def test_a_state_changed_between_layers_is_refused():
    hf, processor = families.build("llava")
    hf.model.language_model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + 1, *args[1:]), kwargs), with_kwargs=True
    )
    with pytest.raises(mv.ModelError, match="between the layers, also at positions without an image"):
        derived(hf, processor)


def test_a_wrong_record_does_not_load():
    """A kind that names the norm before the MLP's write where the write is the norm's output."""
    hf, processor = families.build("gemma3")
    from mechvlm.vlm.verify import check_model
    from mechvlm.vlm.vlm import VLM

    record = known_record(hf)
    plain = replace(record, kinds=(replace(record.kind(0), attn_out="self_attn", mlp_out="mlp"),))
    with pytest.raises(mv.ModelError, match=r"resid_mid\[0\] = resid_pre\[0\] \+ attn_out\[0\]"):
        check_model(VLM(hf, processor, name="gemma", record=plain))


def test_derivation_leaves_the_model_as_it_was():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    hf, processor = families.build("qwen2_5_vl")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules()]
    before = dict(ALL_ATTENTION_FUNCTIONS)
    derived(hf, processor)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules()] == hooks
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_reading_a_norm_leaves_it_without_calls():
    """A hook on the norm sees nothing of the calls that find out its gain."""
    hf, _ = families.build("gemma3")
    norm, calls = hf.model.language_model.norm, []
    norm.register_forward_hook(lambda *args: calls.append(args))
    gain, bias, centres = parts_of(norm, 64, 1e-6)
    torch.testing.assert_close(gain, 1 + norm.weight)
    assert not calls
    assert not centres
    assert not bias.any()


@pytest.mark.parametrize("name", ["llava", "llava_phi3", "gemma3"])
def test_the_printed_record_is_the_record(name):
    """It can be pasted: evaluated, it is the derived one."""
    from mechvlm.families.record import Architecture
    from mechvlm.vlm.inspection import record_lines

    record = derived(*families.build(name))
    text = "\n".join(record_lines(record))
    assert replace(eval(text, {"Architecture": Architecture, "LayerKind": LayerKind}), derived=True) == record


def test_a_sinks_share_is_what_its_row_lacks():
    """Hugging Face's eager rows of GPT-OSS sum to less than 1, and to 1 where there is no sink."""
    hf, processor = families.build("llava_gpt_oss", attention="eager")
    vlm = mv.load(hf, processor)
    inputs = vlm.inputs(families.picture(60, 44, seed=0), "what is this")
    norms = mv.norm_attention(vlm, inputs, dst="last")
    with torch.no_grad():
        rows = hf(**vlm.encoding(inputs), output_attentions=True).attentions
    for layer, weights in enumerate(rows):
        torch.testing.assert_close(norms.sink_share[layer, 0, :, 0], 1 - weights[0, :, -1].sum(-1), rtol=0, atol=1e-5)
    assert norms.sink_share.min() > 0.001
    plain = mv.load(*families.build("llava"))
    assert mv.norm_attention(plain, plain.inputs(families.picture(60, 44, seed=0), "a")).sink_share.max() < 1e-5


def test_the_default_kind_is_llamas():
    assert LAYERS["LlamaDecoderLayer"] == LayerKind()
    assert derive_module.EQUAL_WITHIN[torch.float32] < derive_module.LOOSE
