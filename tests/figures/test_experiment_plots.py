"""The plots of the causal experiments, against means and intervals computed here in plain numpy."""

import subprocess
import sys
from itertools import pairwise

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection, PolyCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import mechvlm as mv
from helpers.artists import note_of, y_ticks
from mechvlm.experiments.causal_trace import CORRUPTED, CORRUPTIONS
from mechvlm.experiments.object_ablation import ABLATION_CONDITIONS, BARS
from mechvlm.figures.headings import number


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def windows(n_layers: int, width: int) -> tuple[tuple[int, int], ...]:
    return tuple((max(0, i - width // 2), min(n_layers, i + width // 2 + 1)) for i in range(n_layers))


def flow(n: int = 12, n_layers: int = 5, flows=("image -> last", "question -> last")) -> mv.InformationFlowResult:
    g = torch.Generator().manual_seed(n)
    return mv.InformationFlowResult(
        p=0.5 + 0.4 * torch.rand(n, generator=g), p_knocked=torch.rand(len(flows), n_layers, n, generator=g), flows=flows,
        windows=windows(n_layers, 3), answers=(" red",) * n, model="some/llava-7b",
    )  # fmt: skip


def trace(n: int = 12, n_layers: int = 4, groups=("image", "question", "last"), **kw) -> mv.CausalTraceResult:
    g = torch.Generator().manual_seed(n)
    p_corrupt = 0.1 * torch.rand(n, generator=g)
    kw = {
        "at": "mlp_out",
        "corrupt": "noise",
        "p_restored": p_corrupt + 0.5 * torch.rand(n_layers, len(groups), n, generator=g),
    } | kw
    return mv.CausalTraceResult(
        p=0.8 + 0.1 * torch.rand(n, generator=g), p_corrupt=p_corrupt, groups=groups, layers=tuple(range(n_layers)),
        windows=windows(n_layers, 1), answers=(" red",) * n, model="llava", **kw,
    )  # fmt: skip


def ablation(n: int = 10, lost: int = 0) -> mv.ObjectAblationResult:
    """A result in which the last `lost` examples have no controls at the second margin."""
    g = torch.Generator().manual_seed(n)
    after = (torch.rand(3, 2, n, generator=g) > 0.4).float()
    after[1:, 1, n - lost :] = torch.nan
    return mv.ObjectAblationResult(
        correct=torch.arange(n) != 1, correct_ablated=after, p=torch.rand(n, generator=g),
        p_ablated=torch.rand(3, 2, n, generator=g), n_tokens=torch.stack([torch.arange(n), 10 + torch.arange(n)]),
        conditions=ABLATION_CONDITIONS, margins=(0, 2), answers=(" red",) * n, model="llava",
    )  # fmt: skip


def ends(values: np.ndarray) -> np.ndarray:
    """A bootstrap interval with other draws than the package's, so equal only roughly."""
    rng = np.random.default_rng(7)
    return np.percentile(rng.choice(values, (4000, len(values))).mean(1), [2.5, 97.5])


def meshes(ax) -> QuadMesh:
    (mesh,) = (c for c in ax.collections if isinstance(c, QuadMesh))
    return mesh


def hatched(ax) -> set[tuple[float, float]]:
    """Lower left corners of the hatched rectangles."""
    return {p.get_xy() for p in ax.patches if isinstance(p, Rectangle) and p.get_hatch()}


def test_information_flow_draws_the_mean_change_and_its_interval():
    result = flow()
    ax = result.plot()
    change = 100 * (result.p_knocked.numpy() / result.p.numpy() - 1)
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["image → last", "question → last"]
    for line, each in zip(lines.values(), change, strict=True):
        assert line.get_xdata().tolist() == [0, 1, 2, 3, 4]
        assert line.get_ydata() == pytest.approx(each.mean(-1), rel=1e-4)
    bands = [c for c in ax.collections if isinstance(c, PolyCollection)]
    for band, each in zip(bands, change, strict=True):
        x, y = band.get_paths()[0].vertices.T
        for layer in range(5):
            assert [y[x == layer].min(), y[x == layer].max()] == pytest.approx(ends(each[layer]), abs=3)
    assert any(np.all(np.asarray(line.get_ydata()) == 0) for line in ax.lines), "a line at no change"
    assert ax.get_ylabel() == "change of the answer's probability (%)"
    assert "layer" in ax.get_xlabel()
    assert ax.get_title() == "Information flow, llava-7b: attention knocked out in windows of 3 layers"
    assert "n = 12 examples" in note_of(ax)
    assert "95 %" in note_of(ax)


def test_an_answer_of_probability_0_has_no_change():
    result = flow()
    result.p[3] = 0
    ax = result.plot()
    kept = np.delete(100 * (result.p_knocked / result.p - 1).numpy(), 3, axis=-1)
    assert ax.lines[1].get_ydata() == pytest.approx(kept[0].mean(-1), rel=1e-4)
    assert "n = 11 of 12 examples" in note_of(ax)


def test_flows_differ_without_color_and_many_differ_at_all():
    names = tuple(f"image -> {i}" for i in range(28))
    lines = [line for line in flow(flows=names).plot().lines if "→" in line.get_label()]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines[:4]}) == 4
    assert len({(line.get_linestyle(), line.get_color()) for line in lines}) == 28


def test_causal_trace_draws_the_mean_effect_beside_the_total():
    result = trace()
    ax = result.plot()
    effect = (result.p_restored - result.p_corrupt).numpy().mean(-1)
    total = float((result.p - result.p_corrupt).mean())
    mesh = meshes(ax)
    drawn = mesh.get_array()
    assert np.array(drawn[:, :3]) == pytest.approx(effect, rel=1e-4)
    assert drawn[:, 3].mask.all(), "a gap"
    assert drawn[:, 4].tolist() == pytest.approx([total] * 4, rel=1e-4)
    assert mesh.get_clim() == pytest.approx((-total, total), rel=1e-4)
    assert np.array(mesh.cmap(mesh.norm(0.0))[:3]).min() > 0.95, "no effect is white"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["image", "question", "last", "total\neffect"]
    assert y_ticks(ax) == {layer: str(layer) for layer in range(4)}
    cells = {t.get_position(): t.get_text() for t in ax.texts}
    for row, group in np.ndindex(4, 3):
        assert cells[group, row] == f"{effect[row, group]:.2f}"
    low, high = ends((result.p - result.p_corrupt).numpy())
    (shown,) = (t for t in cells.values() if t.startswith(f"{total:.2f}\n["))
    assert [float(x) for x in shown.split("\n")[1].strip("[]").split(",")] == pytest.approx([low, high], abs=0.02)
    assert ax.get_ylabel() == "layer (0 = first)"
    assert "mlp_out" in ax.get_xlabel()
    assert ax.get_title() == "Causal trace, llava: noise on the image"
    assert note_of(ax).startswith("mlp_out restored at one layer\nn = 12 examples")
    (bar,) = (a for a in ax.figure.axes if a is not ax)
    assert bar.get_ylabel() == "probability of the answer brought back"
    assert bar.get_ylim() == pytest.approx((0, total), rel=1e-4), "the bar shows only the colors in use"


def test_causal_trace_hatches_what_does_not_differ_from_none():
    n = 40
    effect = torch.zeros(4, 3, n)
    effect[1, 0] = 0.3
    effect[2, 1] = -0.2
    effect[3, 2] = torch.tensor([0.5, -0.5]).repeat(n // 2)  # large effects of both signs
    effect[0, 1] = torch.nan
    # p_corrupt is the same for every result of n examples.
    result = trace(n, p_restored=trace(n).p_corrupt + effect)
    ax = result.plot()
    differ = {(0, 1), (1, 2)}  # (group, layer)
    no_value = {(1, 0)}
    every = {(g, r) for g in range(3) for r in range(4)}
    assert hatched(ax) == {(g - 0.5, r - 0.5) for g, r in every - differ - no_value}
    cells = {t.get_position(): t.get_text() for t in ax.texts}
    assert cells[1, 2] == "−0.20"
    assert cells[0, 0] == "0.00", "not −0.00"
    assert (1, 0) not in cells, "NaN is not written"
    assert "hatched" in note_of(ax)
    (bar,) = (a for a in ax.figure.axes if a is not ax)
    assert bar.get_ylim()[0] == pytest.approx(-0.2), "negative effects are on the bar"


@pytest.mark.parametrize("n_layers", [32, 40])
def test_forty_layers_can_be_read(n_layers):
    ax = trace(3, n_layers).plot()
    figure = ax.figure
    figure.draw_without_rendering()
    cells = [t for t in ax.texts if t.get_position()[0] == 0]
    assert len(cells) == n_layers
    boxes = [t.get_window_extent() for t in cells]
    assert all(box.height > 5 for box in boxes), "each is drawn"
    assert all(a.y1 < b.y0 for a, b in pairwise(boxes)), "numbers do not touch"
    small = Figure((3, 2)).add_subplot()
    trace(3, n_layers).plot(small)
    small.figure.draw_without_rendering()
    drawn = [t.get_text() for t in small.texts if t.get_window_extent().width > 1]
    assert len(drawn) <= 1, "on small axes only the total is written, if it fits"


def test_object_ablation_draws_the_mean_drop():
    result = ablation(lost=4)
    ax = result.plot()
    drop = 100 * (result.correct.float() - result.correct_ablated).numpy()
    for i, bars in enumerate(ax.containers):
        assert [b.get_height() for b in bars] == pytest.approx(np.nanmean(drop[i], axis=-1), abs=1e-3)
    intervals = [c for c in ax.collections if isinstance(c, LineCollection)]
    for each, lines in zip(drop, intervals, strict=True):
        for m, line in enumerate(lines.get_segments()):
            assert line[:, 1] == pytest.approx(ends(each[m][~np.isnan(each[m])]), abs=11)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0\n4.5 tokens", "2\n14.5 tokens"]
    labels = [t.get_text() for t in ax.texts]
    assert labels[0] == f"{drop[0, 0].mean():.0f}".replace("-", "−")
    assert ["n = 6" in words for words in labels[:6]] == [False, False, False, True, False, True], "of fewer examples"
    assert len({b[0].get_hatch() for b in ax.containers}) == 3, "bars differ without color"
    assert ax.get_ylabel() == "drop in naming accuracy (percentage points)"
    assert "patches" in ax.get_xlabel()
    assert ax.get_title() == "Object ablation, llava: naming accuracy before 90 %"
    assert "n = 10 examples" in note_of(ax)


def test_nothing_to_compare_with():
    ax = ablation(5, lost=5).plot()
    labels = [t.get_text() for t in ax.texts]
    assert [labels[i] for i in (3, 5)] == ["–\nn = 0"] * 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [flow, trace, ablation])
def test_one_example_has_no_interval(make, tmp_path):
    ax = make(1).plot()
    ax.figure.savefig(tmp_path / "x.png")
    assert "n = 1 example, so no interval" in note_of(ax)
    assert not hatched(ax) or make is ablation
    for band in ax.collections:
        if not isinstance(band, QuadMesh):
            assert not any(np.isfinite(path.vertices).all() and len(path.vertices) for path in band.get_paths())


@pytest.mark.parametrize("make", [flow, trace, ablation])
def test_on_given_axes_no_figure_is_opened(make):
    ax = Figure().add_subplot()
    assert make().plot(ax) is ax
    assert not plt.get_fignums()
    assert make().plot().figure.number in plt.get_fignums(), "else it is pyplot's"


def test_names_cannot_break_the_picture(tmp_path):
    ax = trace(2, groups=("$x_1$ $", "the object's own patches, and more")).plot()
    ax.figure.savefig(tmp_path / "x.png")
    assert ax.get_xticklabels()[0].get_text() == r"\$x_1\$ \$"
    assert all(t.get_rotation() == 90 for t in trace(2, groups=("question + last",) * 9).plot().get_xticklabels())


@pytest.mark.parametrize(
    ("value", "digits", "shown"), [(-0.001, 2, "0.00"), (-0.006, 2, "−0.01"), (12.6, 0, "13"), (-0.4, 0, "0")]
)
def test_numbers_in_pictures(value, digits, shown):
    assert number(value, digits) == shown


def test_every_setting_has_its_words():
    assert set(CORRUPTED) == set(CORRUPTIONS)
    assert tuple(BARS) == ABLATION_CONDITIONS


@pytest.mark.long
def test_a_study_draws_without_pyplot():
    code = "import sys, mechvlm.study.report.figures, mechvlm.study.save; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.long
def test_a_notebook_shows_each_plot_once(tmp_path):
    flow().save(tmp_path / "flow.safetensors")
    cells = [
        f"import mechvlm as mv; result = mv.InformationFlowResult.load(r'{tmp_path / 'flow.safetensors'}')",
        "result.plot()",
        "ax = result.plot()",
        "import matplotlib.pyplot as plt; print(plt.get_fignums())",
        "from matplotlib.figure import Figure; ax = result.plot(Figure().add_subplot())",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300).execute()
    pictures = [sum("image/png" in out.get("data", {}) for out in cell.outputs) for cell in notebook.cells]
    assert pictures == [0, 1, 1, 0, 0]
    assert notebook.cells[3].outputs[0]["text"] == "[]\n", "what was shown is closed"
