"""Norm-based attention to an image's memory, its knockouts, and what needs visual positions."""

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.every_method import ANSWER, changed, close
from helpers.memory_case import MemoryCase


@pytest.fixture(scope="module", params=["mllama", "idefics"])
def case(request) -> MemoryCase:
    return MemoryCase(request.param)


@pytest.fixture(scope="module")
def idefics_case() -> MemoryCase:
    return MemoryCase("idefics")


# -- norm-based attention --------------------------------------------------------------------------


def vectors_of(case: MemoryCase, layer: int) -> torch.Tensor:
    """gate α_h v_hm W_O^h of each head, position and vector, [example head dest memory d_model]."""
    kept: list = []
    hook = case.attention_of(layer).v_proj.register_forward_hook(lambda m, a, out: kept.append(out))
    case.run()
    hook.remove()
    alpha, w_o = case.seen["attentions"][layer], case.attention_of(layer).o_proj.weight.detach()
    v = kept[0].reshape(len(alpha), -1, kept[0].shape[-1]).unflatten(-1, (-1, 16)).transpose(1, 2)
    v = v.repeat_interleave(4 // v.shape[1], 1)
    written = torch.einsum("bhme,hed->bhmd", v, w_o.T.reshape(4, 16, 64))
    vectors = case.gate(layer, "attn") * alpha[..., None] * written[:, :, None]
    if case.name == "idefics":
        vectors[~case.is_open[:, None, :].expand(-1, 4, -1)] = 0
    return vectors.detach()


def test_norms_are_those_of_the_vectors(case):
    """Summed over heads, and of each head; also where the memory is closed."""
    result = mv.memory_attention(case.vlm, case.inputs, dst="all pairs")
    assert result.layers == case.memory
    for at, layer in enumerate(case.memory):
        vectors = vectors_of(case, layer)
        real = case.real
        close(result.norm[at][real], vectors.sum(1).norm(dim=-1)[real], 1e-3)
        by_head = result.norm_head[at].transpose(1, 2)
        close(by_head[real], vectors.norm(dim=-1).transpose(1, 2)[real], 1e-3)
        # What the heads write to the last position, before the gate.
        written = vectors[:, :, -1].sum(2) / case.gate(layer, "attn")
        total = case.read("z")["z"][layer][:, -1]
        close(written, torch.einsum("bhe,hed->bhd", total, case.vlm.W_O[layer].detach()), 1e-3)


def test_positions_before_the_image(case):
    result = mv.memory_attention(case.vlm, case.inputs, dst=[[int(case.inputs.token_maps[i].all[0])] for i in range(3)])
    if case.name == "idefics":
        assert not result.norm.any()
        assert not result.weight.any()
    else:
        close(result.weight.sum(-1), torch.ones_like(result.weight.sum(-1)))


@pytest.mark.families
def test_results_of_batches_are_joined(case, tmp_path):
    """As one batch has them: other lengths of padding move the destinations."""
    whole = mv.memory_attention(case.vlm, case.inputs, dst=["last", "last_text"])
    parts = [mv.memory_attention(case.vlm, case.inputs[i], dst=["last", "last_text"]) for i in range(3)]
    joined = mv.concat(parts)
    assert torch.equal(joined.dest, whole.dest)
    for name in ("norm", "weight", "value_norm"):
        close(getattr(joined, name), getattr(whole, name), 1e-3)
    every = mv.concat([mv.memory_attention(case.vlm, case.inputs[i], dst="all pairs") for i in range(3)])
    assert every.norm.shape[2] == len(case.inputs.token_maps[0])
    close(every.norm[:, :, -1], whole.norm[:, :, 0], 1e-3)
    with pytest.raises(mv.InputError, match="they mean other tokens"):
        mv.concat([mv.memory_attention(case.vlm, case.inputs[i], dst=len(case.inputs[i].tokens) - 1) for i in range(2)])
    whole.save(tmp_path / "memory.safetensors")
    loaded = mv.MemoryAttentionResult.load(tmp_path / "memory.safetensors")
    assert torch.equal(loaded.norm, whole.norm)
    assert (loaded.layers, loaded.names) == (whole.layers, whole.names)
    frame = whole.to_frame()
    row = frame.query(
        "measure == 'norm' and layer == @case.memory[1] and example == 2 and dest == 'last' and memory == 3"
    )
    assert row["value"].item() == pytest.approx(float(whole.norm[1, 2, 0, 3]))
    row = frame.query(
        "measure == 'weight' and layer == @case.memory[0] and example == 1 and dest == 'last' and memory == 2"
    )
    assert row["value"].item() == pytest.approx(float(whole.weight[0, 1, :, 0, 2].mean()))


@pytest.mark.families
def test_the_plot_names_its_layers(case):
    ax = mv.memory_attention(case.vlm, case.inputs, dst="last").plot()
    shown = [label for text in ax.get_yticklabels() if (label := text.get_text())]
    assert [shown[0], shown[-1]] == [str(case.memory[0]), str(case.memory[-1])]
    assert ax.get_xlabel() == "vector of the image's memory"


def test_all_that_memory_layers_write_comes_from_the_image(case):
    """And nothing of what the others write; the parts sum to Hugging Face's logit."""
    parts = mv.logit_attribution(case.vlm, case.inputs, ANSWER)
    close(parts.total, case.seen["logits"][:, -1, ANSWER], 1e-3)
    for layer in range(case.vlm.n_layers):
        expected = parts.heads[layer] if layer in case.memory else torch.zeros_like(parts.heads[layer])
        assert torch.allclose(parts.from_image[layer], expected, atol=1e-4)
        assert parts.heads[layer].abs().max() > 1e-2


# -- knockouts -------------------------------------------------------------------------------------


def knocked(case: MemoryCase, **options) -> torch.Tensor:
    with torch.no_grad(), case.vlm.trace(case.inputs):
        mv.knock_out(case.vlm, src="memory", **options)
        logits = nnsight.save(case.vlm.logits)
    return logits


def test_closed_by_layer_and_position(case):
    """The twin's own cross-attention writes 0 at these positions of each example."""
    where = [[-1, -2], [-1], [-3]]
    for layers in ([case.memory[0]], [case.memory[1]], list(case.memory)):

        def zero(x):
            for row, positions in enumerate(where):
                x[row, positions] = 0
            return x

        hooks = [changed(case.attention_of(layer), zero) for layer in layers]
        for hook in hooks:
            hook.__enter__()
        expected = case.run().logits
        for hook in hooks:
            hook.__exit__(None, None, None)
        logits = knocked(case, dst=where, layers=layers)
        close(logits[case.real], expected[case.real])
        assert (logits - case.seen["logits"])[case.real].abs().max() > 1e-2


@pytest.mark.families
def test_closed_everywhere_is_a_gate_of_0(case):
    """All positions at one layer: a twin whose gate is shut."""
    layer = case.memory[1]
    name = "cross_attn_attn_gate" if case.name == "mllama" else "alpha_cross_attn"
    parameter = getattr(case.layer(layer), name)
    kept = parameter.detach().clone()
    expected = case.seen["logits"]
    with torch.no_grad():
        parameter.zero_()
        shut = case.run().logits
        parameter.copy_(kept)
    assert (shut - expected)[case.real].abs().max() > 1e-2
    close(knocked(case, dst=[m.all for m in case.inputs.token_maps], layers=layer)[case.real], shut[case.real])


@pytest.mark.families
def test_closed_to_a_position_is_idefics_own_mask(idefics_case):
    """Hugging Face's forward with the processor's mask closed at the last positions."""
    case = idefics_case
    where = [[-1, -4], [-1], [-2]]
    encoding = {key: value.clone() for key, value in case.encoding.items()}
    for row, positions in enumerate(where):
        encoding["image_attention_mask"][row, positions] = 0
    with torch.no_grad():
        expected = case.twin(**encoding).logits
    close(knocked(case, dst=where, layers=case.memory)[case.real], expected[case.real])


def test_closed_to_some_heads(case):
    layer = case.memory[0]

    def zero(x):
        x[:, -1, 16:32] = 0
        return x

    with changed(case.attention_of(layer).o_proj, zero, entering=True):
        expected = case.run().logits
    close(knocked(case, dst=-1, layers=layer, heads=1)[case.real], expected[case.real])


@pytest.mark.families
def test_knockouts_that_cannot_be(case, llava_vlm):
    other = next(layer for layer in range(case.vlm.n_layers) if layer not in case.memory)
    with pytest.raises(mv.ModelError, match=f"layer {other} of .* reads no memory of an image; its layers"):
        knocked(case, dst=-1, layers=other)
    with (
        pytest.raises(mv.ModelError, match="attends to the image's memory, and to no position"),
        torch.no_grad(),
        case.vlm.trace(case.inputs),
    ):
        mv.knock_out(case.vlm, src=-2, dst=-1, layers=case.memory[0])
    with (
        pytest.raises(mv.ModelError, match="no layer does"),
        torch.no_grad(),
        llava_vlm.trace(llava_vlm.inputs(families.picture(60, 44, 0), "a")),
    ):
        mv.knock_out(llava_vlm, src="memory", dst=-1, layers=0)
    if case.name == "idefics":
        with pytest.raises(ValueError, match=r"the memory is closed to dst .* as it is"):
            knocked(case, dst=[[int(m.all[0])] for m in case.inputs.token_maps], layers=case.memory[0])


@pytest.mark.families
def test_flows_from_the_memory(case):
    """Windows of two layers, each as one whole forward."""
    vlm, example = case.vlm, case.inputs[0]
    got = mv.information_flow(vlm, example, ANSWER, window=2)
    assert got.flows == ("memory -> question", "memory -> last", "question -> last", "last -> last")
    for flow, dst in enumerate((example.tokens.question, torch.tensor([example.tokens.last]))):
        for window, (first, stop) in enumerate(got.windows):
            with torch.no_grad(), vlm.trace(example):
                for layer in range(first, stop):
                    if layer in case.memory:
                        new = vlm.z[layer].clone()
                        new[:, dst] = 0
                        vlm.z[layer] = new
                p = nnsight.save(vlm.logits[0, -1].softmax(-1)[ANSWER])
            close(got.p_knocked[flow, window, 0], p, 1e-3)


# -- what needs visual positions -------------------------------------------------------------------

NEEDS_POSITIONS = {
    "image positions": lambda vlm, inputs: inputs.token_maps[0].image,
    "a selection": lambda vlm, inputs: inputs.token_maps[0].select("last_image"),
    "boxes": lambda vlm, inputs: inputs.token_maps[0].pos_in_box((0, 0, 20, 20)),
    "the lens on visual tokens": lambda vlm, inputs: mv.logit_lens(vlm, inputs),
    "contextualization": lambda vlm, inputs: mv.contextualization(vlm, inputs),
    "queries": lambda vlm, inputs: mv.query_reading(vlm, inputs),
    "flows of positions": lambda vlm, inputs: mv.information_flow(vlm, inputs[0], ANSWER, flows=["image -> last"]),
    "noise on the image": lambda vlm, inputs: mv.causal_trace(vlm, inputs[0], ANSWER, corrupt="noise", groups=["last"]),
    "objects": lambda vlm, inputs: mv.object_ablation(vlm, inputs, [(0, 0, 9, 9)] * 3, ANSWER),
    "neurons": lambda vlm, inputs: mv.multimodal_neurons(vlm, inputs, ANSWER),
    "a study": lambda vlm, inputs: mv.study.run([vlm], mv.datasets.load_dataset("scenes", 2), out="nowhere"),
}


@pytest.mark.parametrize("what", NEEDS_POSITIONS)
@pytest.mark.families
def test_what_needs_visual_positions_says_why_it_cannot_be(case, what):
    with pytest.raises(ValueError, match=r"image is a memory .*: no position of the sequence holds a visual token"):
        NEEDS_POSITIONS[what](case.vlm, case.inputs)


@pytest.mark.families
def test_products_of_weights_are_refused(case):
    layer = case.memory[0]
    with pytest.raises(mv.ModelError, match="a norm, a factor or a gate"):
        case.vlm.OV(layer)
    with pytest.raises(mv.ModelError, match="of a state and a vector of the memory"):
        case.vlm.QK(layer)
