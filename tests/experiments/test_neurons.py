"""Multimodal neurons against plain formulas; attribution is the slope of the logit."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import FAMILIES, instructblip, llava
from mechvlm.experiments import multimodal_neurons as experiment
from mechvlm.experiments.multimodal_neurons import MultimodalNeuronsResult, decode_columns, reads_as_words
from mechvlm.families.record import part

ANSWERS = [7, 421, 9]
N = 30


def with_hooks(vlm, inputs, layer: int, change=None):
    """Hugging Face's own forward: the last logits, and the input of the layer's output matrix.

    `change` may replace that input.
    """
    acts = []

    def hook(module, args):
        acts.append(args[0] if change is None else change(args[0]))
        return (acts[-1],)

    handle = part(vlm.hf, vlm.record.layers)[layer].mlp.down_proj.register_forward_pre_hook(hook)
    with torch.no_grad():
        logits = vlm.hf(**vlm.encoding(inputs)).logits[:, -1]
    handle.remove()
    return logits, acts[0]


@pytest.fixture(scope="module")
def neurons(vlm, batch):
    return mv.multimodal_neurons(vlm, batch, ANSWERS, k=N, k_words=3)


@pytest.mark.parametrize(
    ("build", "options"), [(llava, {}), (llava, {"kv_heads": 2, "bias": True}), (instructblip, {})]
)
def test_attribution_is_the_slope_of_the_logit(build, options, monkeypatch):
    """The logit's change as the neuron's activations on the image alone are scaled by 1 ± 1e-4.

    In float64.
    """

    def in_float64(norm, x):  # Hugging Face's own norm rounds to float32 even then
        return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", in_float64)
    hf, processor = build.__wrapped__(**options)  # a new model: the cached ones are traced already
    vlm = mv.load(hf.double(), processor)
    batch = vlm.inputs([noise_image(i) for i in range(2)], ["what is this", "describe the scene . a what is this"])
    batch.encoding["pixel_values"] = batch.encoding["pixel_values"].double()
    got = mv.multimodal_neurons(vlm, batch, ANSWERS[:2], k=8)
    assert len(set(got.layer.tolist())) > 1, "neurons of several layers, or a layer off by one would pass"
    step = 1e-4
    for n, (layer, index) in enumerate(zip(got.layer.tolist(), got.index.tolist(), strict=True)):
        moved = []
        for factor in (1 + step, 1 - step):

            def scale(act, factor=factor, index=index):
                act = act.clone()
                for row, tokens in enumerate(batch.token_maps):
                    act[row, tokens.image, index] *= factor
                return act

            moved.append(with_hooks(vlm, batch, layer, scale)[0])
        slope = (moved[0] - moved[1])[range(2), ANSWERS[:2]] / (2 * step)
        torch.testing.assert_close(got.attribution[:, n], slope.float(), rtol=1e-5, atol=1e-8)
    assert (got.attribution.abs() > 1e-6).any()


def test_they_are_the_strongest_that_read_as_words(vlm, batch, neurons):
    mean = neurons.attribution.mean(0)
    assert (mean > 0).all()
    assert mean.tolist() == sorted(mean.tolist(), reverse=True)
    tokens = torch.tensor(ANSWERS)
    attribution, activity = experiment.attribute_to_neurons(vlm, batch, tokens)
    places = list(zip(neurons.layer.tolist(), neurons.index.tolist(), strict=True))
    norm, w_u = part(vlm.hf, vlm.record.norm).weight, part(vlm.hf, vlm.record.unembed).weight
    expected, passed_over = set(), 0
    for number in attribution.mean(0).flatten().argsort(descending=True).tolist():
        layer, index = divmod(number, attribution.shape[-1])
        column = part(vlm.hf, vlm.record.layers)[layer].mlp.down_proj.weight[:, index]
        sign = -1 if activity.mean(0)[layer, index] < 0 else 1
        with torch.no_grad():
            best = (w_u @ (norm * column * sign)).topk(3).indices
        words = vlm.to_str_tokens(best)
        if (layer, index) in places:
            row = places.index((layer, index))
            assert int(neurons.sign[row]) == sign
            assert neurons.words[row] == words
        if reads_as_words(words):
            expected.add((layer, index))
        else:
            passed_over += 1
        if len(expected) == N:
            break
    assert set(places) == expected
    assert passed_over > 0


def test_activations_are_the_inputs_of_the_output_matrix(vlm, batch, neurons):
    for n, (layer, index) in enumerate(zip(neurons.layer.tolist(), neurons.index.tolist(), strict=True)):
        _, acts = with_hooks(vlm, batch, layer)
        for row, tokens in enumerate(batch.token_maps):
            torch.testing.assert_close(neurons.activation[row, n], acts[row, tokens.image, index], rtol=1e-4, atol=1e-6)
    mean = neurons.activation.mean((0, 2))
    assert torch.equal(neurons.sign, torch.where(mean < 0, -1, 1))
    if vlm.record.visual_tokens == "patches":
        grid = batch.token_maps[0].grids[0]
        assert neurons.grid == (grid.rows, grid.cols)
        assert torch.equal(neurons.maps[1, 2, 1, 3], neurons.activation[1, 2, grid.cols + 3])
    else:
        with pytest.raises(ValueError, match="query_reading"):
            _ = neurons.maps


def test_batches_change_nothing(vlm, batch, neurons):
    singles = mv.multimodal_neurons(vlm, [batch[0], batch[1], batch[2]], ANSWERS, k=N, k_words=3)
    assert torch.equal(singles.layer, neurons.layer)
    assert torch.equal(singles.index, neurons.index)
    assert singles.words == neurons.words
    assert singles.answers == neurons.answers == vlm.to_str_tokens(torch.tensor(ANSWERS))
    torch.testing.assert_close(singles.attribution, neurons.attribution, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(singles.activation, neurons.activation, rtol=1e-3, atol=1e-5)


def test_examples_with_different_numbers_of_image_tokens(llava_vlm):
    one_image = llava_vlm.inputs(noise_image(0), "what is this")
    two_images = llava_vlm.inputs([[noise_image(1), noise_image(2)]], "what is this")
    got = mv.multimodal_neurons(llava_vlm, [one_image, two_images], 7, k=2)
    assert got.activation.shape == (2, 2, 32)
    assert got.activation[0, :, 16:].isnan().all()
    assert not got.activation[1].isnan().any()
    assert got.grid == ()


def test_nothing_is_left_behind(vlm, batch):
    """No parameter has a gradient, gradients stay as they were, and the logits are the same."""
    before = with_hooks(vlm, batch, 0)[0]
    with torch.no_grad():
        got = mv.multimodal_neurons(vlm, batch, k=1)
    assert not any(p.grad is not None for p in vlm.hf.parameters())
    assert all(p.requires_grad for p in vlm.hf.parameters())
    assert not any(getattr(got, name).requires_grad for name in ("attribution", "activation"))
    assert torch.equal(with_hooks(vlm, batch, 0)[0], before)
    assert got.answers == vlm.to_str_tokens(before.argmax(-1))


def test_a_frozen_model_gives_the_same(batch, vlm, neurons):
    vlm.hf.requires_grad_(False)
    try:
        frozen = mv.multimodal_neurons(vlm, batch, ANSWERS, k=N, k_words=3)
    finally:
        vlm.hf.requires_grad_(True)
    assert torch.equal(frozen.attribution, neurons.attribution)


def test_bfloat16(batch):
    hf, processor = FAMILIES["llava"]()
    whole, half = mv.load(hf, processor), mv.load(copy.deepcopy(hf).to(torch.bfloat16), processor)
    inputs = whole.inputs(noise_image(0), "what is this")
    exact, got = (experiment.attribute_to_neurons(v, inputs, torch.tensor([7]))[0] for v in (whole, half))
    assert got.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact.flatten(), got.flatten()]))[0, 1] > 0.98


def test_a_column_worked_by_hand():
    """Neuron 0 writes (1, 2), neuron 1 (0, -1).

    The norm's weight (1, 10) makes them (1, 20) and (0, -10).
    """
    columns = torch.tensor([[1.0, 0], [2, -1]])
    w_u = torch.tensor([[1.0, 0], [0, 1], [0, -1]])
    tokens, logits = decode_columns(columns, torch.tensor([1.0, 10]), w_u, 2)
    assert tokens.tolist() == [[1, 0], [2, 0]]
    assert logits.tolist() == [[20, 1], [10, 0]]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [((" red", " blue"), True), ((" red", "\n"), True), ((" red", "\n", "?"), False), ((" ", "."), False)],
)
def test_what_reads_as_words(pieces, expected):
    assert reads_as_words(pieces) is expected


def test_table_file_and_intervals(neurons, tmp_path):
    frame = neurons.to_frame()
    row = frame[(frame["rank"] == 3) & (frame.example == 1)].iloc[0]
    assert row.attribution == pytest.approx(float(neurons.attribution[1, 2]))
    assert row.mean_activation == pytest.approx(float(neurons.activation[1, 2].mean()))
    assert (row.layer, row["index"]) == (int(neurons.layer[2]), int(neurons.index[2]))
    assert row.words == " ".join(word.strip() for word in neurons.words[2])
    assert row.answer == neurons.answers[1]
    mean, low, high = neurons.interval
    torch.testing.assert_close(mean, neurons.attribution.mean(0))
    assert ((low <= mean) & (mean <= high)).all()
    neurons.save(tmp_path / "x.safetensors")
    loaded = MultimodalNeuronsResult.load(tmp_path / "x.safetensors")
    assert (loaded.words, loaded.grid, loaded.answers) == (neurons.words, neurons.grid, neurons.answers)
    assert torch.equal(loaded.activation, neurons.activation)


def test_bad_requests_are_named(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    with pytest.raises(mv.InputError, match="k=0 neurons of k_words=5"):
        mv.multimodal_neurons(llava_vlm, inputs, k=0)
    with pytest.raises(mv.InputError, match="k_words=0 words were asked for: k is at least 1, k_words 1 to 32064"):
        mv.multimodal_neurons(llava_vlm, inputs, k_words=0)
    with pytest.raises(mv.InputError, match=r"k=193 neurons were asked for; \d+ of 192 have a positive attribution"):
        mv.multimodal_neurons(llava_vlm, inputs, k=193)
    with pytest.raises(mv.InputError, match="2 answers were given for 1 examples"):
        mv.multimodal_neurons(llava_vlm, inputs, ["a", "b"])


def test_nan_is_named(llava_vlm):
    inputs = llava_vlm.inputs([noise_image(i) for i in range(2)], "what is this")
    inputs.encoding["pixel_values"][1] = torch.nan
    with pytest.raises(
        mv.NonFiniteError, match=r"NaN or infinite up to layer 2 \(of 0 to 2\), in example\(s\) \[1\]"
    ) as error:
        mv.multimodal_neurons(llava_vlm, inputs, 7)
    assert error.value.examples == (1,)


@pytest.mark.filterwarnings("ignore:Glyph .* missing")  # random weights decode to every script
def test_the_picture_shows_each_neuron_and_where_it_fires(vlm, batch, neurons, tmp_path):
    ax = neurons.plot()
    ax.figure.savefig(tmp_path / "x.png")
    bars = next(c for c in ax.containers if type(c).__name__ == "BarContainer")
    assert [bar.get_width() for bar in bars] == pytest.approx(neurons.attribution.mean(0).tolist())
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the strongest on top"
    assert "logits" in ax.get_xlabel()
    assert ax.get_yticklabels()[1].get_text().startswith(f"layer {int(neurons.layer[1])}, {int(neurons.index[1])}\n")
    side = ax.figure.axes[1]
    assert len(side.images) == N
    best = int(neurons.attribution[:, 1].argmax())
    drawn = torch.as_tensor(side.images[1].get_array().filled())
    torch.testing.assert_close(drawn.flatten(), neurons.activation[best, 1])
    alone = mv.multimodal_neurons(vlm, batch[0], 7, k=1).plot()
    assert len(alone.containers) == 1, "one example has no interval"
