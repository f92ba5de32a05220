"""A study's statistics against direct calls: curves, phases, summary, settings."""

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import mechvlm as mv
from helpers.models import llava
from helpers.studies import made_study
from helpers.uneven import N_LAYERS
from mechvlm import bundled
from mechvlm.datasets import load_dataset
from mechvlm.intervals import mean_interval
from mechvlm.measures.phase_fit import fit_phases
from mechvlm.study.curves import curves, phases_of
from mechvlm.study.report.summary import phases_in_words, summary
from mechvlm.study.running.settings import _sha256, differences, settings_of, weights_identity

SEED = 7
MODELS = dict(zip(("org/shallow", "deep"), N_LAYERS, strict=True))


@pytest.fixture(scope="module")
def study():
    """Rows in no order, and words' shares that some examples lack."""
    study = made_study(MODELS, n=9, seed=SEED)
    lens = study.tables["lens"]
    lens.loc[(lens["example"] == "e003") & (lens["measure"] == "precision"), "value"] = math.nan
    lens.loc[(lens["model"] == "deep") & (lens["state"] == 5) & (lens["example"] > "e000"), "value"] = math.nan
    for name in ("contextualization", "lens", "attention_share"):
        study.tables[name] = study.tables[name].sample(frac=1, random_state=1).reset_index(drop=True)
    study.skipped.loc[0] = ["deep", "e100", "unreadable"]
    study.skipped.loc[1] = ["deep", "e101", "unreadable"]
    study.skipped.loc[2] = ["", "e102", "unreadable"]
    return study


TABLES = {
    "cosine_image": ("contextualization", {"pair": "image"}),
    "cosine_text": ("contextualization", {"pair": "text"}),
    "cosine_inter": ("contextualization", {"pair": "inter"}),
    "precision": ("lens", {"tokens": "image", "captions": "own", "measure": "precision"}),
    "recall_other": ("lens", {"tokens": "image", "captions": "other", "measure": "recall"}),
    "precision_text": ("lens", {"tokens": "text", "captions": "own", "measure": "precision"}),
    "norm_share_last_text": ("attention_share", {"measure": "norm", "dest": "last_text"}),
    "weight_share_last_image": ("attention_share", {"measure": "weight", "dest": "last_image"}),
}


def values_of(study, model: str, measure: str, layer: int) -> pd.Series:
    """The measure of each example at a layer, by example, straight from the table."""
    name, keys = TABLES[measure]
    table = study.tables[name]
    number = "state" if "state" in table else "layer"
    for column, value in {**keys, "model": model, number: layer}.items():
        table = table[table[column] == value]
    return table.set_index("example")["value"].sort_index()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("measure", TABLES)
def test_each_point_of_a_curve_equals_the_examples_own(study, model, measure):
    rows = study.curves(measure)
    rows = rows[rows["model"] == model].set_index("layer")
    # Shares are of layers, all else of the states between them, one more.
    assert sorted(rows.index) == list(range(MODELS[model] + (0 if "share" in measure else 1)))
    for layer, row in rows.iterrows():
        values = values_of(study, model, measure, layer)
        assert row["n"] == values.notna().sum()
        assert row["mean"] == pytest.approx(values.mean())
        assert row["sd"] == pytest.approx(values.std(ddof=0))
        want = mean_interval(torch.tensor(values.to_numpy()), seed=SEED)
        if row["n"] < 2:
            assert math.isnan(row["low"])
            assert math.isnan(row["high"])
            continue
        assert (row["low"], row["high"]) == pytest.approx((want.low.item(), want.high.item()), rel=1e-4)
        narrower = mean_interval(torch.tensor(values.to_numpy()), 0.9, seed=SEED)
        assert row["high"] - row["low"] > narrower.high - narrower.low


def test_the_seed_of_the_bootstrap_is_the_studys(study):
    of_seed = [curves(study.tables, study.models, seed)["low"].dropna().to_numpy() for seed in (SEED, 0)]
    np.testing.assert_array_equal(study.curves()["low"].dropna(), of_seed[0])
    assert not np.array_equal(*of_seed)


def test_baselines_are_those_of_their_own_pair(study):
    for pair in ("inter", "image", "text"):
        rows = study.curves(f"cosine_{pair}_baseline")
        for model, n_layers in MODELS.items():
            table = study.tables["baseline"].query("model == @model and pair == @pair")
            got = rows[rows["model"] == model].sort_values("layer")
            assert got["mean"].tolist() == table.sort_values("state")["value"].tolist()
            assert len(got) == n_layers + 1
            assert got[["sd", "low", "high"]].isna().all(axis=None)
            assert set(got["n"]) == {9}


def test_phases_are_those_of_the_three_curves(study):
    for model, n_layers in MODELS.items():
        inter, image, text = (
            np.array([values_of(study, model, f"cosine_{pair}", layer) for layer in range(n_layers + 1)]).T
            for pair in ("inter", "image", "text")
        )
        got = phases_of(study.tables["contextualization"], model, SEED)
        want = fit_phases(inter, image=image, text=text, seed=SEED)
        assert got.boundaries == want.boundaries
        assert got.explanation == want.explanation
        assert got.support == want.support
        for name, values in (("image", image), ("text", text)):
            for change, (first, last) in zip(got.changes[name], got.intervals, strict=True):
                assert change.value == pytest.approx(values.mean(0)[last] - values.mean(0)[first])
    assert phases_of(study.tables["contextualization"].query("state < 2"), "deep", SEED) is None


def test_each_column_of_the_summary(study):
    rows = summary(study).set_index("model")
    assert list(rows.index) == list(MODELS)
    for model, n_layers in MODELS.items():
        row = rows.loc[model]

        def mean(measure, layer, model=model):
            return values_of(study, model, measure, layer).mean()

        layers = range(n_layers + 1)
        inter = [mean("cosine_inter", layer) for layer in layers]
        assert (row["lowest_state"], row["highest_state"]) == (np.argmin(inter), np.argmax(inter))
        assert (row["lowest"], row["highest"]) == pytest.approx((min(inter), max(inter)))
        precision = [mean("precision", layer) for layer in layers]
        best = int(np.nanargmax(precision))
        assert row["best_state"] == best
        assert row["precision"] == pytest.approx(precision[best])
        assert row["precision_0"] == pytest.approx(precision[0])
        assert precision[0] != pytest.approx(precision[-1])
        at = study.curves("recall").query("model == @model").set_index("layer")
        best_recall = int(at["mean"].idxmax())
        assert row["recall_state"] == best_recall
        assert row["recall_0"] == pytest.approx(at.loc[0, "mean"])
        assert (row["recall_low"], row["recall_high"]) == pytest.approx(tuple(at.loc[best_recall, ["low", "high"]]))
        assert row["recall_other"] == pytest.approx(mean("recall_other", best_recall))
        assert row["skipped"] == (2 if model == "deep" else 0)
        assert row["layers"] == n_layers


def test_three_states_are_enough_for_phases(study):
    rows = study.tables["contextualization"].query("state < 3")
    assert len(phases_of(rows, "deep", SEED).mean) == 3


def test_extremes_are_those_of_the_mean():
    """One layer varies widely: its interval reaches furthest both ways, its mean does not."""
    study = made_study({"m": 4}, n=8, seed=SEED)
    rows = study.tables["contextualization"]
    inter = (rows["pair"] == "inter") & (rows["model"] == "m")
    for layer, values in ((0, [0.1] * 8), (1, [0.2] * 8), (2, [-0.9, 0.9] * 4), (3, [0.4] * 8), (4, [-0.2] * 8)):
        rows.loc[inter & (rows["state"] == layer), "value"] = values
    row = summary(study).iloc[0]
    assert (row["lowest_state"], row["highest_state"]) == (4, 3)
    curve = study.curves("cosine_inter").set_index("layer")
    assert curve["low"].idxmin() == curve["high"].idxmax() == 2
    assert row["highest_low"] == pytest.approx(0.4)


FOUR = ("I alignment", "II intra-modal encoding", "III inter-modal encoding", "IV output preparation")


@pytest.mark.parametrize(("labels", "words"), [
    (FOUR, "I-IV"), (FOUR[:3], "I-III only"), (FOUR[1:], "II-IV only"), ((None,) * 2, "rise, fall"),
    ((None,) * 5, "rise, fall, rise, fall, rise"), ((), "flat"),
])  # fmt: skip
def test_phases_in_words(study, labels, words):
    n = len(labels)
    phases = replace(
        study.phases["deep"], n_segments=n, labels=labels, directions=(("rise", "fall") * 3)[:n], shows_pattern=n == 4
    )
    assert phases_in_words(phases) == words
    assert phases_in_words(None) == "too few layers"


# -- settings --


def test_a_setting_that_is_new_is_a_difference():
    assert differences({"seed": 0}, {"seed": 0, "k": 5}) == ["k was not given, is 5"]
    assert differences({"seed": 0, "k": [1, 2]}, {"seed": 0}) == ["k was 1, 2, is not given"]
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a c was 2, is 3"]
    assert differences({"dataset": {"name": "x"}}, {"dataset": {"name": "y"}}) == [], "the same data elsewhere"


def test_other_weights_of_the_same_model_are_a_difference():
    before, now = ({"models": ["m"], "weights": {"m": {"sha256": digest}}} for digest in "ab")
    assert differences(before, now) == ["weights m sha256 was a, is b"]
    assert differences(before, {"models": ["k"], "weights": {"k": {"sha256": "c"}}}) == ["models was m, is k"]


def test_a_model_is_known_by_every_number_of_its_weights():
    identity = weights_identity(vlm := mv.load(*llava.__wrapped__()))
    assert weights_identity(vlm) == identity
    parameters = dict(vlm.hf.named_parameters())
    names = list(parameters)
    for name in (names[0], names[len(names) // 2], names[-1]):
        values = parameters[name].data.view(-1)
        before = values[-1].clone()
        values[-1] += 1
        assert weights_identity(vlm)["parameters"] != identity["parameters"], f"the last number of {name}"
        values[-1] = before
    assert weights_identity(vlm) == identity


@pytest.fixture
def folder(tmp_path):
    """A model's folder with two files of weights."""
    for path in bundled.path("tiny-llava").iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes(range(10 * number)))
    return tmp_path


def test_every_file_of_a_models_folder_counts(folder):
    before = weights_identity(str(folder))
    assert before["class"] == "LlavaForConditionalGeneration"
    first, second = (folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    for path in (first, second):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"!")
        assert weights_identity(str(folder))["sha256"] != before["sha256"], path.name
        path.write_bytes(content)
    assert weights_identity(str(folder)) == before
    for name in ("config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert weights_identity(str(folder))["files"] != before["files"], name
        (folder / name).write_bytes(content)


def test_hashes_by_hand(folder):
    files = sorted(folder.glob("*.safetensors"))
    digests = [hashlib.sha256(path.read_bytes()) for path in files]
    assert _sha256(files[:1]) == digests[0].hexdigest()
    assert _sha256(files) == hashlib.sha256(digests[0].digest() + digests[1].digest()).hexdigest()
    assert _sha256(files[::-1]) != _sha256(files)
    assert _sha256([]) is None


OPTIONS = {"prompt": "a", "seed": 3, "device": "cpu", "dtype": "float32", "batch_size": 4}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 4}, ["seed was 3, is 4"]),
        ({"prompt": "b"}, ["prompt was a, is b"]),
        ({"dtype": "bfloat16"}, ["dtype was float32, is bfloat16"]),
        ({"dtype": None}, ["dtype was float32, is not given"]),
        ({"device": None}, []),  # the CPU is the default
        ({"batch_size": 5}, ["batch_size was 4, is 5", "shard was 32, is 30"]),
    ],
)
def test_every_setting_is_held_and_named(change, says):
    data = load_dataset("scenes", 3)
    before, now = (settings_of(["tiny-llava"], data, **options) for options in (OPTIONS, OPTIONS | change))
    assert differences(before, now) == says
    assert differences(json.loads(json.dumps(before)), json.loads(json.dumps(now))) == says


def test_other_data_and_other_models_are_other_settings():
    first, more = load_dataset("scenes", 3), load_dataset("scenes", 4)
    before = settings_of(["tiny-llava"], first, **OPTIONS)
    (n, fingerprint) = differences(before, settings_of(["tiny-llava"], more, **OPTIONS))
    assert n == "dataset n was 3, is 4"
    assert fingerprint.startswith("dataset fingerprint was ")
    other = settings_of(["tiny-instructblip"], first, **OPTIONS)
    assert differences(before, other) == ["models was tiny-llava, is tiny-instructblip"]
    assert before["weights"]["tiny-llava"] != other["weights"]["tiny-instructblip"]
