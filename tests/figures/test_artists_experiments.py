"""The plots of experiments, held to values computed here: several examples, nothing square, deep.

Each is read from its artists, at the place where a reader sees it.
"""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

import mechvlm as mv
from helpers.artists import (
    bands,
    edges_of,
    ends_of,
    line_of,
    mesh_of,
    note_of,
    numbered,
    on_screen,
    value_at,
    words_at,
    x_ticks,
    y_ticks,
)
from mechvlm.experiments.object_ablation import ABLATION_CONDITIONS, BARS
from mechvlm.intervals import mean_interval


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- multimodal neurons ---


def neurons(grid: tuple[int, ...] = (2, 4), n: int = 3, n_neurons: int = 5, **other) -> mv.MultimodalNeuronsResult:
    """Neurons of which the attribution is largest in examples 2, 0, 1, 2 and 0."""
    attribution = random(n, n_neurons)
    attribution[[2, 0, 1, 2, 0][:n_neurons], range(n_neurons)] = 2 - 0.1 * torch.arange(n_neurons)
    values = {
        "layer": torch.tensor([7, 0, 11, 3, 9]), "index": torch.tensor([40, 300, 2, 17, 5]), "attribution": attribution,
        "activation": random(n, n_neurons, 8, seed=1) - 0.3, "sign": torch.ones(n_neurons, dtype=torch.long),
        "words": tuple(tuple(f" w{neuron}{i}" for i in range(7)) for neuron in range(n_neurons)),
        "answers": (" red",) * n, "grid": grid, "model": "some/model",
    }  # fmt: skip
    return mv.MultimodalNeuronsResult(**values | other)


def test_each_neuron_has_its_bar_its_interval_and_its_words():
    result = neurons()
    ax = result.plot()
    bars, errors = ax.containers
    values = result.attribution.numpy()
    _, low, high = mean_interval(result.attribution)
    assert len(bars) == 5
    (lines,) = errors.lines[2]
    for neuron, (bar, segment) in enumerate(zip(bars, lines.get_segments(), strict=True)):
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(neuron)
        assert bar.get_width() == pytest.approx(values[:, neuron].mean())
        assert segment[:, 0] == pytest.approx([float(low[neuron]), float(high[neuron])], rel=1e-4)
        assert segment[:, 1].tolist() == [neuron, neuron]
    layers, indices = [7, 0, 11, 3, 9], [40, 300, 2, 17, 5]
    assert y_ticks(ax) == {
        i: f"layer {layers[i]}, {indices[i]}\nw{i}0 w{i}1 w{i}2 w{i}3 w{i}4" for i in range(5)
    }  # fmt: skip
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the strongest on top"
    assert ax.get_title() == "Multimodal neurons for red, model"
    assert ax.get_xlabel() == "attribution on the image (logits)"
    assert "95 % intervals" in note_of(ax)


def test_each_neuron_s_map_lies_beside_its_bar_the_right_way_up():
    result = neurons()
    side = result.plot().figure.axes[1]
    assert len(side.images) == 5
    words = words_at(side)
    for neuron, (picture, best) in enumerate(zip(side.images, [2, 0, 1, 2, 0], strict=True)):
        expected = result.activation[best, neuron].view(2, 4).numpy()
        assert on_screen(picture) == pytest.approx(expected), "upper row up"
        _, y = edges_of(picture)
        assert neuron - 0.5 < y.min() < neuron < y.max() < neuron + 0.5
        most = np.abs(expected).max()
        assert picture.get_clim() == pytest.approx((-most, most))
        assert words[1.05, neuron] == f"±{most:.2g}\nexample {best}"
    assert side.get_ylim() == (4.5, -0.5)


def test_the_maps_lie_right_of_the_bars_and_move_with_them():
    ax, side = neurons().plot().figure.axes
    ax.figure.draw_without_rendering()
    assert ax.get_position().x1 < side.get_position().x0
    assert ax.get_position().width > side.get_position().width
    ax.set_ylim(2.5, -0.5)
    assert side.get_ylim() == (2.5, -0.5)


def test_the_title_names_an_answer_only_if_all_share_it():
    ax = neurons(answers=(" red", " green", " red")).plot()
    assert ax.get_title() == "Multimodal neurons for each example's answer, model"


def test_queries_without_a_grid_are_a_row():
    result = neurons(grid=())
    side = result.plot().figure.axes[1]
    for neuron, (picture, best) in enumerate(zip(side.images, [2, 0, 1, 2, 0], strict=True)):
        assert on_screen(picture) == pytest.approx(result.activation[best, neuron].numpy()[None])
    assert side.get_xlabel() == "activation, by query"


# --- information flow ---


def test_flows_of_33_layers_stand_at_their_layers():
    n_layers, flows = 33, ("image -> last", "question -> last", "last -> last")
    result = mv.InformationFlowResult(
        p=0.5 + 0.4 * random(4), p_knocked=random(3, n_layers, 4, seed=1), flows=flows,
        windows=tuple((max(0, i - 2), min(n_layers, i + 3)) for i in range(n_layers)), answers=(" a",) * 4, model="model",
    )  # fmt: skip
    ax = result.plot()
    for flow, name in enumerate(flows):
        line = line_of(ax, name.replace("->", "→"))
        change = 100 * (result.p_knocked[flow] - result.p) / result.p  # [layer example]
        assert line.get_xdata().tolist() == list(range(n_layers))
        assert line.get_ydata() == pytest.approx(change.numpy().mean(1), rel=1e-3, abs=1e-3)
        (band,) = bands(ax, line.get_color())
        _, low, high = mean_interval(change.T)
        expected = {float(i): (float(low[i]), float(high[i])) for i in range(n_layers)}
        ends = ends_of(band)
        assert ends.keys() == expected.keys()
        for layer in expected:
            assert ends[layer] == pytest.approx(expected[layer], rel=1e-3, abs=1e-3)
    assert numbered(x_ticks(ax))
    assert ax.get_xlabel() == "center of the window, layer (0 = first)"
    assert ax.get_title().endswith("in windows of 5 layers")


# --- causal trace ---


def test_effects_of_12_layers_stand_at_their_layers():
    n_layers, groups = 12, ("image", "question", "last", "question + last")
    result = mv.CausalTraceResult(
        p=0.8 + 0.1 * random(5), p_corrupt=0.1 * random(5, seed=1), p_restored=random(n_layers, 4, 5, seed=2), groups=groups,
        layers=tuple(range(n_layers)), windows=tuple((i, i + 1) for i in range(n_layers)), at="attn_out", corrupt="blank",
        answers=(" a",) * 5, model="model",
    )  # fmt: skip
    ax = result.plot()
    mesh = mesh_of(ax)
    effect = (result.p_restored - result.p_corrupt).numpy().mean(-1)  # [layer group]
    assert on_screen(mesh)[:, :4] == pytest.approx(effect[::-1], rel=1e-4), "the first layer at the bottom"
    places = {label: at for at, label in x_ticks(ax).items()}
    for group, name in enumerate(groups):
        for layer in range(n_layers):
            assert value_at(mesh, places[name], layer) == pytest.approx(effect[layer, group], rel=1e-4)
    total = float((result.p - result.p_corrupt).mean())
    assert value_at(mesh, places["total\neffect"], 5) == pytest.approx(total, rel=1e-4)
    assert numbered(y_ticks(ax))
    words = words_at(ax)
    for group, layer in np.ndindex(4, n_layers):
        assert words[group, layer] == f"{effect[layer, group]:.2f}".replace("-", "−")
    assert ax.get_title() == "Causal trace, model: image greyed out"
    assert ax.get_xlabel() == "positions whose attn_out was restored"


# --- object ablation ---


def test_each_bar_stands_at_its_margin_with_its_own_interval():
    n, margins = 8, (0, 1, 3, 5)
    after = (random(3, 4, n, seed=5) > torch.tensor([0.9, 0.5, 0.2])[:, None, None]).float()
    after[1, 2, 3:] = torch.nan
    result = mv.ObjectAblationResult(
        correct=torch.ones(n, dtype=torch.bool), correct_ablated=after, p=random(n), p_ablated=random(3, 4, n),
        n_tokens=torch.arange(4)[:, None] * 10 + torch.arange(n), conditions=ABLATION_CONDITIONS, margins=margins,
        answers=(" a",) * n, model="model",
    )  # fmt: skip
    ax = result.plot()
    drop = 100 * (1 - after.numpy())
    _, low, high = mean_interval(result.drop.movedim(-1, 0))
    lines = [c.get_segments() for c in ax.collections if isinstance(c, LineCollection)]
    for i, condition in enumerate(ABLATION_CONDITIONS):
        (bars,) = (c for c in ax.containers if c.get_label() == BARS[condition][0])
        for m, bar in enumerate(bars):
            middle = bar.get_x() + bar.get_width() / 2
            assert middle == pytest.approx(m + (i - 1) * 0.8 / 3), "side by side, in the conditions' order"
            assert bar.get_height() == pytest.approx(np.nanmean(drop[i, m]), abs=1e-3)
            assert lines[i][m][:, 0] == pytest.approx([middle, middle])
            assert lines[i][m][:, 1] == pytest.approx([float(low[i, m]), float(high[i, m])], abs=1e-3)
            (note,) = (t.get_text() for t in ax.texts if t.xy[0] == pytest.approx(middle) and t.get_text()[0].isdigit())
            few = "\nn = 3" if (i, m) == (1, 2) else ""
            assert note == f"{np.nanmean(drop[i, m]):.0f}{few}"
    assert x_ticks(ax) == {m: f"{margins[m]}\n{10 * m + 3.5} tokens" for m in range(4)}


# --- Winoground ---

PANELS = {
    "lens precision": "precision", "lens recall": "recall", "cosine of image and caption": "contextualization",
    "last token's reading of the image": "norm attention",
}  # fmt: skip


def pairs(n_layers: int = 10, n: int = 7) -> mv.WinogroundResult:
    values = random(5, n_layers + 1, n, 2, 2)
    values[3, -1] = torch.nan  # the last state has no attention
    values[4, :-1] = torch.nan
    values[4, -1, :5, 0, 0] += 1  # the text score is 3 of 7, the image score another one
    values[4, -1, :3, 1, 1] += 1
    return mv.WinogroundResult(values, tuple("abcdefg"), (("h", "no image"),), "Describe.", "some/model")


def test_each_score_has_its_own_chance():
    result = pairs()
    ax = Figure().add_subplot()
    result.plot(ax)
    logprob = result.values[4, -1].numpy()
    text = [(s[0, 0] > s[1, 0]) and (s[1, 1] > s[0, 1]) for s in logprob]
    image = [(s[0, 0] > s[0, 1]) and (s[1, 1] > s[1, 0]) for s in logprob]
    group = [a and b for a, b in zip(text, image, strict=True)]
    right = {"text score": text, "image score": image, "group score": group}
    ticks = x_ticks(ax)
    assert list(ticks.values()) == list(right)
    intervals, chance = (c.get_segments() for c in ax.collections)
    for (at, name), bar, ends, line in zip(ticks.items(), ax.containers[0], intervals, chance, strict=True):
        percent = 100 * np.mean(right[name])
        assert bar.get_x() + bar.get_width() / 2 == pytest.approx(at)
        assert bar.get_height() == pytest.approx(percent)
        _, low, high = mean_interval(100 * torch.tensor(right[name]).double())
        assert ends.tolist() == [[at, pytest.approx(float(low))], [at, pytest.approx(float(high))]]
        expected = 100 / 6 if name == "group score" else 25
        assert line[:, 1] == pytest.approx([expected, expected])
        assert line[0, 0] < bar.get_x() < at < line[1, 0]
        assert f"{percent:.1f}" in [words for (x, _), words in words_at(ax).items() if x == at]
    assert len({np.mean(values) for values in right.values()}) > 1
    assert ax.collections[1].get_label() == "chance"
    assert ax.get_title() == "Winoground's scores, model: n = 7 pairs, 1 set aside"


def test_each_panel_shows_the_difference_of_its_own_measure():
    result = pairs()
    ax = result.plot()
    panels = {panel.get_title(): panel for panel in ax.figure.axes if panel is not ax}
    assert list(panels) == list(PANELS)
    for title, panel in panels.items():
        # [layer pair caption image]
        values = result.values[result.measures.index(PANELS[title])].numpy()
        own = (values[..., 0, 0] + values[..., 1, 1]) / 2
        other = (values[..., 1, 0] + values[..., 0, 1]) / 2
        expected = (own - other).mean(-1)
        line = panel.lines[-1]
        assert line.get_xdata().tolist() == list(range(11))
        assert line.get_ydata() == pytest.approx(expected, abs=1e-6, nan_ok=True)
        (band,) = bands(panel)
        for layer, (low, high) in ends_of(band).items():
            assert low < expected[int(layer)] < high
        at = "layer (0 = first)" if PANELS[title] == "norm attention" else "state (0 = embeddings)"
        assert panel.get_xlabel() == at
        assert panel.get_ylabel() == "own less other caption"
