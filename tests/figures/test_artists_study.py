"""The figures of a study, held to its tables: two models of different depth, several examples.

Each is read from its artists, at the place where a reader sees it.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

import mechvlm as mv
from helpers.artists import (
    bands,
    bar_of,
    edges_of,
    ends_of,
    line_of,
    lines_like,
    mesh_of,
    numbered,
    on_screen,
    value_at,
    x_ticks,
    y_ticks,
)
from helpers.studies import made_study
from mechvlm.experiments.winoground_result import WinogroundResult
from mechvlm.figures.style import LINES
from mechvlm.intervals import mean_interval
from mechvlm.study.report.captioned import DOTTED, panels

DEPTHS = {"some/deep": 13, "some/other": 11}
SEED, N_IMAGE = 3, 40


@pytest.fixture(scope="module")
def study() -> mv.Study:
    """Of five examples; one has no precision at some states; images have several captions."""
    made = made_study(DEPTHS, n=5, seed=SEED, n_image=N_IMAGE)
    lens = made.tables["lens"]
    single = lens[lens["captions"].isin(["own", "other"]) & (lens["tokens"] == "image")].assign(
        captions=lambda rows: rows["captions"].map({"own": "single", "other": "other_single"}),
        value=lambda rows: 0.8 * rows["value"],
    )
    lens = pd.concat([lens, single[single["measure"] != "word_share"]], ignore_index=True)
    gone = (lens["measure"] == "precision") & (lens["example"] == "e002") & (lens["state"] < 4)
    lens.loc[gone, "value"] = np.nan
    norms = made.tables["norm_attention"].copy()
    norms.loc[norms["dest"] == "last_image", "n"] = 4
    return replace(made, tables={**made.tables, "lens": lens, "norm_attention": norms})


def by_example(study, model: str, table: str, along: str = "state", **chosen) -> np.ndarray:
    """Values [example, state or layer] of one model, out of a table of the study."""
    rows = study.tables[table]
    for column, value in {"model": model, **chosen}.items():
        rows = rows[rows[column] == value]
    return rows.pivot(index="example", columns=along, values="value").to_numpy(float)


def baseline(study, model: str, pair: str) -> np.ndarray:
    rows = study.tables["baseline"].query("model == @model and pair == @pair")
    return rows.sort_values("state")["value"].to_numpy()


def assert_curve(
    ax, line, values: np.ndarray, seed: int = SEED, x=None, limits=(-1.0, 1.0), spread: bool = True
) -> None:
    """The line holds the mean over examples, in its deviation (with `spread`) and its interval.

    values: [example x], NaN where an example has none.
    """
    mean = np.nanmean(values, axis=0)
    x = np.arange(values.shape[1]) if x is None else x
    assert line.get_xdata() == pytest.approx(x)
    assert line.get_ydata() == pytest.approx(mean)
    *pale, dark = bands(ax, to_hex(line.get_color()))
    _, low, high = mean_interval(torch.tensor(values), seed=seed)
    np.testing.assert_allclose(np.array(list(ends_of(dark).values())), np.stack([low, high], 1))
    assert len(pale) == spread
    assert len(bands(ax)) <= 5, "no more bands than an eye tells apart"
    if not spread:
        return
    (pale,) = pale
    deviation = np.nanstd(values, axis=0)
    ends = list(ends_of(pale).values())
    within = np.clip([mean - deviation, mean + deviation], *limits)
    np.testing.assert_allclose(np.array(ends), within.T)
    assert pale.get_alpha() < dark.get_alpha()


def blocks_of(figure, n_panels: int) -> dict[str, list]:
    """{model: its panels, top first}, by the titles of the first ones."""
    blocks = {}
    for first in range(0, len(figure.axes), n_panels):
        block = figure.axes[first : first + n_panels]
        heights = [ax.get_subplotspec().rowspan.start for ax in block]
        assert heights == sorted(heights)
        blocks[block[0].get_title(loc="left").split("  ")[0]] = block
    assert list(blocks) == ["deep", "other"]
    return {f"some/{name}": block for name, block in blocks.items()}


def test_blocks_lie_in_the_models_order():
    figure, blocks = panels(list("abc"), (1, 2))
    figure.draw_without_rendering()
    places = {model: block[0].get_position() for model, block in blocks.items()}
    assert places["a"].x1 < places["b"].x0
    assert places["a"].y0 == pytest.approx(places["b"].y0)
    assert places["c"].y1 < places["a"].y0
    for top, bottom in blocks.values():
        assert bottom.get_position().y1 < top.get_position().y0
        assert bottom.get_position().height > top.get_position().height
        assert top.get_shared_x_axes().joined(top, bottom)


def test_each_model_has_its_own_phases_and_curves(study):
    figure, caption = study.plot("phases")
    for model, (top, bottom) in blocks_of(figure, 2).items():
        states = list(range(DEPTHS[model] + 1))
        assert top.get_title(loc="left") == f"{model[5:]}  (n = 5)"
        assert_curve(top, line_of(top, "image – text"), by_example(study, model, "contextualization", pair="inter"))
        fit = line_of(top, "fitted segments")
        assert fit.get_xdata().tolist() == states
        assert fit.get_ydata() == pytest.approx(study.phases[model].fit.numpy())
        for ax, pair in [(top, "inter"), (bottom, "image"), (bottom, "text")]:
            (dotted,) = lines_like(ax, LINES[pair].color, DOTTED)
            assert dotted.get_xdata().tolist() == states
            assert dotted.get_ydata() == pytest.approx(baseline(study, model, pair))
        for pair, label in (("image", "within image"), ("text", "within text")):
            line = line_of(bottom, label)
            assert line.get_color() == LINES[pair].color
            assert_curve(bottom, line, by_example(study, model, "contextualization", pair=pair))
        spans = [(p.get_x(), p.get_x() + p.get_width()) for p in top.patches]
        assert spans == [tuple(span) for span in study.phases[model].intervals]
        assert [(p.get_x(), p.get_x() + p.get_width()) for p in bottom.patches] == spans
        assert bottom.get_xlabel() == "state (0 = embeddings)"
        assert numbered(x_ticks(bottom))
        assert top.get_ylabel() == "image – text similarity\n(mean cosine)"
        assert bottom.get_ylabel() == "similarity within\n(mean cosine)"
        notes = [t for t in top.texts if "four phases" in t.get_text()]
        assert bool(notes) == (not study.phases[model].shows_pattern)
    assert f"seed {SEED}" in caption


WORDS = {
    "image tokens, own captions": ("image", "own"),
    "image tokens, each caption alone": ("image", "single"),
    "image tokens, another image's captions": ("image", "other"),
    "image tokens, another's captions, each alone": ("image", "other_single"),
    "text tokens, own captions": ("text", "own"),
}


def test_each_panel_of_the_lens_holds_its_own_measure(study):
    figure, _ = study.plot("lens")
    named = {
        "precision": "precision of decoded words",
        "recall": "recall of decoded words",
        "word_share": "share that decode\nto a word",
    }
    for model, block in blocks_of(figure, 3).items():
        for ax, (measure, name) in zip(block, named.items(), strict=True):
            assert ax.get_ylabel() == name
            has = {k: v for k, v in WORDS.items() if measure != "word_share" or v[1] == "own"}
            assert len(ax.lines) == len(has)
            for label, (tokens, captions) in has.items():
                values = by_example(study, model, "lens", tokens=tokens, captions=captions, measure=measure)
                assert_curve(ax, line_of(ax, label), values, limits=(0.0, 1.0), spread=False)
        assert block[-1].get_xlabel() == "state (0 = embeddings)"
        assert numbered(x_ticks(block[-1]))
    assert [t.get_text() for t in figure.legends[0].get_texts()][:5] == list(WORDS)


def test_contextualization_holds_three_curves_and_their_baselines(study):
    figure, _ = study.plot("contextualization")
    for model, (ax,) in blocks_of(figure, 1).items():
        for pair, label in (("inter", "image – text"), ("image", "within image"), ("text", "within text")):
            values = by_example(study, model, "contextualization", pair=pair)
            assert_curve(ax, line_of(ax, label), values, spread=False)
            (dotted,) = lines_like(ax, LINES[pair].color, DOTTED)
            assert dotted.get_ydata() == pytest.approx(baseline(study, model, pair))
        assert numbered(x_ticks(ax))
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("state (0 = embeddings)", "mean cosine")


def test_bands_of_cosines_go_below_0(study):
    around_0 = study.tables["contextualization"].assign(value=lambda rows: rows["value"] - 0.4)
    below = replace(study, tables={**study.tables, "contextualization": around_0})
    ax = below.plot("phases").figure.axes[0]
    values = by_example(below, "some/deep", "contextualization", pair="inter")
    assert (values.mean(0) - values.std(0)).min() < -0.1
    assert_curve(ax, line_of(ax, "image – text"), values)


def test_titles_count_the_examples_that_were_read(study):
    """Of each model, not of those that were drawn."""
    models = {**study.models, "some/other": {**study.models["some/other"], "n_examples": 4}}
    aside = replace(study, models=models, dataset={**study.dataset, "n": 9})
    for name in ("phases", "lens", "contextualization"):
        titles = [ax.get_title(loc="left") for ax in aside.plot(name).figure.axes]
        assert [title for title in titles if title] == ["deep  (n = 5)", "other  (n = 4)"]


# --- norm-based attention ---

ROWS = [(model, dest) for model in DEPTHS for dest in ("last_text", "last_image")]
KINDS = {"image": "#0072B2", "text": "#009E73", "special": "#888888"}


@pytest.fixture(scope="module")
def norm_rows(study) -> list:
    """(model, destination, its norms, the three panels) of each row of the figure."""
    figure, _ = study.plot("norm_attention")
    norms = study.tables["norm_attention"]
    grid = [figure.axes[3 * i : 3 * i + 3] for i in range(4)]
    return [
        (model, dest, norms[(norms["model"] == model) & (norms["dest"] == dest)], block)
        for (model, dest), block in zip(ROWS, grid, strict=True)
    ]


def columns_of(ax, n_src: int) -> np.ndarray:
    """The middle of each source's column."""
    edges, _ = edges_of(mesh_of(ax))
    assert len(edges) == n_src + 1
    return (edges[:-1] + edges[1:]) / 2


def test_maps_hold_their_measure_by_layer_and_source(norm_rows):
    for model, dest, rows, (left, middle, right) in norm_rows:
        n = 5 if dest == "last_text" else 4
        where = {"last_text": "last text token", "last_image": "last image token"}[dest]
        n_src = rows["src"].nunique()
        assert left.get_title(loc="left") == f"{model[5:]}: {where}  (n = {n})"
        assert middle.get_title(loc="left") == f"raw weight, mean over heads (uniform: {1 / n_src:.2g})"
        assert right.get_title(loc="left") == "image tokens' share"
        for ax, measure, label in ((left, "norm", "norm written"), (middle, "weight", "raw weight")):
            mesh = mesh_of(ax)
            table = rows.sort_values(["layer", "src"])[measure].to_numpy().reshape(DEPTHS[model], n_src)
            np.testing.assert_allclose(on_screen(mesh), table[::-1], err_msg="the first layer at the bottom")
            for layer, src in ((0, 0), (5, n_src - 1), (DEPTHS[model] - 1, 2)):
                assert value_at(mesh, columns_of(ax, n_src)[src], layer) == pytest.approx(table[layer, src])
            assert mesh.get_clim() == pytest.approx((0, table.max()))
            assert bar_of(mesh).get_ylabel() == label
            assert numbered(y_ticks(ax))


def test_sources_are_named_below_their_columns(norm_rows):
    for _, dest, rows, (left, middle, _) in norm_rows:
        first = rows[rows["layer"] == 0].sort_values("src")
        kinds, pieces = first["modality"].tolist(), first["piece"].str.strip().tolist()
        for ax in (left, middle):
            at, ticks = columns_of(ax, len(kinds)), x_ticks(ax)
            # <s>, 40 image tokens, and for the last text token 5 of text
            expected = {at[0]: "<s>", (at[1] + at[N_IMAGE]) / 2: "40 image tokens"}
            if dest == "last_text":
                expected |= dict(zip(at[N_IMAGE + 1 :], pieces[N_IMAGE + 1 :], strict=True))
            assert list(ticks.values()) == list(expected.values())
            np.testing.assert_allclose(list(ticks), list(expected))
            for src, kind in enumerate(kinds):
                (strip,) = (p for p in ax.patches if p.get_x() < at[src] < p.get_x() + p.get_width())
                assert to_hex(strip.get_facecolor()) == KINDS[kind].lower()
            width = np.diff(edges_of(mesh_of(ax))[0])
            is_image = np.array(kinds) == "image"
            np.testing.assert_allclose(width[~is_image], 1)
            assert width[is_image].sum() == pytest.approx(8), "together no wider than the room of eight words"


def test_many_words_are_counted_instead_of_named():
    study = made_study({"m": 4}, n=2)
    norms = study.tables["norm_attention"]
    last = norms[(norms["src"] == norms["src"].max())]
    more = [last.assign(src=last["src"] + i) for i in range(1, 60)]
    with_more = pd.concat([norms, *more], ignore_index=True)
    study = replace(study, tables={**study.tables, "norm_attention": with_more})
    ax = study.plot("norm_attention").figure.axes[0]
    at = columns_of(ax, 81)
    assert x_ticks(ax) == {
        at[0]: "1 special", (at[1] + at[16]) / 2: "16 image tokens", (at[17] + at[80]) / 2: "64 text",
    }  # fmt: skip


def test_shares_lie_along_the_rows_of_the_maps(study, norm_rows):
    for model, dest, rows, (left, _, right) in norm_rows:
        layers = list(range(DEPTHS[model]))
        for measure, label in (("norm", "by norm written"), ("weight", "by raw attention weight")):
            values = by_example(study, model, "attention_share", "layer", dest=dest, measure=measure)
            line = line_of(right, label)
            assert line.get_ydata().tolist() == layers
            assert line.get_xdata() == pytest.approx(values.mean(0))
            pale, dark = bands(right, to_hex(line.get_color()))
            _, low, high = mean_interval(torch.tensor(values), seed=SEED)
            spread = np.stack([values.mean(0) - values.std(0), values.mean(0) + values.std(0)], 1)
            np.testing.assert_allclose(np.array(list(ends_of(pale, 1).values())), spread)
            np.testing.assert_allclose(np.array(list(ends_of(dark, 1).values())), np.stack([low, high], 1))
        uniform = line_of(right, "under uniform attention")
        assert uniform.get_ydata().tolist() == layers
        assert uniform.get_xdata() == pytest.approx(N_IMAGE / rows["src"].nunique())
        assert y_ticks(right) == y_ticks(left)
        assert right.get_ylim() == left.get_ylim()


# --- Winoground's pairs ---

MEASURES = {
    "lens precision": 0, "lens recall": 1, "cosine of image and caption": 2, "last token's reading of the image": 3,
}  # fmt: skip


def test_each_model_s_panels_hold_the_differences_of_their_measures(study):
    results, pairs, scores = {}, [], []
    for number, (model, n_layers) in enumerate(DEPTHS.items()):
        names = tuple(f"p{i}" for i in range(4 + number))
        generator = torch.Generator().manual_seed(number)
        values = torch.rand(5, n_layers + 1, len(names), 2, 2, generator=generator)
        values[3, -1] = torch.nan
        values[4, :-1] = torch.nan
        results[model] = WinogroundResult(values, names, (), "Describe.", model)
        pairs.append(results[model].to_frame().assign(model=model))
        scores.append(pd.DataFrame({"model": model, "pair": names}))
    tables = {"pairs": pd.concat(pairs), "pair_scores": pd.concat(scores)}
    with_pairs = replace(
        study, tables={**study.tables, **tables}, dataset={**study.dataset, "pairs": 5, "half_pairs": 0},
        models={model: {**about, "pairs_set_aside": []} for model, about in study.models.items()},
    )  # fmt: skip
    figure, _ = with_pairs.plot("pairs")
    assert len(figure.axes) == 8
    for (model, result), block in zip(results.items(), (figure.axes[:4], figure.axes[4:]), strict=True):
        title = block[0].get_title(loc="left").split("\n")
        assert title[0] == f"{model[5:]}  (n = {len(result.pairs)} pairs)"
        assert [title[1], *(ax.get_title(loc="left") for ax in block[1:])] == list(MEASURES)
        for ax, row in zip(block, MEASURES.values(), strict=True):
            values = result.values[row].numpy()  # [layer pair caption image]
            own, other = values[..., 0, 0] + values[..., 1, 1], values[..., 1, 0] + values[..., 0, 1]
            each = (own - other) / 2
            line = ax.lines[-1]
            assert line.get_xdata().tolist() == list(range(DEPTHS[model] + 1))
            assert line.get_ydata() == pytest.approx(each.mean(1), abs=1e-6, nan_ok=True)
            _, low, high = mean_interval(torch.tensor(each).T, seed=SEED)
            (band,) = bands(ax)
            for layer, ends in ends_of(band).items():
                assert ends == pytest.approx((float(low[int(layer)]), float(high[int(layer)])), abs=1e-6)
        assert block[-1].get_xlabel() == "state (0 = embeddings); of the reading layer (0 = first)"


# --- comparison ---


def test_each_panel_of_a_comparison_holds_its_own_measure_and_controls(study):
    measures = ["recall", "cosine_inter", "precision", "weight_share_last_image"]
    figure = mv.compare([study]).plot(measures).figure
    tops, bottoms = figure.axes[:4], figure.axes[4:]
    assert [ax.get_title(loc="left") for ax in tops] == [
        "recall of decoded words", "image – text similarity", "precision of decoded words", "weight_share_last_image",
    ]  # fmt: skip
    assert [ax.get_ylabel() for ax in tops] == [
        "share of words",
        "mean cosine",
        "share of words",
        "image tokens' share",
    ]
    for model in DEPTHS:
        states = np.arange(DEPTHS[model] + 1) / DEPTHS[model]
        own = {"tokens": "image", "captions": "own"}
        expected = [
            by_example(study, model, "lens", measure="recall", **own),
            by_example(study, model, "contextualization", pair="inter"),
            by_example(study, model, "lens", measure="precision", **own),
            by_example(study, model, "attention_share", "layer", dest="last_image", measure="weight"),
        ]
        for i, (ax, values) in enumerate(zip(tops, expected, strict=True)):
            limits = (0.0, 1.0) if i in (0, 2) else (-1.0, 1.0)
            line = line_of(ax, model[5:])
            assert_curve(ax, line, values, x=states[: values.shape[1]], limits=limits)
        color = to_hex(line_of(tops[0], model[5:]).get_color())
        (dotted,) = lines_like(bottoms[1], color, DOTTED)
        assert dotted.get_xdata() == pytest.approx(states)
        assert dotted.get_ydata() == pytest.approx(baseline(study, model, "inter"))
        for ax, measure in ((bottoms[0], "recall"), (bottoms[2], "precision")):
            for tokens, captions, dash in (("image", "other", (0, (4, 1.5))), ("text", "own", (0, (4, 1.5, 1, 1.5)))):
                (line,) = lines_like(ax, color, dash)
                values = by_example(study, model, "lens", tokens=tokens, captions=captions, measure=measure)
                assert line.get_xdata() == pytest.approx(states)
                assert line.get_ydata() == pytest.approx(np.nanmean(values, 0))
        assert not bottoms[3].lines
    assert [len(ax.lines) for ax in bottoms] == [4, 2, 4, 0]
    assert all(top.get_ylim() == bottom.get_ylim() for top, bottom in zip(tops, bottoms, strict=True))
    assert bottoms[0].get_xlabel() == "relative depth (state / layers of the model)"
    legend = {
        t.get_text(): h for t, h in zip(figure.legends[0].get_texts(), figure.legends[0].get_lines(), strict=False)
    }
    assert legend.keys() >= {"baseline (different examples)", "another image's captions", "text tokens"}
