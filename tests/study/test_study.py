"""The study end to end on small random models: its numbers against direct calls, and its folder."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import image as mpl_image
from PIL import Image

import mechvlm as mv
from helpers.datasets import write_folder
from helpers.images import noise_image
from mechvlm.datasets import Dataset, Example, fingerprint, load_dataset
from mechvlm.errors import InputError
from mechvlm.measures.words import precision_recall, word_of
from mechvlm.study import run
from mechvlm.study.report.summary import summary
from mechvlm.study.running.runner import PROMPT

pytestmark = pytest.mark.long

HOSTILE = "<script>alert('1')</script> \"quoted\" & </style><img src=http://evil.example/x.png> $x^{"
LLAVA, BLIP = "LlavaForConditionalGeneration", "InstructBlipForConditionalGeneration"
VALUES = ("contextualization", "baseline", "lens", "norm_attention")


def dataset(examples) -> Dataset:
    return Dataset("made", tuple(examples), (), fingerprint(examples))


@pytest.fixture(scope="module")
def examples(llava_vlm, blip_vlm):
    """Seven images. Their captions hold words that the models decode, so that scores are not 0."""
    examples = []
    for i in range(7):
        image = noise_image(i)
        words = set()
        for vlm in (llava_vlm, blip_vlm):
            lens = mv.logit_lens(vlm, vlm.inputs(image, "what is this"), k=1)
            words |= {w for points in lens.pieces().values() for (piece,) in points.values() if (w := word_of(piece))}
        examples.append(Example(f"e{i}", image, (" ".join(sorted(words)[i::2]), f"a picture number {i}")))
    return examples


@pytest.fixture(scope="module")
def study(llava_vlm, blip_vlm, examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "deep" / "out"
    return run([llava_vlm, blip_vlm], dataset(examples), prompt="what is this", batch_size=3, out=out)


def assert_same_tables(study, other, tables=VALUES):
    for name in tables:
        a, b = (s.tables[name].drop(columns="model", errors="ignore") for s in (study, other))
        pd.testing.assert_frame_equal(a, b, atol=1e-5, rtol=1e-4, check_dtype=False)


# --- numbers ---


@pytest.mark.parametrize("name", [LLAVA, BLIP])
def test_words_equal_a_direct_call(study, examples, llava_vlm, blip_vlm, name):
    vlm = {LLAVA: llava_vlm, BLIP: blip_vlm}[name]
    rows = study.tables["lens"].query("model == @name")
    some_between = False
    for i, example in enumerate(examples):
        inputs = vlm.inputs(example.image, "what is this")
        lens = mv.logit_lens(vlm, inputs, k=1, positions="all")
        for tokens, captions, of in [
            ("image", "own", example),
            ("text", "own", example),
            ("image", "other", examples[(i + 1) % len(examples)]),
        ]:
            scores = rows.query("example == @example.id and tokens == @tokens and captions == @captions")
            measures = ("precision", "recall", "word_share") if captions == "own" else ("precision", "recall")
            assert len(scores) == len(measures) * (vlm.n_layers + 1)
            for layer, pieces in lens.at(getattr(inputs.tokens, tokens)).pieces().items():
                direct = precision_recall(pieces, of.captions)
                for measure in measures:
                    (value,) = scores.query("state == @layer and measure == @measure")["value"]
                    np.testing.assert_allclose(value, getattr(direct, measure), err_msg=f"{tokens} {captions} {layer}")
                    some_between |= (
                        tokens == "image" and captions == "own" and measure != "word_share" and 0 < value < 1
                    )
    assert some_between, "every score is 0, 1 or NaN: the test shows nothing"


@pytest.mark.parametrize("name", [LLAVA, BLIP])
def test_contextualization_and_norms_equal_single_reads(study, examples, llava_vlm, blip_vlm, name):
    vlm = {LLAVA: llava_vlm, BLIP: blip_vlm}[name]
    norms, weights = [], []
    shares = (
        study.tables["attention_share"]
        .query("model == @name")
        .set_index(["example", "measure", "dest", "layer"])
        .sort_index()
    )
    for example in examples:
        inputs = vlm.inputs(example.image, "what is this")
        context, norm = mv.read(vlm, inputs, mv.Contextualization(), mv.NormAttention())
        rows = study.tables["contextualization"].query("model == @name and example == @example.id")
        for pair in ("inter", "image", "text"):
            curve = rows.query("pair == @pair").sort_values("state")["value"]
            np.testing.assert_allclose(curve, getattr(context, pair)[:, 0], atol=1e-5)
        image = inputs.tokens.image
        for dest, at in (("last_text", 0), ("last_image", 1)):
            for measure, values in (("norm", norm.norm[:, 0, at]), ("weight", norm.weight[:, 0, :, at].mean(1))):
                share = shares.loc[(example.id, measure, dest), "value"]
                np.testing.assert_allclose(share, values[:, image].sum(-1) / values.sum(-1), atol=1e-5)
        norms.append(norm.norm[:, 0])
        weights.append(norm.weight[:, 0].mean(1))
    table = study.tables["norm_attention"].query("model == @name")
    assert (table["n"] == len(examples)).all()
    for i, dest in enumerate(("last_text", "last_image")):
        at = getattr(inputs.tokens, dest)
        for column, values in (("norm", norms), ("weight", weights)):
            means = table[table["dest"] == dest].pivot(index="layer", columns="src", values=column)
            assert list(means.index) == list(range(vlm.n_layers))
            mean = torch.stack(values).mean(0)[:, i]
            assert not mean[:, at + 1 :].any(), "something after the destination was attended"
            np.testing.assert_allclose(means, mean[:, : at + 1], atol=1e-6)
    (first,) = table.query("dest == 'last_text' and layer == 0 and src == 0")["piece"]
    assert first == inputs.tokens.strings[0]


def test_baseline_is_of_all_examples_together(study, examples, llava_vlm):
    together = mv.contextualization(llava_vlm, llava_vlm.inputs([e.image for e in examples], "what is this"))
    baseline = study.tables["baseline"].query("model == @LLAVA and pair == 'inter'").sort_values("state")["value"]
    np.testing.assert_allclose(baseline, together.baseline[0], atol=1e-5)


@pytest.mark.parametrize("size", [1, 7])
def test_batches_change_nothing(study, llava_vlm, blip_vlm, examples, size):
    other = run([llava_vlm, blip_vlm], dataset(examples), prompt="what is this", batch_size=size)
    assert_same_tables(other, study)


def test_phases_are_those_of_the_curves(study):
    curves = study.tables["contextualization"].query("model == @LLAVA and pair == 'inter'")
    curves = curves.pivot(index="example", columns="state", values="value").to_numpy()
    direct = mv.fit_phases(curves)
    assert study.phases[LLAVA].directions == direct.directions
    assert study.phases[LLAVA].boundaries == direct.boundaries
    rows = study.tables["phases"].query("model == @LLAVA")
    assert list(rows["direction"]) == list(direct.directions)


def test_one_example_is_enough(llava_vlm, tmp_path):
    study = run([llava_vlm], "scenes", n=1, out=tmp_path / "one")
    assert set(study.tables["lens"]["captions"]) == {"own", "single"}
    assert study.tables["baseline"]["value"].isna().all()
    assert (tmp_path / "one" / "report.html").is_file()


# --- examples that are set aside ---


@pytest.fixture(scope="module")
def with_bad(tmp_path_factory):
    """Two data sets: four good images with five bad ones, and the good ones alone."""
    folder = tmp_path_factory.mktemp("bad") / "d"
    folder.mkdir()
    good = [f"{i}.png" for i in range(4)]
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture")
    noise_image(9, (400, 300)).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    Image.new("1", (20_000, 6_000)).save(folder / "vast.png")
    bad = ["empty.png", "text.png", "cut.jpg", "vast.png", "gone.png"]
    names = [bad[0], good[0], bad[1], bad[2], good[1], good[2], bad[3], bad[4], good[3]]
    lines = [{"image": n, "captions": [f"the picture {n} of a dog"]} for n in names]
    return write_folder(folder, lines, good), write_folder(
        folder.parent / "g", [x for x in lines if x["image"] in good], good
    )


def in_order(spec):
    """The data set sorted by id, so that its order does not depend on the draw."""
    data = load_dataset(spec)
    examples = tuple(sorted(data.examples, key=lambda e: e.id))
    return Dataset("made", examples, data.set_aside, data.fingerprint)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_bad_examples_are_set_aside_and_the_rest_is_unchanged(with_bad, llava_vlm, tmp_path, undrawn, size):
    bad, good = map(in_order, with_bad)
    study = run([llava_vlm], bad, batch_size=size, out=tmp_path / "bad")
    good_study = run([llava_vlm], good, batch_size=4)
    assert_same_tables(study, good_study, tables=("contextualization", "baseline", "norm_attention"))
    lens = [s.tables["lens"] for s in (study, good_study)]
    own, own_of_good = (t[t["captions"] == "own"].reset_index(drop=True) for t in lens)
    pd.testing.assert_frame_equal(own, own_of_good)
    # The control is the next example of the data set, even if that cannot be read.
    captions = {e.id: e.captions for e in bad.examples}
    following = dict(zip(captions, [*list(captions)[1:], next(iter(captions))], strict=True))
    assert following["2.png"] == "3.png"
    assert following["3.png"] == "cut.jpg"
    for example in good.examples:
        lens = mv.logit_lens(llava_vlm, llava_vlm.inputs(example.image, PROMPT), k=1)
        direct = [precision_recall(p, captions[following[example.id]]).recall for p in lens.pieces().values()]
        rows = study.tables["lens"].query("example == @example.id and captions == 'other' and measure == 'recall'")
        np.testing.assert_allclose(rows["value"], direct)
    skipped = pd.read_csv(tmp_path / "bad" / "skipped.csv", keep_default_na=False).set_index("example")
    expected = {
        "empty.png": "is empty (0 bytes)", "text.png": "cannot be read", "cut.jpg": "truncated",
        "vast.png": "120,000,000 pixels",
    }  # fmt: skip
    for name, reason in expected.items():
        assert reason in skipped.loc[name, "reason"]
        assert skipped.loc[name, "model"] == LLAVA
    (gone,) = [r for r in skipped.itertuples() if "no such file" in r.reason]
    assert gone.model == ""
    assert len(skipped) == 5
    page = (tmp_path / "bad" / "report.html").read_text()
    assert "<b>5 set aside</b>" in page
    assert "is empty (0 bytes)" in page
    assert json.loads((tmp_path / "bad" / "run.json").read_text())["skipped"] == 5


def test_an_example_with_nan_is_set_aside(examples, monkeypatch):
    from helpers.models import llava

    vlm = mv.load(*llava(layers=2))
    inputs_of = type(vlm).inputs

    def with_nan(self, images, prompts):
        inputs = inputs_of(self, images, prompts)
        for row, (image,) in enumerate(inputs.images):
            if image.getpixel((0, 0)) == examples[2].image.getpixel((0, 0)):
                inputs.encoding["pixel_values"][row] = torch.nan
        return inputs

    monkeypatch.setattr(type(vlm), "inputs", with_nan)
    study = run([vlm], dataset(examples), batch_size=4)
    assert list(study.skipped["example"]) == ["e2"]
    assert "NaN or infinite" in study.skipped["reason"][0]
    assert study.models[LLAVA]["n_examples"] == 6


def test_no_example_is_left(llava_vlm, tmp_path):
    (tmp_path / "x.png").write_text("no")
    spec = write_folder(tmp_path, [{"image": "x.png", "captions": ["x"]}])
    with pytest.raises(InputError, match=r"None of the 1 examples .*x\.png"):
        run([llava_vlm], spec, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_room_or_text_is_refused(llava_vlm, blip_vlm):
    with pytest.raises(InputError, match="leaves no room"):
        run([llava_vlm], "scenes", n=3, prompt="word " * 3000)
    with pytest.raises(InputError, match="without a text token"):
        run([blip_vlm], "scenes", n=3, prompt="")


# --- the folder ---


def test_the_folder_is_whole_and_reads_back(study):
    names = {str(p.relative_to(study.out)) for p in study.out.rglob("*") if p.is_file()}
    figures = {
        f"figures/{n}.{s}"
        for n in ("phases", "lens", "contextualization", "norm_attention")
        for s in ("png", "svg", "pdf")
    }
    views = {f"views/{i + 1:02}-{VLM}-e{i % 6}.html" for i, VLM in enumerate([LLAVA] * 6 + [BLIP] * 6)}
    single = {"report.html", "run.json", "settings.json", "skipped.csv", "data/README.txt", "views/gallery.parquet"}
    assert names == single | figures | views | {f"data/{n}.parquet" for n in study.tables}
    assert not [p for p in study.out.rglob("*") if p.is_dir() and not any(p.iterdir())]
    for name, table in mv.Study.open(study.out).tables.items():
        pd.testing.assert_frame_equal(table, study.tables[name], check_dtype=False)


def test_run_json_says_how_to_run_the_study_again(study, examples):
    record = json.loads((study.out / "run.json").read_text())
    assert record["dataset"] == {"name": "made", "n": 7, "fingerprint": fingerprint(examples)}
    assert record["seed"] == 0
    assert set(record["settings"]) == {
        "models", "dataset", "prompt", "n", "seed", "device", "device_map", "remote", "dtype", "batch_size", "out",
        "measures",
    }  # fmt: skip
    assert set(record["models"]) == {LLAVA, BLIP}
    assert {"python", "platform", "torch", "transformers", "nnsight", "mechvlm"} <= set(record["versions"])
    assert record["phases"][LLAVA]["explanation"] == study.phases[LLAVA].explanation
    assert record["findings"][0]["model"] == LLAVA


def test_figures_show_something(study):
    for name in ("phases", "lens", "contextualization", "norm_attention"):
        pixels = mpl_image.imread(study.out / "figures" / f"{name}.png")[..., :3]
        assert min(pixels.shape[:2]) > 500
        assert 0.03 < (pixels.min(-1) < 0.97).mean() < 0.97, f"{name} is blank or full"
        assert len(np.unique((pixels[::5, ::5] * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 30
        assert (study.out / "figures" / f"{name}.svg").read_text().startswith("<?xml")
        pdf = (study.out / "figures" / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"CreationDate" not in pdf, "the same study gives the same file"


def test_figures_can_be_drawn_from_the_files_alone(study):
    lens, caption = mv.Study.open(study.out).figures()["lens"]
    labels = [t.get_text() for t in lens.legends[0].get_texts()]
    assert labels == [
        "image tokens, own captions",
        "image tokens, each caption alone",
        "image tokens, another image's captions",
        "image tokens, another's captions, each alone",
        "text tokens, own captions",
        " ",
        "95% interval of the mean",
    ]
    assert "template included" in caption
    mean = study.tables["lens"].query(
        "model == @LLAVA and tokens == 'image' and captions == 'own' and measure == 'recall'"
    ).groupby("state")["value"].mean()  # fmt: skip
    np.testing.assert_allclose(lens.axes[1].lines[0].get_ydata(), mean)
    assert list(lens.axes[1].lines[0].get_xdata()) == [0, 1, 2, 3], "states count from 0 to n_layers"


def requests_of(page: str) -> list[str]:
    """The addresses that a browser would fetch before anything is clicked."""
    page = re.sub(r'<a [^>]*href="(views/[\w-]+\.html|figures/\w+\.(png|svg|pdf)|#\w+)"', "<a ", page)
    addresses = re.findall(r"(?:src|href|srcset|poster|data|action)\s*=\s*[\"']?([^\"'\s>]+)", page, re.IGNORECASE)
    addresses += re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", page, re.IGNORECASE)
    return [address for address in addresses if not address.startswith("data:")]


def test_the_report_fetches_nothing_and_runs_no_script(study):
    page = (study.out / "report.html").read_text()
    assert requests_of(page) == []
    assert "<script" not in page.lower()
    assert page.count("data:image/svg+xml;base64,") == 4
    assert page.count('<div class="card">') == 6


def test_hostile_text_is_escaped(llava_vlm, tmp_path):
    examples = [Example(f"{i} {HOSTILE}", noise_image(i), (HOSTILE + " dog",)) for i in range(3)]
    (tmp_path / "<script>x.png").write_text("no picture")
    examples.append(Example("<script>x", tmp_path / "<script>x.png", ("x y",)))
    study = run([llava_vlm], dataset(examples), prompt="what is <script>alert(2)</script> this", out=tmp_path / "out")
    assert len(study.views) == 3
    assert {p.parent for p in study.out.rglob("*.html")} == {study.out, study.out / "views"}
    for file in (study.out / "views").glob("*.html"):
        # Its own scripts: a check that scripts run, the numbers, and the code that draws them.
        assert file.read_text().count("<script") == 3
    page = (study.out / "report.html").read_text()
    assert "&lt;script&gt;alert(" in page
    assert "<script" not in page.lower()
    assert "<img src=http" not in page
    assert page.count("</style>") == 1
    assert [r for r in requests_of(page) if "evil" not in r] == [], "only as text"
    assert len(study.skipped) == 1


def test_the_report_says_whether_the_phases_show(study):
    page = (study.out / "report.html").read_text()
    for name in (LLAVA, BLIP):
        verdict = "does not show the paper" if not study.phases[name].shows_pattern else "shows the paper"
        assert verdict in page
        assert study.phases[name].explanation.split(".")[0] in page


def test_summary_has_a_row_per_model(study):
    rows = summary(study).set_index("model")
    curves = study.tables["contextualization"].query("model == @BLIP and pair == 'inter'")
    means = curves.groupby("state")["value"].mean()
    assert rows.loc[BLIP, "highest"] == pytest.approx(means.max())
    assert rows.loc[BLIP, "lowest_state"] == means.argmin()
    assert rows.loc[LLAVA, "layers"] == 3
