"""compare(): several models on one axis of relative depth. Each drawn point is a measured layer."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import mechvlm as mv
from helpers.studies import made_study
from mechvlm.errors import InputError
from mechvlm.figures.style import style
from mechvlm.study import run
from mechvlm.study.running.settings import MEASURE_SETTINGS

pytestmark = pytest.mark.long

MODELS = {"org/small": 3, "large": 32}


@pytest.fixture(scope="module")
def made():
    return made_study(MODELS, n=6)


def drawn_lines(ax) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in ax.lines if len(line.get_xydata())}


def test_every_drawn_point_is_a_layer_at_its_relative_depth(made):
    figure = mv.compare([made]).plot(["cosine_inter", "precision"]).figure
    for column, measure in enumerate(("cosine_inter", "precision")):
        lines = drawn_lines(figure.axes[column])
        assert set(lines) == {"small", "large"}
        for model, n_layers in MODELS.items():
            means = made.frame(measure).query("model == @model").groupby("layer")["value"].mean()
            points = lines[model.split("/")[-1]]
            np.testing.assert_allclose(points[:, 0], np.arange(n_layers + 1) / n_layers)
            np.testing.assert_allclose(points[:, 1], means)
        assert len(figure.axes[column].collections) == 4, "two bands a model"
    controls = [line.get_ydata() for line in figure.axes[2].lines]
    baseline = made.tables["baseline"].query("pair == 'inter'")
    for model in MODELS:
        values = baseline[baseline["model"] == model]["value"].to_numpy()
        assert any(np.array_equal(values, y) for y in controls), "no baseline"
    assert len(figure.axes[3].lines) == 4, "another image's captions and the text tokens of both models"
    assert figure.axes[0].get_ylim() == figure.axes[2].get_ylim(), "a control on another scale than its measure"


def test_the_frame_is_the_studies_curves_by_depth(made):
    other = made_study({"third": 8}, n=4, seed=1)
    frame = mv.compare([made, other]).frame
    columns = ["label", "model", "measure", "layer", "depth", "n", "mean", "sd", "low", "high"]
    assert list(frame.columns) == columns
    both = pd.concat([made.curves(), other.curves()], ignore_index=True)
    pd.testing.assert_frame_equal(frame[both.columns.tolist()], both)
    assert set(zip(frame["label"], frame["model"], strict=True)) == {
        ("small", "org/small"), ("large", "large"), ("third", "third"),
    }  # fmt: skip
    third = frame.query("model == 'third' and measure == 'recall'")
    assert list(third["depth"]) == [layer / 8 for layer in range(9)]
    assert "value" not in frame, "nothing is interpolated"


@pytest.mark.long
def test_a_folder_and_its_study_compare_alike(llava_vlm, blip_vlm, tmp_path, undrawn):
    first = run([llava_vlm], "scenes", n=3, out=tmp_path / "one")
    second = run([blip_vlm], "scenes", n=3, out=tmp_path / "two")
    from_memory, from_disk = mv.compare([first, second]), mv.compare([str(tmp_path / "one"), tmp_path / "two"])
    pd.testing.assert_frame_equal(from_memory.frame, from_disk.frame)
    assert from_memory.notes == from_disk.notes == ()
    assert from_memory.plot().caption == from_disk.plot().caption
    pd.testing.assert_frame_equal(mv.Study.open(tmp_path / "one").compare([second]).frame, from_memory.frame)
    from_disk.plot().save(tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 20_000
    with pytest.raises(InputError, match=r"Study 2 .*one\) was given twice"):
        mv.compare([first, tmp_path / "one"])


def test_the_caption_counts_every_study_and_says_how_they_differ(made):
    other = made_study({"third": 8}, n=4, seed=1)
    caption = mv.compare([made, other]).plot().caption
    assert "small n = 6 (0 set aside), large n = 6 (0 set aside); of 6 drawn from made with seed 0" in caption
    assert "third n = 4 (0 set aside); of 4 drawn from made with seed 1" in caption
    assert "2,000 resamples of the examples, seeds 0, 1" in caption
    assert "The studies read different examples" in caption
    assert "not interpolated" in caption
    same = mv.compare([made, made_study({"third": 8}, n=6)]).plot().caption
    assert "different examples:" not in same
    half = made_study({"third": 8}, n=6)
    half.models["third"]["dtype"] = "bfloat16"
    assert "third in bfloat16" in mv.compare([made, half]).notes[0]
    again = made_study({"third": 8}, n=6, seed=1)
    notes = " ".join(mv.compare([again, half]).notes)
    assert "third, study 1 in float32, third, study 2 in bfloat16" in notes
    fewer = made_study({"third": 8}, n=6)
    fewer.models["third"]["n_examples"] = 5
    assert "did not read the same number" in mv.compare([made, fewer]).notes[0]


def test_the_labels_name_what_is_drawn():
    study = made_study({"m": 4}, n=3)
    lens = study.tables["lens"]
    single = lens[lens["captions"].isin(["own", "other"])].assign(
        captions=lambda rows: rows["captions"].map({"own": "single", "other": "other_single"}),
        value=lambda rows: rows["value"] / 2,
    )
    study.tables["lens"] = pd.concat([lens, single], ignore_index=True)
    share, words, *controls = mv.compare([study]).plot(["norm_share_last_text", "precision_single"]).figure.axes
    assert share.get_ylabel() == "image tokens' share"
    assert words.get_ylabel() == "share of words"
    assert [len(ax.lines) for ax in controls] == [0, 2], "each caption alone of another image, and of text tokens"
    rows = single[single["measure"] == "precision"]
    for line, keys in zip(controls[1].lines, (("image", "other_single"), ("text", "single")), strict=True):
        values = rows[(rows["tokens"] == keys[0]) & (rows["captions"] == keys[1])]
        np.testing.assert_allclose(line.get_ydata(), values.groupby("state")["value"].mean(), err_msg=str(keys))
    axes = study.plot("lens").figure.axes
    assert "another's captions, each alone" in str([ax.get_legend_handles_labels() for ax in axes])


def test_the_same_model_twice_is_told_apart(tmp_path):
    first, second = (made_study({"org/m": 4, "x": 4}, n=3, seed=seed) for seed in (0, 1))
    labels = {"m, study 1", "m, study 2", "x, study 1", "x, study 2"}
    assert set(mv.compare([first, second]).frame["label"]) == labels
    named = [replace(first, dataset=first.dataset | {"name": "coco"}), second]
    assert set(mv.compare(named).frame["label"]) == {"m, coco", "m, made", "x, coco", "x, made"}
    placed = [replace(first, out=tmp_path / "first"), replace(second, out=tmp_path / "second")]
    assert set(mv.compare(placed).frame["label"]) == {"m, first", "m, second", "x, first", "x, second"}


def test_studies_that_cannot_be_compared_are_refused(made):
    other_prompt = made_study({"b": 4}, n=3, settings={"prompt": "What is this?"})
    with pytest.raises(InputError, match=r"the prompt is 'Describe the scene\.' in the one, and 'What is this\?' in"):
        mv.compare([made, other_prompt])
    changed = MEASURE_SETTINGS | {"logit lens": MEASURE_SETTINGS["logit lens"] | {"k": 5}}
    with pytest.raises(InputError, match=r"measure of logit lens is .*'k': 1.*'k': 5"):
        mv.compare([made, made_study({"b": 4}, n=3, settings={"measures": changed})])
    unknown = {key: value for key, value in MEASURE_SETTINGS.items() if key != "words"}
    with pytest.raises(InputError, match=r"measure of words is .* and None in the other"):
        mv.compare([made, made_study({"b": 4}, n=3, settings={"measures": unknown})])
    other_phases = MEASURE_SETTINGS | {"phases": {"max_segments": 3}}
    # Phases are no curve, so their settings may differ.
    mv.compare([made, made_study({"b": 4}, n=3, settings={"measures": other_phases})])
    with pytest.raises(InputError, match="was given twice"):
        mv.compare([made, made])
    with pytest.raises(InputError, match="one or more studies"):
        mv.compare([])
    with pytest.raises(InputError, match="is not there; a study is opened by its folder"):
        mv.compare(["nowhere"])


def test_a_measure_that_is_not_there_is_refused(made):
    with pytest.raises(InputError, match=r"no measure 'colour' here\. There are: .*precision"):
        mv.compare([made]).plot(["precision", "colour"])


@pytest.mark.long
@pytest.mark.parametrize("n_models", [1, 2, 4, 9])
def test_looks_differ_and_the_legend_fits(n_models):
    made = made_study({f"org/model-number-{i}": (3, 32)[i % 2] for i in range(n_models)}, n=3)
    for measures in (["precision"], ["cosine_inter", "precision", "recall"]):
        figure = mv.compare([made]).plot(measures).figure
        looks = {
            (line.get_color(), str(line.get_linestyle())) for line in figure.axes[0].lines if line.get_xydata().size
        }
        assert len(looks) == n_models
        with style():
            figure.draw_without_rendering()
        legend = figure.legends[0].get_window_extent()
        assert 0 <= legend.x0 < legend.x1 <= figure.canvas.get_width_height()[0]
