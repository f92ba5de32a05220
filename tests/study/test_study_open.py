"""A finished study, opened without a model: its tables, statistics and figures are the run's."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.seals import seal_json, seal_study
from helpers.studies import made_study
from mechvlm.datasets import Dataset, Example, SetAside, fingerprint
from mechvlm.errors import InputError
from mechvlm.figures.style import style
from mechvlm.study import run
from mechvlm.study.curves import tidy
from mechvlm.study.report.figures import FIGURES
from mechvlm.study.report.terminal import print_summary

FOUR = ("phases", "lens", "contextualization", "norm_attention")


@pytest.fixture(scope="module")
def study(llava_vlm, blip_vlm, tmp_path_factory):
    """Six examples, of which each model sets one aside; another was set aside before."""
    broken = tmp_path_factory.mktemp("images") / "broken.png"
    broken.write_text("no picture")
    examples = [Example(f"{i:03}", noise_image(i), (f"the dog number {i}", "cat")) for i in range(5)]
    examples = (*examples, Example("NA", broken, ("a bird",)))
    data = Dataset("made", examples, (SetAside("007", "no captions"),), fingerprint(examples))
    out = tmp_path_factory.mktemp("study") / "out"
    return run([llava_vlm, blip_vlm], data, prompt="what is this", seed=3, out=out)


@pytest.fixture(scope="module")
def opened(study):
    return mv.Study.open(study.out)


# --- results ---


def test_an_opened_study_is_the_one_that_was_written(study, opened):
    assert set(opened.tables) == set(study.tables)
    for name, table in opened.tables.items():
        pd.testing.assert_frame_equal(table, study.tables[name], check_dtype=False, check_exact=True, obj=name)
    pd.testing.assert_frame_equal(opened.skipped, study.skipped, check_dtype=False)
    assert list(opened.skipped["example"]) == ["007", "NA", "NA"], "ids stay text"
    assert opened.settings.items() >= study.settings.items()
    without = {name: {k: v for k, v in about.items() if k != "sha256"} for name, about in opened.models.items()}
    assert without == study.models
    assert (opened.dataset, opened.seconds, opened.out) == (study.dataset, study.seconds, study.out)
    assert [(e.id, e.captions) for e, _ in opened.gallery] == [(e.id, e.captions) for e, _ in study.gallery]
    assert [image.tobytes() for _, image in opened.gallery] == [image.tobytes() for _, image in study.gallery]
    assert {key: (v.html, v.token, v.layer, v.heat.tobytes()) for key, v in opened.views.items()} == {
        key: (v.html, v.token, v.layer, v.heat.tobytes()) for key, v in study.views.items()
    }


def test_the_phases_are_those_of_the_run(study, opened):
    record = json.loads((study.out / "run.json").read_text())
    for model, phases in study.phases.items():
        reopened = opened.phases[model]
        for field in fields(phases):
            before, after = getattr(phases, field.name), getattr(reopened, field.name)
            same = torch.equal(before, after) if isinstance(before, torch.Tensor) else repr(before) == repr(after)
            assert same, field.name
        assert reopened.explanation == record["phases"][model]["explanation"]


@pytest.mark.long
def test_no_model_and_no_nnsight_is_needed(study):
    code = (
        f"import sys, mechvlm as mv; s = mv.Study.open({str(study.out)!r}); s.frame(); s.figures(); s.summary(); "
        "mv.compare([s]).plot(); print(sorted({'nnsight', 'transformers', 'transformer_lens'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the figures ---


@pytest.mark.long
def test_the_figures_are_those_of_the_run_byte_for_byte(study, opened, tmp_path):
    opened.save_figures(tmp_path / "again")
    # matplotlib names an SVG's clip paths after their place in memory.
    clips = re.compile(rb"(?<=[#\"])p[0-9a-f]{10}(?=[)\"])")
    for name in FOUR:
        png, svg = ([(folder / f"{name}.{kind}").read_bytes() for folder in (tmp_path / "again", study.out / "figures")]
                    for kind in ("png", "svg"))  # fmt: skip
        assert png[0] == png[1], name
        assert clips.sub(b"", svg[0]) == clips.sub(b"", svg[1]), name
    captions = json.loads((study.out / "run.json").read_text())["figures"]
    assert {name: captioned.caption for name, captioned in opened.figures().items()} == captions
    assert tuple(captions) == FOUR


@pytest.mark.parametrize("name", FOUR)
def test_every_caption_has_its_seeds_and_counts(opened, name):
    caption = opened.plot(name).caption
    assert "LlavaForConditionalGeneration n = 5 (1 set aside)" in caption
    assert "InstructBlipForConditionalGeneration n = 5 (1 set aside)" in caption
    assert "of 6 drawn from made with seed 3; 1 set aside before any model read them" in caption
    from_many = replace(opened, dataset=opened.dataset | {"usable": 5000})
    assert "of 6 drawn from the 5,000 of made with seed 3;" in from_many.plot(name).caption
    # Where a panel has many curves, the deviations would hide each other.
    assert ("pale bands their standard deviation" in caption) == (name in ("phases", "norm_attention"))
    assert "95% bootstrap interval of the mean (2,000 resamples of the examples, seed 3)" in caption
    if name == "phases":
        assert (
            "95% bootstrap intervals of the states where it turns (1,000 resamples of the examples, seed 3)" in caption
        )


def scores(study, measure: str, tokens: str, captions: str) -> pd.DataFrame:
    lens = study.tables["lens"]
    return lens[(lens["tokens"] == tokens) & (lens["captions"] == captions) & (lens["measure"] == measure)]


def lines(ax) -> dict[str, np.ndarray]:
    """The points [x, y] of each line, by its label (matplotlib numbers lines without label)."""
    return {str(line.get_label()): line.get_xydata() for line in ax.lines}


def test_every_figure_has_its_controls():
    study = made_study({"a": 6, "b": 4}, n=5)
    figures = {name: captioned.figure for name, captioned in study.figures().items()}
    baseline = study.tables["baseline"].query("model == 'a'").pivot(index="pair", columns="state", values="value")
    for name, axes in (("phases", (0, 1)), ("contextualization", (0,))):
        points = [line.get_ydata() for i in axes for line in figures[name].axes[i].lines]
        for pair in ("inter", "image", "text"):
            assert any(np.array_equal(y, baseline.loc[pair]) for y in points), f"{name} has no baseline of {pair}"
    lens = lines(figures["lens"].axes[0])
    for label, tokens, captions in [
        ("image tokens, own captions", "image", "own"),
        ("image tokens, another image's captions", "image", "other"),
        ("text tokens, own captions", "text", "own"),
    ]:
        rows = scores(study, "precision", tokens, captions).query("model == 'a'")
        np.testing.assert_allclose(lens[label][:, 1], rows.groupby("state")["value"].mean())
    shares = [ax for ax in figures["norm_attention"].axes if ax.get_title(loc="left") == "image tokens' share"]
    assert len(shares) == 4
    np.testing.assert_allclose(lines(shares[0])["under uniform attention"][:, 0], 16 / 22)
    rows = study.tables["attention_share"].query("model == 'a' and dest == 'last_text'")
    means = rows.groupby(["measure", "layer"])["value"].mean()
    for label, measure in (("by norm written", "norm"), ("by raw attention weight", "weight")):
        np.testing.assert_allclose(lines(shares[0])[label][:, 0], means[measure])
    titles = {ax.get_title(loc="left") for ax in figures["norm_attention"].axes}
    assert {f"raw weight, mean over heads (uniform: {1 / n:.2g})" for n in (22, 17)} <= titles


def test_the_share_of_words_stands_beside_precision(capsys):
    """In the figure, the summary, the report and the terminal; said to be absent where it is."""
    study = replace(made_study({"a": 6}, n=5), out=Path("there"))
    mean = scores(study, "word_share", "image", "own").groupby("state")["value"].mean()
    captioned = study.plot("lens")
    share = captioned.figure.axes[2]
    np.testing.assert_allclose(share.lines[0].get_ydata(), mean)
    assert share.get_ylabel() == "share that decode\nto a word"
    row = study.summary().iloc[0]
    assert row["word_share"] == pytest.approx(mean[row["best_state"]])
    assert row["word_share_low"] < row["word_share"] < row["word_share_high"]
    assert row["word_share_0"] == pytest.approx(mean[0])
    print_summary(study)
    assert f"{row['word_share']:.2f}" in capsys.readouterr().out
    lens = study.tables["lens"]
    older = replace(study, tables={**study.tables, "lens": lens[lens["measure"] != "word_share"]})
    assert np.isnan(older.summary().iloc[0][["word_share", "word_share_low", "word_share_0"]].astype(float)).all()
    captioned = older.plot("lens")
    assert len(captioned.figure.axes) == 2
    assert "by an earlier version, which did not keep the share" in captioned.caption
    with pytest.raises(InputError, match="no measure 'word_share' here"):
        older.frame("word_share")


def test_bands_are_the_deviation_and_the_interval():
    study = made_study({"a": 6}, n=9)
    curve = study.curves("cosine_inter")
    pale, dark = study.plot("phases").figure.axes[0].collections[:2]
    for band, low, high in [
        (pale, curve["mean"] - curve["sd"], curve["mean"] + curve["sd"]),
        (dark, curve["low"], curve["high"]),
    ]:
        corners = {(x, round(float(y), 9)) for x, y in band.get_paths()[0].vertices}
        assert {(x, round(y, 9)) for x, y in enumerate(low)} <= corners
        assert {(x, round(y, 9)) for x, y in enumerate(high)} <= corners


@pytest.mark.long
@pytest.mark.parametrize(
    "models", [{"one": 32}, {"a": 3, "b": 32}, {"org/a-long-name-of-a-model": 3, "b": 8, "c": 40, "d": 2}]
)
def test_figures_fit_for_any_number_of_models_and_layers(models):
    study = made_study(models, n=3)
    for name, (figure, _) in study.figures().items():
        with style():
            figure.draw_without_rendering()
        width, height = figure.canvas.get_width_height()
        legend = figure.legends[0].get_window_extent()
        assert 0 <= legend.x0 < legend.x1 <= width, f"{name}: the legend is cut off"
        titles = {ax.get_title(loc="left").split("  ")[0].split(":")[0] for ax in figure.axes}
        assert {model.split("/")[-1] for model in models} <= titles
        boxes = [ax.get_tightbbox() for ax in figure.axes]
        assert all(box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1 for box in boxes)
        for a, b in combinations(boxes, 2):
            overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(overlap) < 2, f"{name}: axes overlap"
    assert mpl.rcParams["savefig.dpi"] == mpl.rcParamsDefault["savefig.dpi"]


def test_a_notebook_shows_the_figure_with_its_caption(tmp_path):
    study = replace(made_study({"<b>model</b>": 4}, n=3), out=None)
    captioned = study.plot("lens")
    html = captioned._repr_html_()
    assert "data:image/png;base64," in html
    width = captioned.figure.get_figwidth() * mpl.rcParamsDefault["figure.dpi"]
    assert f"width: {width:.0f}px; max-width: 100%" in html, "as large as figures of results"
    assert "&lt;b&gt;model" not in captioned.caption
    assert "b&gt; n = 3" in html
    assert "<b>" not in html
    captioned.save(tmp_path / "lens.pdf")
    assert (tmp_path / "lens.pdf").read_bytes().startswith(b"%PDF")


# --- frames and statistics ---


def test_text_of_large_tables_is_held_once(opened):
    """As categories that sort as text does: so a large study takes 20 bytes per value."""
    for table in (
        *(opened.tables[name] for name in ("contextualization", "lens", "attention_share")),
        tidy(opened.tables),
    ):
        for column, kind in table.dtypes.items():
            assert kind == "category" if column not in ("layer", "state", "value") else kind.kind in "if", column
        assert (table.memory_usage(deep=False) <= 8 * len(table) + 8000).all()
        for column in table.select_dtypes("category"):
            assert list(table[column].cat.categories) == sorted(table[column].unique())


def test_the_frame_is_tidy_and_holds_every_value(opened):
    frame = opened.frame()
    assert list(frame.columns) == ["model", "example", "layer", "measure", "value"]
    assert not {"category"} & set(map(str, frame.dtypes)), "plain text: a group of no rows is none"
    assert not frame.duplicated(["model", "example", "layer", "measure"]).any()
    assert len(frame) == sum(len(opened.tables[name]) for name in ("contextualization", "lens", "attention_share"))
    for measure, tokens, captions in [
        ("precision", "image", "own"), ("recall_other", "image", "other"), ("recall_text", "text", "own"),
    ]:  # fmt: skip
        rows = scores(opened, measure.split("_")[0], tokens, captions)
        np.testing.assert_array_equal(opened.frame(measure)["value"], rows["value"])
    for pair in ("inter", "image", "text"):
        rows = opened.tables["contextualization"].query("pair == @pair")
        assert list(opened.frame(f"cosine_{pair}")["value"]) == list(rows["value"])
    with pytest.raises(InputError, match=r"no measure 'cosine'.*cosine_inter.*recall_text"):
        opened.frame("cosine")


def test_curves_equal_numpy_and_scipy():
    study = made_study({"a": 4, "b": 3}, n=40, seed=5)
    lens = study.tables["lens"]
    lens.loc[lens.query("model == 'a' and state == 1 and measure == 'precision'").index[::3], "value"] = np.nan
    for measure in ("cosine_image", "precision", "recall_other"):
        curve = study.curves(measure).set_index(["model", "layer"])
        for (model, layer), part in study.frame(measure).groupby(["model", "layer"]):
            values = part["value"].dropna().to_numpy()
            row = curve.loc[(model, layer)]
            assert row["n"] == len(values)
            np.testing.assert_allclose([row["mean"], row["sd"]], [values.mean(), values.std()])
            bootstrap = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1)
            interval = bootstrap.confidence_interval
            width = interval.high - interval.low
            np.testing.assert_allclose(row[["low", "high"]].tolist(), interval, atol=0.08 * width + 1e-12)
    assert (study.curves("precision").query("model == 'a' and layer == 1")["n"] < 40).all()
    baseline = study.curves("cosine_text_baseline").query("model == 'b'")
    table = study.tables["baseline"].query("model == 'b' and pair == 'text'")
    assert list(baseline["mean"]) == list(table["value"])
    assert baseline[["sd", "low", "high"]].isna().all(axis=None)
    with pytest.raises(InputError, match="no measure 'colour'"):
        study.curves("colour")


def test_the_study_s_seed_is_that_of_its_intervals():
    study = made_study({"a": 3}, n=8)
    other_seed = replace(study, settings=study.settings | {"seed": 1})
    pd.testing.assert_frame_equal(study.curves(), replace(study).curves())
    ends = ["low", "high"]
    assert (study.curves("recall")[ends] != other_seed.curves("recall")[ends]).any(axis=None)
    pd.testing.assert_frame_equal(study.curves().drop(columns=ends), other_seed.curves().drop(columns=ends))


def test_curves_that_are_changed_do_not_change_the_study():
    study = made_study({"a": 3}, n=4)
    changed = study.curves()
    changed["mean"] = 0.0
    assert study.curves()["mean"].abs().sum() > 0


def test_one_example_has_no_interval_and_is_still_drawn():
    study = made_study({"a": 3}, n=1)
    assert study.curves()[["low", "high"]].isna().all(axis=None)
    assert set(study.figures()) == set(FIGURES)
    assert np.isnan(study.summary()["precision_low"][0])


def test_the_summary_s_intervals_are_the_curves(opened):
    for row in opened.summary().to_dict("records"):
        for name, measure, layer in [
            ("precision", "precision", "best_state"), ("precision_other", "precision_other", "best_state"),
            ("recall", "recall", "recall_state"), ("highest", "cosine_inter", "highest_state"),
            ("lowest", "cosine_inter", "lowest_state"),
        ]:  # fmt: skip
            curve = opened.curves(measure).set_index(["model", "layer"]).loc[(row["model"], row[layer])]
            in_summary = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
            np.testing.assert_array_equal(in_summary, curve[["mean", "low", "high"]].astype(float))
        assert row["lowest_low"] <= row["lowest"] <= row["lowest_high"]


# --- folders that cannot be opened ---


@pytest.fixture
def copy(study, tmp_path):
    return shutil.copytree(study.out, tmp_path / "copy", ignore=shutil.ignore_patterns("figures"))


def record(folder, **changes):
    seal_json(folder / "run.json", **changes)


def cut(path, n=100):
    path.write_bytes(path.read_bytes()[:-n])


def drop_column(path):
    pd.read_parquet(path).drop(columns="value").to_parquet(path)
    seal_study(path.parents[1])


def drop_example(path):
    table = pd.read_parquet(path)
    table[table["example"] != "001"].to_parquet(path)
    seal_study(path.parents[1])


DAMAGES = [
    (lambda f: cut(f / "data" / "lens.parquet"), r"data/lens\.parquet is missing or damaged"),
    (lambda f: (f / "data" / "words.parquet").write_bytes(b""), r"data/words\.parquet is missing or damaged"),
    (lambda f: (f / "data" / "answers.parquet").unlink(), r"data/answers\.parquet is missing"),
    (lambda f: drop_column(f / "data" / "baseline.parquet"), r"baseline\.parquet .*lacks the columns value"),
    (lambda f: drop_example(f / "data" / "lens.parquet"), r"lens\.parquet holds 4 examples of .* run\.json counts 5"),
    (lambda f: cut(f / "run.json", 30), r"run\.json is missing or damaged"),
    (lambda f: (f / "run.json").write_text("[]"), r"run\.json is missing or damaged \(it holds a list"),
    (lambda f: (f / "run.json").write_text("{}"), r"run\.json is missing or damaged \(it lacks models"),
    (lambda f: record(f, settings={}), r"run\.json is missing or damaged \(it lacks settings\.prompt"),
    (lambda f: record(f, models={"a": {}}), r"run\.json is missing or damaged \(it lacks models\.a\.n_layers"),
    (lambda f: (f / "skipped.csv").unlink(), r"skipped\.csv is missing or damaged"),
    (lambda f: (f / "skipped.csv").write_text("a,b\n"), r"skipped\.csv is missing or damaged"),
    (lambda f: cut(f / "views" / "gallery.parquet"), r"views/gallery\.parquet is missing or damaged"),
    (lambda f: next((f / "views").glob("01-*.html")).unlink(), r"views/01-.*\.html is missing or damaged"),
    (lambda f: (f / "run.json").unlink(), r"is not finished: .* Run the command that began it again"),
    (lambda f: record(f, format=99, versions={"mechvlm": "9.0"}), r"newer mechvlm \(9\.0, folder format 99.*pip install -U"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_the_error_names_what_is_wrong_with_a_folder(copy, damage, message):
    mv.Study.open(copy)
    damage(copy)
    with pytest.raises(InputError, match=message):
        mv.Study.open(copy)


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(InputError, match="gone is not there; a study is opened by its folder"):
        mv.Study.open(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file"):
        mv.Study.open(tmp_path / "file")
    with pytest.raises(InputError, match=r"holds no study: there is no run\.json"):
        mv.Study.open(tmp_path)


def test_a_figure_that_is_not_there(opened):
    with pytest.raises(
        InputError, match=r"no figure 'lense'\. There are: phases, lens, contextualization, norm_attention"
    ):
        opened.plot("lense")
