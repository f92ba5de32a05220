"""Every result draws its plot, with named axes, and changes nothing global."""

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import mechvlm as mv
from helpers.artists import y_ticks
from helpers.images import noise_image
from mechvlm.figures.style import LINES, curve, heatmap, style, text
from mechvlm.measures.phases import PHASE_COLORS


def all_results(vlm):
    inputs = vlm.inputs([noise_image(i) for i in range(3)], "what is this $ _ ^")
    results = list(mv.read(vlm, inputs, mv.LogitLens(k=2), mv.Contextualization(), mv.NormAttention()))
    if not inputs.token_maps[0].patches:
        results.append(mv.query_reading(vlm, inputs))
    return [*results, mv.fit_phases(results[1].inter.T)]


@pytest.mark.filterwarnings("ignore:Glyph .* missing")  # random weights decode to every script
@pytest.mark.parametrize("which", ["llava_vlm", "blip_vlm"])
def test_every_result_is_drawn(which, request, tmp_path):
    results = all_results(request.getfixturevalue(which))
    assert len(results) == (4 if which == "llava_vlm" else 5)
    for result in results:
        ax = result.plot()
        figure = ax.figure
        if type(result).__name__ != "QueryReadingResult":
            by_layer = type(result).__name__ == "NormAttentionResult"
            name = "layer (0 = first)" if by_layer else "state (0 = embeddings)"
            assert name in ax.get_xlabel() + ax.get_ylabel()
        # An unescaped $ or a missing glyph raises only when the figure is drawn.
        figure.savefig(tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 5000
        assert result.plot(ax) is ax
        plt.close(figure)


def test_curves_are_the_means_with_their_bands():
    ax = Figure().add_subplot()
    values = np.array([[0.0, 1, np.nan], [2, 3, np.nan], [4, np.nan, np.nan]])
    curve(ax, range(3), values, LINES["inter"])
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [[0, 2], [1, 2]], "NaN is left out, and so is a state of NaN alone"
    (band,) = ax.collections
    spread = np.std([0, 2, 4])
    assert band.get_datalim(ax.transData).intervaly == pytest.approx([2 - spread, 2 + spread])


def test_states_without_a_value_leave_a_gap():
    ax = Figure().add_subplot()
    curve(ax, range(4), np.array([[np.nan, 1, np.nan, 5], [np.nan, 3, np.nan, 7]]), LINES["inter"])
    assert ax.lines[0].get_xydata().tolist() == [[1, 2], [3, 6]], "each point over its own state"


def test_bands_of_shares_end_at_0_and_1_and_hold_the_mean():
    ax = Figure().add_subplot()
    values = np.zeros((20, 3))
    values[0, 1], values[:, 2] = 1, 1
    curve(ax, range(3), values, LINES["own"], limits=(0.0, 1.0))
    low, high = ax.collections[0].get_datalim(ax.transData).intervaly
    assert (low, high) == (0, 1)
    assert ax.lines[0].get_ydata().tolist() == [0, 0.05, 1]


def test_curves_of_nothing_and_of_one():
    ax = Figure().add_subplot()
    curve(ax, range(2), np.full((3, 2), np.nan), LINES["inter"])
    curve(ax, range(2), np.ones((1, 2)), LINES["image"])
    assert not ax.collections, "one example has no band"


def test_layers_go_up(llava_vlm):
    ax = Figure().add_subplot()
    mesh = heatmap(ax, np.array([[1.0, 2], [3, 4]]), [1, 2])
    assert ax.get_ylim()[0] < ax.get_ylim()[1]
    assert mesh.get_array().tolist() == [[1, 2], [3, 4]]
    assert y_ticks(ax) == {0: "1", 1: "2"}


def test_lines_differ_without_color():
    for group in (("inter", "image", "text"), ("own", "other", "prompt")):
        assert len({(LINES[k].dash, LINES[k].marker) for k in group}) == 3
    assert len(set(PHASE_COLORS.values())) == 4


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        (" dog", "dog"),
        ("▁dog", "dog"),
        (" ", "·"),
        ("$x$", r"\$x\$"),
        ("\n", "·"),
        ("a\x00b", "a·b"),
        ("abcdefghij", "abcdefg…"),
    ],
)
def test_tokens_as_labels(piece, shown):
    assert text(piece, 8) == shown


def test_what_has_no_picture():
    with pytest.raises(TypeError, match=r"no plot of a LikelihoodResult. Its numbers are in logprob, model"):
        mv.LikelihoodResult(torch.zeros(1, 2), "m").plot()


def test_the_look_is_undone():
    before = dict(mpl.rcParams)
    with style():
        assert mpl.rcParams["font.size"] == 9
    assert dict(mpl.rcParams) == before
