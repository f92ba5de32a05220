"""One numbering: the layer that a result names is the layer of accessors and interventions.

Each case picks the place that a result ranks first. Its number must be the one with which the
model's own forward shows the same value, or with which an intervention has the effect. Twelve
layers are among the depths: there, numbers that were sorted or matched as text would be others.
"""

import pytest
import torch
from PIL import Image

import mechvlm as mv
from helpers.images import noise_image
from helpers.uneven import N_LAYERS, layered_vlm


@pytest.fixture(scope="module", params=N_LAYERS)
def vlm(request):
    return layered_vlm(request.param)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def inputs(vlm):
    return vlm.inputs(noise_image(3), "what is this")


def last_logits(vlm, inputs, **ablated) -> torch.Tensor:
    with vlm.trace(inputs):
        if ablated:
            mv.ablate(vlm, inputs.tokens.last, how="zero", at="z", **ablated)
        logits = vlm.logits[0, -1].save()
    return logits


def test_the_head_that_norm_attention_ranks_first_is_that_of_the_pattern(vlm, inputs):
    norms = mv.norm_attention(vlm, inputs, dst="last")
    on_image = norms.weight[:, 0, :, 0, inputs.tokens.image].sum(-1)  # [layer head]
    row, head = divmod(int(on_image.argmax()), vlm.n_heads)
    layer = norms.layers[row]
    with vlm.trace(inputs):
        pattern = vlm.pattern[layer][0, head, -1].save()
    torch.testing.assert_close(norms.weight[row, 0, head, 0], pattern, rtol=0, atol=1e-6)
    table = norms.to_frame().query("measure == 'weight'").set_index(["layer", "src"])["value"]
    with vlm.trace(inputs):
        mean = vlm.pattern[layer][0, :, -1].mean(0).save()
    assert table[layer].to_numpy() == pytest.approx(mean.numpy(), abs=1e-6)


def test_the_head_that_attribution_ranks_first_is_the_one_that_ablation_removes(vlm, inputs):
    """Ablated, its z is 0. What it wrote without the ablation is its attribution."""
    token = int(last_logits(vlm, inputs).argmax())
    parts = mv.logit_attribution(vlm, inputs, token)
    frame = parts.to_frame().query("part == 'head'")
    best = frame.loc[frame["value"].abs().idxmax()]
    layer, head = int(best["layer"]), int(best["head"])

    def written(ablated: bool) -> torch.Tensor:
        with vlm.trace(inputs):
            if ablated:
                mv.ablate(vlm, inputs.tokens.last, layers=layer, heads=head, how="zero", at="z")
            z = vlm.z[layer][0, -1, head].save()
        return z

    assert written(ablated=True).abs().max() == 0
    norm, unembed = vlm.readout()
    direction = unembed.weight[token].float() * norm.gain.float()
    with vlm.trace(inputs):
        last = vlm.resid_post[vlm.n_layers - 1][0, -1].save()
    vector = written(ablated=False) @ vlm.W_O[layer][head]
    assert float(vector @ direction / norm.rms(last[None])[0, 0]) == pytest.approx(best["value"], rel=1e-4)


def test_the_neuron_that_is_ranked_first_is_that_of_its_layer(vlm, inputs):
    neurons = mv.multimodal_neurons(vlm, inputs, k=3)
    layer, index = int(neurons.layer[0]), int(neurons.index[0])
    with vlm.trace(inputs):
        down = vlm.layers[layer].mlp.down_proj
        acts = down.input[0, inputs.tokens.image, index].save()
    torch.testing.assert_close(neurons.activation[0, 0], acts.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", ["resid_pre", "attn_out", "mlp_out"])
def test_the_layer_of_a_causal_trace_is_that_of_a_patch(vlm, inputs, at):
    trace = mv.causal_trace(vlm, inputs, corrupt="blank", at=at, groups=["last"])
    row = int(trace.effect[:, 0, 0].abs().argmax())
    layer, token = trace.layers[row], vlm.next_tokens(inputs)
    with vlm.trace(inputs):
        clean = getattr(vlm, at)[layer].save()
    grey = vlm.inputs(Image.new("RGB", inputs.images[0][0].size, (127, 127, 127)), "what is this")
    with vlm.trace(grey):
        mv.patch(vlm, clean, grey.tokens.last, layers=layer, at=at)
        logits = vlm.logits[0, -1].save()
    assert float(logits.softmax(-1)[token]) == pytest.approx(float(trace.p_restored[row, 0, 0]), abs=1e-5)


def test_the_layer_of_a_flow_is_that_of_a_knockout(vlm, inputs):
    flow = mv.information_flow(vlm, inputs, window=1, flows=["image -> last"])
    layer = int(flow.change[0, :, 0].abs().argmax())
    token = vlm.next_tokens(inputs)
    with vlm.trace(inputs):
        mv.knock_out(vlm, src=inputs.tokens.image, dst=inputs.tokens.last, layers=layer)
        logits = vlm.logits[0, -1].save()
    assert float(logits.softmax(-1)[token]) == pytest.approx(float(flow.p_knocked[0, layer, 0]), abs=1e-5)
    assert flow.windows[layer] == (layer, layer + 1)


def test_the_head_that_ablation_ranks_first_is_that_of_a_trace(vlm, inputs):
    first = mv.head_ablation(vlm, inputs, positions="last").heads(top=1, by="logit").iloc[0]
    layer, head, token = int(first["layer"]), int(first["head"]), vlm.next_tokens(inputs)
    clean, ablated = last_logits(vlm, inputs), last_logits(vlm, inputs, layers=layer, heads=head)
    assert float(ablated[token] - clean[token]) == pytest.approx(first["effect"], abs=1e-5)


def test_the_layer_and_head_of_a_grid_are_those_of_a_patch(vlm, inputs):
    other = vlm.inputs(noise_image(4), "what is this")
    for at in ("z", "resid_pre"):
        columns = {"positions": "last"} if at == "z" else {"positions": ["last"]}
        grid = mv.patch_grid(vlm, inputs, other, 7, versus=9, at=at, **columns)
        layer, column = divmod(int(grid.restored[..., 0].abs().argmax()), len(grid.columns))
        with vlm.trace(inputs):
            clean = getattr(vlm, at)[layer].save()
        with vlm.trace(other):
            mv.patch(vlm, clean, other.tokens.last, layer, at=at, heads=column if at == "z" else None)
            logits = vlm.logits[0, -1].save()
        assert float(logits[7] - logits[9]) == pytest.approx(float(grid.m_patched[layer, column, 0]), abs=1e-5)


def test_a_state_of_the_lens_is_what_the_layer_of_its_number_reads(vlm, inputs):
    lens = mv.logit_lens(vlm, inputs, k=1, positions="all")
    norm, unembed = vlm.readout()
    layer = vlm.n_layers - 2
    with vlm.trace(inputs):
        entering = vlm.resid_pre[layer].save()
    best = unembed(norm(entering[0])).float().softmax(-1).max(-1)
    torch.testing.assert_close(lens.probs[layer, :, 0], best.values, rtol=1e-4, atol=1e-6)
    assert lens.states == tuple(range(vlm.n_layers + 1))
    frame = lens.to_frame().query("state == @layer and rank == 1")
    assert frame["probability"].to_numpy() == pytest.approx(best.values.numpy(), rel=1e-4)
