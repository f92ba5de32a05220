"""A study's controls: read as the experiment reads them, kept, drawn, and part of the verdict."""

import json
import shutil
from dataclasses import replace
from html import unescape

import numpy as np
import pandas as pd
import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.images import noise_image
from helpers.seals import seal_study
from helpers.studies import made_study
from mechvlm.datasets import Dataset, Example, fingerprint
from mechvlm.errors import InputError
from mechvlm.experiments import contextualization_controls
from mechvlm.experiments.contextualization_controls_result import CONTROL_LINES
from mechvlm.measures.control_excess import ControlExcess
from mechvlm.study import run
from mechvlm.study.report.page import render
from mechvlm.study.report.summary import summary
from mechvlm.study.report.terminal import print_summary
from mechvlm.study.running import controls, runner
from mechvlm.study.save import run_record

pytestmark = pytest.mark.long

PROMPT, SEED = "what is this", 5


@pytest.fixture(scope="module")
def data() -> Dataset:
    # Ids whose order as texts is not that of the examples.
    examples = tuple(Example(f"e{9 - i}", noise_image(i), ("a red circle",)) for i in range(7))
    return Dataset("made", examples, (), fingerprint(examples))


@pytest.fixture(scope="module")
def study(llava_vlm, data, tmp_path_factory):
    """A study of seven examples, whose first five have controls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "CONTROL_EXAMPLES", 5)
        out = tmp_path_factory.mktemp("controls") / "out"
        return run([llava_vlm], data, prompt=PROMPT, batch_size=2, seed=SEED, out=out)


def test_the_curves_are_those_of_the_experiment(study, llava_vlm, data):
    name = llava_vlm.name
    table = study.tables["controls"]
    images = [example.image for example in data.examples[:5]]
    direct = mv.contextualization_controls(llava_vlm, llava_vlm.inputs(images, PROMPT, batch_size=2), seed=SEED)
    for kind, values in zip(direct.kinds, direct.controls, strict=True):
        for column, example in enumerate(data.examples[:5]):
            rows = table[(table["control"] == kind) & (table["example"] == example.id)].sort_values("state")
            assert rows["value"].to_numpy() == pytest.approx(values[:, column].numpy(), abs=1e-6)
    assert len(table) == direct.controls.numel()
    about = study.models[name]["controls"]
    assert about["kinds"] == ["noise", "words", "text"]
    assert about["left_out"] == []
    assert about["seconds"] > 0
    held = study.controls[name]
    assert held.n_examples == 5
    assert held.phases is study.phases[name]
    order = np.argsort([example.id for example in data.examples[:5]])
    assert held.inter.numpy() == pytest.approx(direct.inter.numpy()[:, order], abs=1e-6)
    assert held.controls["words"].numpy() == pytest.approx(direct.controls[1].numpy()[:, order], abs=1e-6)


def test_a_tokenizer_without_the_texts_words_leaves_text_out(llava_vlm, data, monkeypatch):
    monkeypatch.setattr(contextualization_controls, "FEWEST_WORDS", 1000)
    study = run([llava_vlm], data, prompt=PROMPT, batch_size=4)
    assert set(study.tables["controls"]["control"]) == {"noise", "words"}
    (reason,) = study.models[llava_vlm.name]["controls"]["left_out"]
    assert reason.startswith("text: The tokenizer of")


def test_an_example_that_does_not_fit_is_left_out_of_the_controls(llava_vlm, data, monkeypatch):
    whole = contextualization_controls.control_curves

    def curves(vlm, inputs, *rest):
        if len(inputs) > 1 or inputs.images[0][0].tobytes() == data.examples[2].image.tobytes():
            raise MemoryError("no room")
        return whole(vlm, inputs, *rest)

    monkeypatch.setattr(controls, "control_curves", curves)
    study = run([llava_vlm], data, prompt=PROMPT, batch_size=4)
    assert study.models[llava_vlm.name]["controls"]["left_out"] == [f"{data.examples[2].id}: no room"]
    assert study.controls[llava_vlm.name].n_examples == 6


def test_an_opened_study_has_them_and_run_json_says_the_verdict(study, llava_vlm):
    name = llava_vlm.name
    opened = mv.Study.open(study.out)
    pd.testing.assert_frame_equal(opened.controls[name].frame, study.controls[name].frame)
    record = json.loads((study.out / "run.json").read_text())
    assert record["phases"][name]["controls"]["verdict"] == study.controls[name].verdict
    assert record["phases"][name]["controls"]["n_examples"] == 5
    assert record["settings"]["measures"]["controls"] == {"examples": 32, "kinds": ["noise", "words", "text"]}


def changed(study, folder, change):
    shutil.copytree(study.out, folder)
    path = folder / "data" / "controls.parquet"
    change(pd.read_parquet(path)).to_parquet(path, index=False)
    seal_study(folder)
    return folder


def test_controls_of_other_examples_are_refused(study, tmp_path):
    other = changed(study, tmp_path / "a", lambda table: table.assign(example=table["example"].replace("e9", "zz")))
    with pytest.raises(InputError, match=r"controls.parquet .*the control 'noise' is of other examples"):
        mv.Study.open(other)
    fewer = changed(
        study, tmp_path / "b", lambda table: table[(table["control"] == "noise") | (table["example"] != "e9")]
    )
    with pytest.raises(InputError, match="the control 'words' is of other examples or states than the curves"):
        mv.Study.open(fewer)
    states = changed(study, tmp_path / "c", lambda table: table[table["state"] > 0])
    with pytest.raises(InputError, match="the control 'noise' is of other examples or states"):
        mv.Study.open(states)


def test_a_study_of_an_earlier_version_has_none(study, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(study.out, folder)
    (folder / "data" / "controls.parquet").unlink()
    seal_study(folder)
    opened = mv.Study.open(folder)
    assert opened.controls == dict.fromkeys(opened.models)
    assert opened.summary()["controls"].tolist() == ["not read"]
    assert "control:" not in " ".join(opened.plot("phases").figure.axes[0].get_legend_handles_labels()[1])


@pytest.mark.families
def test_a_decoder_that_takes_only_noise_has_only_that(data):
    vlm = mv.load(*families.build("blip2_opt"))
    study = run([vlm], data, prompt="what", batch_size=4)
    assert set(study.tables["controls"]["control"]) == {"noise"}
    (reason,) = study.models[vlm.name]["controls"]["left_out"]
    assert reason.startswith("words, text: ")
    assert "positions are added" in reason


@pytest.mark.families
def test_deepstack_has_none_and_says_why(data, tmp_path):
    vlm = mv.load(*families.build("qwen3_vl"))
    study = run([vlm], replace(data, examples=data.examples[:2]), prompt="what", out=tmp_path / "out")
    assert study.tables["controls"].empty
    assert study.controls == {vlm.name: None}
    page = (study.out / "report.html").read_text()
    assert page.count("Controls left out: noise, words, text:") == 1
    assert "deepstack" in page
    assert "Against its controls" not in page


# -- the verdict, of made curves -------------------------------------------------------------------


def with_controls(study, model: str, factors: dict[str, float]):
    """The study with controls that do so much of what the images' curves do, on four examples."""
    rows = study.tables["contextualization"]
    rows = rows[(rows["model"] == model) & (rows["pair"] == "inter")]
    inter = torch.from_numpy(rows.pivot(index="state", columns="example", values="value").to_numpy()[:, :4].copy())
    controls = {kind: factor * inter for kind, factor in factors.items()}
    return replace(study, controls={model: ControlExcess(study.phases[model], inter, controls)})


@pytest.fixture(scope="module")
def made():
    study = made_study({"deep": 20}, n=12)
    return replace(study, models={"deep": study.models["deep"] | {"class": "Deep", "device": "cpu", "revision": None}})


def page_of(study, tmp_path) -> str:
    captioned = {name: study.plot(name) for name in ("phases", "lens", "contextualization", "norm_attention")}
    for name in captioned:
        (tmp_path / f"{name}.svg").write_text("<svg/>")
    return unescape(render(study, run_record(study), {n: c.caption for n, c in captioned.items()}, tmp_path, {}))


@pytest.mark.parametrize(
    ("factors", "short", "headline", "note"),
    [
        ({"noise": 0.1, "words": 0.2}, "beyond controls", ", each beyond its controls.", None),
        (
            {"noise": 0.1, "words": 1.0},
            "decoder's own",
            ", but not each beyond its controls.",
            "not every phase exceeds the controls",
        ),
    ],
)
def test_the_verdict_is_that_of_the_controls(made, tmp_path, capsys, factors, short, headline, note):
    assert made.phases["deep"].shows_pattern
    study = with_controls(made, "deep", factors)
    row = summary(study).iloc[0]
    assert row["controls"] == short
    assert row["shows_pattern"] == (short == "beyond controls")
    page = page_of(study, tmp_path)
    look = "verdict" if note is None else "verdict no"
    assert f'<p class="{look}"><b>The curve shows the paper’s four phases in order{headline}</b>' in page
    assert study.controls["deep"].sentence in page
    frame = study.controls["deep"].frame
    for first, _ in study.phases["deep"].intervals:
        least = frame[frame["first_state"] == first].nsmallest(1, "excess").iloc[0]
        assert least["control"] == "words"
        assert f"{least.excess:+.3f} [{least.low:+.3f}, {least.high:+.3f}] (words)" in page
    top = study.plot("phases").figure.axes[0]
    lines = dict(zip(*reversed(top.get_legend_handles_labels()), strict=True))
    for kind, factor in factors.items():
        drawn = lines[f"control: {kind}"]
        assert drawn.get_ydata() == pytest.approx(factor * study.controls["deep"].inter.mean(-1).numpy())
        assert drawn.get_color() == CONTROL_LINES[kind][0]
        low, high = top.get_ylim()
        assert low < drawn.get_ydata().min()
        assert drawn.get_ydata().max() < high
    notes = [text.get_text() for text in top.texts if "phase" in text.get_text()]
    assert notes == ([] if note is None else [note])
    caption = study.plot("phases").caption
    assert "the first 4 examples" in caption
    assert "mean and covariance, random words. What" in caption, "the controls that were read, and no others"
    print_summary(replace(study, out=tmp_path))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"deep: {study.controls['deep'].sentence}" in printed
