"""The plots of probes, held to values computed here: several examples, nothing square, deep.

Each is read from its artists, at the place where a reader sees it.
"""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

import mechvlm as mv
from helpers.artists import (
    bands,
    bar_of,
    edges_of,
    ends_of,
    line_of,
    mesh_of,
    note_of,
    on_screen,
    value_at,
    words_at,
    x_ticks,
    y_ticks,
)
from mechvlm.figures.style import LINES
from mechvlm.intervals import mean_interval


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- logit lens ---


def lens(n_points: int = 37, n_states: int = 12, first: int = 5) -> mv.LogitLensResult:
    """A lens of every second state; the likeliest token of state s and point p is "s.p"."""
    states, k = tuple(range(0, 2 * n_states, 2)), 3
    ids = torch.arange(n_states * n_points * k).view(n_states, n_points, k)
    names = [f" {states[s]}.{p}{'' if rank == 0 else '?'}" for s, p, rank in np.ndindex(n_states, n_points, k)]
    probs = random(n_states, n_points, k).sort(-1, descending=True).values
    example = (torch.arange(n_points) >= n_points // 3).long()
    position = torch.where(example == 0, 0, 3) + first + torch.arange(n_points) * 2
    return mv.LogitLensResult(ids, probs, states, example, position, tuple(enumerate(names)), True, "some/model")


def test_the_lens_writes_each_points_word_on_its_probability():
    result = lens()
    ax = result.plot()
    (image,) = ax.images
    top = result.probs[:, :, 0].numpy()
    assert on_screen(image) == pytest.approx(top[::-1]), "the first state at the bottom"
    words = words_at(ax)
    assert len(words) == 12 * 37
    for (col, row), word in words.items():
        assert word == f"{result.states[int(row)]}.{int(col)}"
        assert value_at(image, col, row) == pytest.approx(top[int(row), int(col)])
    pale = {t.get_position()[::-1] for t in ax.texts if t.get_color() == "white"}
    assert pale == {tuple(cell) for cell in np.argwhere(top > 0.6).tolist()}
    rows = y_ticks(ax)
    assert {0, 4, 8} <= rows.keys()
    assert rows == {row: str(round(2 * row)) for row in rows}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("position", "state (0 = embeddings)")
    assert (bar_of(image).get_ylabel(), image.get_clim()) == ("probability", (0, 1))
    assert ax.get_title() == "Logit lens: likeliest token, model"


@pytest.mark.parametrize("n_points", [9, 37, 81, 600])
def test_ticks_of_the_lens_name_their_own_points(n_points):
    result = lens(n_points, 2)
    ax = result.plot()
    ticks = x_ticks(ax)
    assert 4 <= len(ticks) <= 12, "neither too few nor so many that they overlap"
    assert 0 in ticks
    assert ticks == {at: str(int(result.position[int(at)])) for at in ticks}
    assert len(ax.texts) == (2 * n_points if n_points <= 80 else 0)
    assert note_of(ax) == ("" if n_points <= 80 else f"words left out: {n_points} positions")


def test_words_of_the_lens_are_shortened():
    long = lens(2, 1)
    long = mv.LogitLensResult(**{**vars(long), "vocabulary": tuple((i, " a long word") for i in range(6))})
    assert set(words_at(long.plot()).values()) == {"a long …"}


# --- norm-based attention ---


def test_norms_are_the_mean_over_examples_of_the_first_destination():
    n_layers, n_src = 11, 37
    weight = random(n_layers, 3, 4, 2, n_src)
    result = mv.NormAttentionResult(
        norm=random(n_layers, 3, 2, n_src, seed=1), weight=weight, value_norm=random(n_layers, 3, 4, n_src),
        layers=tuple(range(3, n_layers + 3)), dest=torch.tensor([[36, 20], [36, 21], [36, 22]]),
        names=("last_text", "last_image"), model="some/model",
    )  # fmt: skip
    ax = result.plot()
    mesh = mesh_of(ax)
    expected = sum(result.norm[:, example, 0] for example in range(3)) / 3
    assert on_screen(mesh) == pytest.approx(expected.numpy()[::-1], rel=1e-5), "the first layer at the bottom"
    for layer, src in [(0, 0), (3, 36), (10, 1)]:
        assert value_at(mesh, src, layer) == pytest.approx(float(expected[layer, src]), rel=1e-5)
    rows = y_ticks(ax)
    assert {0, 10} <= rows.keys()
    assert rows == {row: str(round(row) + 3) for row in rows}, "by the layers that were read"
    ticks = x_ticks(ax)
    assert ticks == {at: str(round(at)) for at in ticks}
    assert 5 <= len(ticks) <= 12
    assert (ax.get_title(), note_of(ax)) == ("Norm-based attention of last_text, model", "mean of 3 examples")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("source position", "layer (0 = first)")
    assert bar_of(mesh).get_ylabel() == "norm written (residual-stream units)"


# --- contextualization ---


def cosines(n_states: int, n: int = 5, adjusted: bool = False) -> mv.ContextualizationResult:
    curves = [random(n_states, n, seed=i) + 2 * i for i in range(3)]
    return mv.ContextualizationResult(
        *curves, random(3, n_states), True, False, adjusted, "some/model", *[random(n_states, 2)] * 2, random(3, n_states)
    )  # fmt: skip


@pytest.mark.parametrize("n_states", [4, 33])
def test_cosines_are_means_over_examples_in_their_deviation(n_states):
    result = cosines(n_states)
    ax = result.plot()
    assert len(ax.lines) == 3
    for pair, label in [("inter", "image – text"), ("image", "within image"), ("text", "within text")]:
        values = getattr(result, pair).numpy()
        line = line_of(ax, label)
        assert line.get_xdata().tolist() == list(range(n_states)), "from the embeddings on"
        assert line.get_ydata() == pytest.approx(values.mean(1), rel=1e-5)
        assert line.get_color() == LINES[pair].color
        (band,) = bands(ax, LINES[pair].color)
        for state, (low, high) in ends_of(band).items():
            each = values[int(state)]
            assert (low, high) == pytest.approx((each.mean() - each.std(), each.mean() + each.std()), rel=1e-4)
    ticks = x_ticks(ax)
    assert {0, 3} <= ticks.keys() if n_states == 4 else {0, 30} <= ticks.keys()
    assert ticks == {at: str(round(at)) for at in ticks}
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["image – text", "within image", "within text"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("state (0 = embeddings)", "mean cosine")
    assert cosines(4, adjusted=True).plot().get_ylabel() == "mean cosine less baseline"


# --- logit attribution ---


def attribution(n_layers: int = 12, n: int = 5, n_heads: int = 3) -> mv.LogitAttributionResult:
    """Parts of either sign; a few heads of one sign in all examples."""
    heads = random(n_layers, n, n_heads) - 0.5
    heads[2, :, 1] = 1 + 0.1 * random(n)
    heads[11, :, 0] = -1 - 0.1 * random(n)
    return mv.LogitAttributionResult(
        embed=3 + random(n), heads=heads, from_image=random(n_layers, n, n_heads, seed=2) * 0.3,
        attn_bias=5 + random(n_layers, n, seed=3), mlps=-2 + random(n_layers, n, seed=4), bias=random(n), logit=random(n),
        answers=(" red",) * n, versus=(" blue",) * n, model="some/model",
    )  # fmt: skip


def test_each_part_stands_at_its_layer_with_its_interval():
    result = attribution()
    ax = result.plot()
    image = result.from_image.numpy().sum(-1)
    rest = result.heads.numpy().sum(-1) - image + result.attn_bias.numpy()
    expected = {
        "embedding": result.embed.numpy()[None],
        "attention to the image": image,
        "attention to the rest": rest,
        "MLP": result.mlps.numpy(),
    }
    drawn = {container.get_label(): container for container in ax.containers}
    assert list(drawn) == list(expected)
    for label, values in expected.items():  # [layer example]
        line, _, (bars,) = drawn[label].lines
        layers = [-1] if label == "embedding" else list(range(12))
        assert np.rint(line.get_xdata()).tolist() == layers
        assert np.abs(line.get_xdata() - layers).max() < 0.25, "no part leans towards the next layer"
        assert line.get_ydata() == pytest.approx(values.mean(1), rel=1e-4)
        _, low, high = mean_interval(torch.tensor(values).T)
        for segment, *ends in zip(bars.get_segments(), low.tolist(), high.tolist(), strict=True):
            assert segment[:, 1] == pytest.approx(ends, rel=1e-4)
    assert ax.get_xlim()[0] < -1 < 11 < ax.get_xlim()[1]
    below = next(other for other in ax.figure.axes if other.get_ylabel() == "head")
    ticks = x_ticks(below)
    assert {0, 10} <= ticks.keys()
    assert ticks == {at: str(round(at)) for at in ticks}
    assert (below.get_xlabel(), ax.get_ylabel()) == ("layer (0 = first)", "written toward it (logits)")


def test_each_head_lies_over_its_layer_with_a_dot_where_its_sign_is_sure():
    result = attribution()
    ax = result.plot()
    top = next(below for below in ax.figure.axes if below.get_ylabel() == "head")
    mesh = mesh_of(top)
    mean = result.heads.numpy().mean(1)  # [layer head]
    assert on_screen(mesh) == pytest.approx(mean.T[::-1], rel=1e-4), "head 0 at the bottom"
    for layer, head in np.ndindex(12, 3):
        assert value_at(mesh, layer, head) == pytest.approx(mean[layer, head], rel=1e-4)
    assert mesh.norm.vcenter == 0
    assert mesh.norm.vmax == pytest.approx(np.abs(mean).max())
    (dots,) = (c for c in top.collections if c is not mesh)
    _, low, high = mean_interval(result.heads.transpose(0, 1))
    sure = np.argwhere(((low > 0) | (high < 0)).numpy()).tolist()  # (layer, head)
    assert {(2, 1), (11, 0)} <= {tuple(place) for place in sure}
    assert 2 <= len(sure) < 36
    assert sorted(dots.get_offsets().tolist()) == sure
    assert bar_of(mesh).get_ylabel() == "logits"
    assert ax.get_title() == "Logit attribution: red less blue, model"
    assert note_of(ax).startswith("mean of 5 examples with 95 % intervals")
    assert y_ticks(top).keys() >= {0, 1, 2}


def test_the_heads_lie_beneath_the_parts_over_the_same_layers():
    ax = attribution().plot()
    heads = next(other for other in ax.figure.axes if other.get_ylabel() == "head")
    ax.figure.draw_without_rendering()
    assert heads.get_position().y1 < ax.get_position().y0
    assert heads.get_xlim() == ax.get_xlim()
    assert heads.get_position().intervalx == pytest.approx(ax.get_position().intervalx)


def test_the_title_names_an_answer_only_if_all_share_it():
    several = attribution()
    several = mv.LogitAttributionResult(**{**vars(several), "answers": (" red", " green", *several.answers[2:])})
    assert several.plot().get_title() == "Logit attribution: each example's answer less blue, model"


# --- queries ---


def test_each_query_s_map_lies_below_its_number():
    result = mv.QueryReadingResult(random(4, 3, 7, 2, 5), "some/model")
    ax = result.plot()
    (picture,) = ax.images
    expected = result.weight.numpy().mean(0)[0]  # of example 0 [query row col]
    numbers = {word: place for place, word in words_at(ax).items()}
    assert list(numbers) == [str(query) for query in range(7)]
    for word, (x, y) in numbers.items():
        for row, col in np.ndindex(2, 5):
            assert value_at(picture, x + 0.4 + col, y + 0.4 + row) == pytest.approx(expected[int(word), row, col])
    assert on_screen(picture)[:2, :5] == pytest.approx(expected[0]), "upper row up, left column left"
    x, y = edges_of(picture)
    assert {(round(x + 0.4), round(y + 0.4)) for x, y in numbers.values()} == {
        (0, 0), (6, 0), (12, 0), (0, 3), (6, 3), (12, 3), (0, 6),
    }  # fmt: skip
    assert picture.get_clim()[0] == 0
    assert np.isnan(on_screen(picture)).sum() == picture.get_array().size - 7 * 10, "white between the maps"
    assert (ax.get_title(), note_of(ax)) == ("Where each query reads, model", "example 0, the first")
    assert note_of(result.plot(example=2)) == "example 2"
    assert bar_of(picture).get_ylabel() == "attention weight (mean over layers and heads)"
