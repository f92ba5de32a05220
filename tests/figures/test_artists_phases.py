"""The picture of phases, held to the segments that it is given."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from helpers.artists import line_of, numbered, x_ticks
from mechvlm.measures.phases import PHASE_COLORS, Phases, shade

NAMES = ("I alignment", "II intra-modal encoding", "III inter-modal encoding", "IV output preparation")


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def phases(labels=NAMES, n_states: int = 33, **other) -> Phases:
    values = {
        "mean": torch.linspace(0, 1, n_states) ** 2, "fit": torch.linspace(0.2, 0.6, n_states), "n_segments": 4,
        "directions": ("rise", "fall", "rise", "fall"), "labels": labels,
        "intervals": ((0, 2), (2, 9), (9, 21), (21, 32)), "boundaries": (2, 9, 21),
        "boundary_intervals": ((1.0, 5.0), (8.0, 9.0), (15.0, 22.0)), "changes": {}, "evidence": (), "support": 0.9,
        "shows_pattern": True, "explanation": "", "n_examples": 5, "confidence": 0.95,
    }  # fmt: skip
    return Phases(**values | other)


def spans(ax) -> dict[tuple[float, float], str]:
    """{(first, last) state: color} of the shaded segments."""
    return {(p.get_x(), p.get_x() + p.get_width()): to_hex(p.get_facecolor()) for p in ax.patches}


def boundary_bars(ax) -> dict[float, tuple[float, float]]:
    """{boundary: ends of its interval}."""
    bars = {}
    for container in ax.containers:
        line, _, (collection,) = container.lines
        (segment,) = collection.get_segments()
        bars[float(line.get_xdata()[0])] = tuple(segment[:, 0].tolist())
    return bars


def test_the_mean_the_fit_and_the_segments():
    result = phases()
    ax = result.plot()
    for label, values in (("mean", result.mean), ("fitted segments", result.fit)):
        line = line_of(ax, label)
        assert line.get_xdata().tolist() == list(range(33))
        assert line.get_ydata() == pytest.approx(values.numpy())
    colors = ["I", "II", "III", "IV"]
    assert spans(ax) == {
        span: PHASE_COLORS[color].lower() for span, color in zip(result.intervals, colors, strict=True)
    }
    at = {t.get_text(): t.xy[0] for t in ax.texts}
    assert [at[head] for head in colors] == [1, 5.5, 15, 26.5]
    names = {word.replace("\n", " ").replace("\u200b", ""): x for word, x in at.items() if word not in colors}
    assert names == {
        "intra-modal encoding": 5.5, "inter-modal encoding": 15, "output preparation": 26.5,
    }, "the first segment is too narrow for its name"  # fmt: skip
    upright = [line for line in ax.lines if len(set(line.get_xdata())) == 1 and list(line.get_ydata()) == [0, 1]]
    assert [line.get_xdata()[0] for line in upright] == [2, 9, 21]
    assert boundary_bars(ax) == {2: (1, 5), 9: (8, 9), 21: (15, 22)}
    assert numbered(x_ticks(ax))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("state (0 = embeddings)", "image – text similarity (mean cosine)")


def test_segments_without_a_name_are_arrows():
    ax = phases((None,) * 4).plot()
    assert [(t.get_text(), t.xy[0]) for t in ax.texts] == [("↗", 1), ("↘", 5.5), ("↗", 15), ("↘", 26.5)]
    assert list(spans(ax)) == [(0, 2), (2, 9), (9, 21), (21, 32)]
    colors = list(spans(ax).values())
    assert colors[0] == colors[2] != colors[1] == colors[3]


def test_without_an_interval_a_boundary_has_no_bar():
    nan = (np.nan, np.nan)
    ax = phases(boundary_intervals=(nan, (8.0, 9.0), nan)).plot()
    assert boundary_bars(ax) == {9: (8, 9)}


def test_shades_without_heads():
    ax = Figure().add_subplot()
    shade(ax, phases(), names=False, heads=False)
    assert len(ax.patches) == 4
    assert not ax.texts
    assert not ax.containers
    assert [line.get_xdata()[0] for line in ax.lines] == [2, 9, 21]
    named = Figure().add_subplot()
    shade(named, phases(), names=False)
    assert [t.get_text() for t in named.texts] == ["I", "II", "III", "IV"]
