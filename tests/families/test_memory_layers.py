"""Mllama and Idefics, whose image is a memory that gated cross-attention layers read.

The other side is Hugging Face's eager model (`Case.twin`) under plain hooks, or a sum by hand.
"""

from dataclasses import replace

import nnsight
import pytest
import torch
import transformers

import mechvlm as mv
from helpers import families
from helpers.every_method import ANSWER, changed, close, first
from helpers.families.memory import idefics
from helpers.families.parts import perturb
from helpers.memory_case import MemoryCase
from mechvlm.families.known import known_record
from mechvlm.vlm.inspection import inspect_model
from mechvlm.vlm.verify import check_claims, check_model, holds, own_forward
from mechvlm.vlm.vlm import VLM


@pytest.fixture(scope="module", params=["mllama", "idefics"])
def case(request) -> MemoryCase:
    return MemoryCase(request.param)


@pytest.fixture(scope="module")
def idefics_case() -> MemoryCase:
    return MemoryCase("idefics")


# -- layers and states -----------------------------------------------------------------------------


def test_the_batch_has_what_is_to_be_told_apart(case):
    assert not case.real.all(), "padding"
    assert (case.real & ~case.is_open).any(), "words that stand before the image"
    if case.name == "mllama":
        assert case.inputs.encoding["aspect_ratio_mask"].sum(-1).flatten().tolist() == [2, 1, 2], "closed tiles"


def test_blocks_count_as_layers_between_hugging_faces(idefics_case):
    """A block before every second of four layers: 0 and 3 are blocks; HF's states begin after 0."""
    vlm = idefics_case.vlm
    assert (vlm.n_layers, vlm.memory_layers) == (6, (0, 3))
    theirs = idefics_case.run(output_hidden_states=True).hidden_states
    got = idefics_case.read("resid_pre", "resid_post")
    ours = [got["resid_pre"][1], got["resid_post"][1], got["resid_post"][2], got["resid_post"][4]]
    for mine, state in zip(ours, theirs[:4], strict=True):
        close(mine[idefics_case.real], state[idefics_case.real])
    own = idefics_case.twin.model
    paths = [own.gated_cross_attn_layers[0], *own.layers[:2], own.gated_cross_attn_layers[1], *own.layers[2:]]
    assert [idefics_case.layer(layer) for layer in range(6)] == paths


def test_mllamas_memory_layers_are_those_of_its_config():
    vlm = mv.load(*families.build("mllama"))
    assert vlm.memory_layers == tuple(vlm.text_config.cross_attention_layers) == (1, 3)
    assert "memory_layers=(1, 3)" in repr(vlm)


def test_what_is_added_is_gated(case):
    """Each module's output times its gate; before an image one of the two is closed."""
    got, seen = case.read("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"), case.seen
    outs: dict = {}
    handles = []
    for layer in case.memory:
        for name, module in (("attn", case.attention_of(layer)), ("mlp", case.layer(layer).mlp)):

            def keep(module, args, out, key=(layer, name)):
                outs[key] = first(out)

            handles.append(module.register_forward_hook(keep))
    case.run()
    for handle in handles:
        handle.remove()
    closed = "mlp" if case.name == "mllama" else "attn"
    for (layer, name), out in outs.items():
        expected = case.gate(layer, name) * out
        expected[~case.is_open] *= name != closed
        close(got[f"{name}_out"][layer][case.real], expected[case.real])
        if name == closed:
            assert not got[f"{name}_out"][layer][case.real & ~case.is_open].any()
    for layer in range(case.vlm.n_layers):
        mid = seen["states"][layer] + got["attn_out"][layer]
        close(got["resid_mid"][layer][case.real], mid[case.real])
        close((mid + got["mlp_out"][layer])[case.real], seen["states"][layer + 1][case.real])


def test_gates_are_numbers(case):
    gates = case.vlm.gates
    assert tuple(gates) == case.memory
    text = inspect_model(case.vlm.hf, case.processor).text()
    for layer, gate in gates.items():
        assert torch.equal(gate.attn, case.gate(layer, "attn"))
        assert torch.equal(gate.mlp, case.gate(layer, "mlp"))
        assert f"Gates of layer {layer}: attention {float(gate.attn):.3f}, MLP {float(gate.mlp):.3f}" in text
    assert "Every identity holds." in text


def test_a_model_without_a_memory_has_no_gates(llava_vlm):
    assert llava_vlm.gates == {}
    assert llava_vlm.memory_layers == ()


# -- the attention to the memory -------------------------------------------------------------------


def test_weights_are_hugging_faces(case):
    """Of all heads and positions; a tile that an image does not fill has none of them."""
    vlm = case.vlm
    for layer in case.memory:
        theirs = case.seen["attentions"][layer]
        with torch.no_grad(), vlm.trace(case.inputs):
            mine = nnsight.save(vlm.memory_pattern[layer])
            row = nnsight.save(vlm.memory_pattern[layer, -1])
        close(mine[case.real.unsqueeze(1).expand(-1, 4, -1)], theirs[case.real.unsqueeze(1).expand(-1, 4, -1)], 1e-4)
        close(row[:, :, 0], theirs[:, :, -1], 1e-4)
        if case.name == "mllama":
            n = row.shape[-1] // 2
            assert not row[1, ..., n:].any()
            assert row[0, ..., n:].any()


@pytest.mark.families
def test_what_is_assigned_to_the_memory_is_read(case):
    """Values of half the size and mirrored weights, as plain hooks on the twin make them."""
    vlm, layer = case.vlm, case.memory[0]
    with torch.no_grad(), vlm.trace(case.inputs):
        vlm.v[layer] = 0.5 * vlm.v[layer]
        halved = nnsight.save(vlm.logits)
    with changed(case.attention_of(layer).v_proj, lambda x: 0.5 * x):
        close(halved[case.real], case.run().logits[case.real])
    with torch.no_grad(), vlm.trace(case.inputs):
        weights = vlm.memory_pattern[layer].flip(1)
        v = nnsight.save(vlm.memory_attention[layer].v)
        vlm.memory_pattern[layer] = weights
        z = nnsight.save(vlm.z[layer])
        used = nnsight.save(weights)
    explicit = torch.einsum("bhdm,bhme->bdhe", used, v.repeat_interleave(4 // v.shape[1], 1))
    close(z, explicit)


def test_writes_are_assigned_where_the_model_adds_any(case):
    vlm, layer = case.vlm, case.memory[0]
    vlm.next_tokens(case.inputs[0])  # another forward, with other positions closed
    closed = "mlp_out" if case.name == "mllama" else "attn_out"
    new = torch.randn(len(case.inputs), case.real.shape[1], 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), vlm.trace(case.inputs):
        pre = nnsight.save(vlm.resid_pre[layer].clone())
        for name in ("attn_out", "mlp_out"):
            accessor = getattr(vlm, name)
            accessor[layer] = new * (case.is_open[..., None] if name == closed else 1)
        post = nnsight.save(vlm.resid_post[layer].clone())
    close(post, pre + new + new * case.is_open[..., None])
    with (
        pytest.raises(mv.ModelError, match=f"Layer {layer} adds no {closed} at some of these positions"),
        torch.no_grad(),
        vlm.trace(case.inputs),
    ):
        getattr(vlm, closed)[layer] = new


@pytest.mark.families
def test_the_middle_state_is_assigned(case):
    """The MLP reads it, by the twin's own modules, and adds to it."""
    vlm, layer = case.vlm, case.memory[1]
    new = torch.randn(len(case.inputs), case.real.shape[1], 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), vlm.trace(case.inputs):
        vlm.resid_mid[layer] = new
        post = nnsight.save(vlm.resid_post[layer].clone())
    own = case.layer(layer)
    with torch.no_grad():
        added = case.gate(layer, "mlp") * own.mlp(own.post_attention_layernorm(new))
    if case.name == "mllama":
        added = added * case.is_open[..., None]
    close(post, new + added)


@pytest.mark.families
def test_a_layer_says_which_attention_it_has(case, llava_vlm):
    vlm = case.vlm
    memory, other = case.memory[0], next(layer for layer in range(vlm.n_layers) if layer not in case.memory)
    for name in ("pattern", "attention"):
        message = rf"Layer {memory} .* to no position: take vlm.memory_pattern\[{memory}\]"
        with pytest.raises(mv.ModelError, match=message), torch.no_grad(), vlm.trace(case.inputs):
            getattr(vlm, name)[memory]
        with (
            pytest.raises(mv.ModelError, match=rf"Layer {other} .* to no memory: take vlm.pattern\[{other}\]"),
            torch.no_grad(),
            vlm.trace(case.inputs),
        ):
            getattr(vlm, f"memory_{name}")[other]
    with pytest.raises(ValueError, match=r"has no memory of the image: .* Take mv.norm_attention"):
        mv.memory_attention(llava_vlm, llava_vlm.inputs(families.picture(60, 44, 0), "a"))


# -- records and builds ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "claim"),
    [
        ("mllama", {"attn_gate": "cross_attn_mlp_gate"}, r"resid_mid\[1\] = resid_pre\[1\] \+ attn_out\[1\]"),
        ("mllama", {"mlp_gate": None, "mlp_open": None}, r"resid_post\[1\] = resid_mid\[1\] \+ mlp_out\[1\]"),
        ("idefics", {"mlp_gate": "alpha_cross_attn"}, r"resid_post\[0\] = resid_mid\[0\] \+ mlp_out\[0\]"),
        ("idefics", {"attn_open": None}, r"resid_mid\[0\] = resid_pre\[0\] \+ attn_out\[0\]"),
    ],
)
@pytest.mark.families
def test_a_wrong_record_of_a_memory_layer_does_not_load(name, change, claim):
    hf, processor = families.build(name)
    record = known_record(hf)
    wrong = replace(record, kinds=tuple(replace(kind, **change) if kind.memory else kind for kind in record.kinds))
    with pytest.raises(mv.ModelError, match=claim):
        check_model(VLM(hf, processor, name=name, record=wrong))


def test_layers_of_another_build_are_not_derived(monkeypatch):
    """What a memory layer is made of stands in the list, and is not made up for another class."""
    from mechvlm.families import known

    hf, processor = families.build("mllama")
    monkeypatch.delitem(known.LAYERS, "MllamaCrossAttentionDecoderLayer")
    with pytest.raises(mv.ModelError, match="Which of them read the image's memory"):
        mv.load(hf, processor)


def test_a_memory_of_an_unknown_class_is_not_read_as_positions(monkeypatch):
    """By its numbers alone, a cross-attention layer without gates would be an ordinary one."""
    from mechvlm.families.derive import derive
    from mechvlm.vlm.records import example_arguments

    hf, processor = families.build("mllama")
    record = replace(known_record(hf), visual_tokens="cells")
    arguments = example_arguments(hf, processor, known_record(hf))
    with torch.no_grad():
        for layer in (1, 3):  # both gates alike, and no position closed
            for gate in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
                getattr(hf.model.language_model.layers[layer], gate).fill_(0.5)
    arguments["cross_attention_mask"][:] = 1
    with pytest.raises(mv.ModelError, match=r"reads 34 vectors for \d+ positions: a memory beside the sequence"):
        derive(hf, arguments, record)


def other_idefics(**settings) -> mv.VLM:
    config, processor = idefics()
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = perturb(transformers.IdeficsForVisionText2Text._from_config(config, dtype=torch.float32), 0)
    return mv.load(hf, processor)


@pytest.mark.families
@pytest.mark.parametrize("settings", [{"alpha_type": "vector"}, {"qk_layer_norms": True}, {"use_resampler": False}])
def test_other_builds_of_idefics(settings):
    """A gate for each dimension, normed queries and keys, and the patches themselves as memory."""
    vlm = other_idefics(**settings)
    inputs = vlm.inputs([families.picture(60, 44, 0), families.picture(20, 20, 1)], ["what is this", "hi"])
    assert all(
        holds(difference, vlm) for difference in check_claims(vlm, inputs[0], own_forward(vlm, inputs[0])).values()
    )
    parts = mv.logit_attribution(vlm, inputs, ANSWER)
    with torch.no_grad():
        close(parts.total, vlm.hf(**vlm.encoding(inputs)).logits[:, -1, ANSWER], 1e-3)
    n_memory = mv.memory_attention(vlm, inputs, dst="last").norm.shape[-1]
    assert n_memory == (17 if settings == {"use_resampler": False} else 6)
    text = inspect_model(vlm.hf, vlm.processor).text()
    assert ("mean size over dimensions" in text) == ("alpha_type" in settings)
    assert len(vlm.gates[0].attn) == (64 if "alpha_type" in settings else 1)


@pytest.mark.families
def test_tokens_that_idefics_added_count(idefics_case):
    """Its embedding and unembedding keep them apart: 4 of 404."""
    vlm = idefics_case.vlm
    assert vlm.d_vocab == idefics_case.seen["logits"].shape[-1] == 404
    assert vlm.W_U.shape == (64, 404)
    assert torch.equal(vlm.W_E[402], vlm.hf.model.embed_tokens(torch.tensor([402]))[0])
    parts = mv.logit_attribution(vlm, idefics_case.inputs, 402)
    close(parts.total, idefics_case.seen["logits"][:, -1, 402], 1e-3)


def test_ndif_is_refused(tmp_path):
    hf, processor = families.build("mllama")
    hf.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(mv.ModelError, match="NDIF's sandbox does not show: load it here"):
        mv.load(tmp_path, remote=True)


@pytest.mark.families
def test_several_images_of_idefics_are_refused(idefics_case):
    with pytest.raises(mv.InputError, match="takes 1"):
        idefics_case.vlm.inputs([[families.picture(20, 20, 0), families.picture(20, 20, 1)]], "a")


@pytest.mark.families
def test_two_images_of_mllama(case):
    """Each with tiles of its own: the memory is twice as long, the weights are Hugging Face's."""
    if case.name != "mllama":
        pytest.skip("its processor takes one")
    images = [[families.picture(60, 44, i), families.picture(20, 20, i + 3)] for i in range(2)]
    inputs = case.vlm.inputs(images, ["<|image|><|image|>what", "<|image|>a <|image|>long one"])
    result = mv.memory_attention(case.vlm, inputs, dst="last")
    rows: list = []
    hook = case.attention_of(1).register_forward_hook(lambda m, a, out: rows.append(out[1]))
    with torch.no_grad():
        case.twin(**case.vlm.encoding(inputs))
    hook.remove()
    close(result.weight[0, :, :, 0], rows[0][:, :, -1], 1e-3)
    assert result.norm.shape[-1] == 2 * 2 * 17
