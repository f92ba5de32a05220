"""The study end to end on small random models: its numbers against direct calls, its folder as a reader finds it."""

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

HOSTILE = "<script>alert('1')</script> \"quoted\" & </style><img src=http://evil.example/x.png> $x^{"
LLAVA, BLIP = "LlavaForConditionalGeneration", "InstructBlipForConditionalGeneration"
VALUES = ("contextualization", "baseline", "lens", "norm_attention")


def dataset(examples) -> Dataset:
    return Dataset("made", tuple(examples), (), fingerprint(examples))


@pytest.fixture(scope="module")
def examples(llava_vlm, blip_vlm):
    """Seven images. Captions hold some words that the models decode, so that no score is 0 by accident."""
    made = []
    for i in range(7):
        image = noise_image(i)
        words = set()
        for vlm in (llava_vlm, blip_vlm):
            lens = mv.logit_lens(vlm, vlm.inputs(image, "what is this"), k=1)
            words |= {w for layer in lens.pieces() for (piece,) in layer if (w := word_of(piece))}
        made.append(Example(f"e{i}", image, (" ".join(sorted(words)[i::2]), f"a picture number {i}")))
    return made


@pytest.fixture(scope="module")
def study(llava_vlm, blip_vlm, examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "deep" / "out"
    return run([llava_vlm, blip_vlm], dataset(examples), prompt="what is this", batch_size=3, out=out)


def same(one, other, tables=VALUES):
    for name in tables:
        a, b = (s.tables[name].drop(columns="model", errors="ignore") for s in (one, other))
        pd.testing.assert_frame_equal(a, b, atol=1e-5, rtol=1e-4, check_dtype=False)


# --- numbers ---


@pytest.mark.parametrize("name", [LLAVA, BLIP])
def test_words_equal_a_direct_call(study, examples, llava_vlm, blip_vlm, name):
    vlm = {LLAVA: llava_vlm, BLIP: blip_vlm}[name]
    rows = study.tables["lens"].query("model == @name")
    some = False
    for i, example in enumerate(examples):
        inputs = vlm.inputs(example.image, "what is this")
        lens = mv.logit_lens(vlm, inputs, k=1, positions="all")
        for tokens, captions, of in [
            ("image", "own", example),
            ("text", "own", example),
            ("image", "other", examples[(i + 1) % len(examples)]),
        ]:
            mine = rows.query("example == @example.id and tokens == @tokens and captions == @captions")
            assert len(mine) == 2 * (vlm.n_layers + 1)
            for layer, pieces in enumerate(lens.at(getattr(inputs.tokens, tokens)).pieces()):
                direct = precision_recall(pieces, of.captions)
                for measure in ("precision", "recall"):
                    (found,) = mine.query("layer == @layer and measure == @measure")["value"]
                    np.testing.assert_allclose(found, getattr(direct, measure), err_msg=f"{tokens} {captions} {layer}")
                    some |= tokens == "image" and captions == "own" and 0 < found < 1
    assert some, "every score is 0, 1 or NaN: the test shows nothing"


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
            found = rows.query("pair == @pair").sort_values("layer")["value"]
            np.testing.assert_allclose(found, getattr(context, pair)[:, 0], atol=1e-5)
        image = inputs.tokens.image
        for dest, at in (("last_text", 0), ("last_image", 1)):
            for measure, values in (("norm", norm.norm[:, 0, at]), ("weight", norm.weight[:, 0, :, at].mean(1))):
                found = shares.loc[(example.id, measure, dest), "value"]
                np.testing.assert_allclose(found, values[:, image].sum(-1) / values.sum(-1), atol=1e-5)
        norms.append(norm.norm[:, 0])
        weights.append(norm.weight[:, 0].mean(1))
    table = study.tables["norm_attention"].query("model == @name")
    assert (table["n"] == len(examples)).all()
    for i, dest in enumerate(("last_text", "last_image")):
        at = getattr(inputs.tokens, dest)
        for column, values in (("norm", norms), ("weight", weights)):
            found = table[table["dest"] == dest].pivot(index="layer", columns="src", values=column)
            assert list(found.index) == list(range(1, vlm.n_layers + 1))
            mean = torch.stack(values).mean(0)[:, i]
            assert not mean[:, at + 1 :].any(), "something after the destination was attended"
            np.testing.assert_allclose(found, mean[:, : at + 1], atol=1e-6)
    (first,) = table.query("dest == 'last_text' and layer == 1 and src == 0")["piece"]
    assert first == inputs.tokens.strings[0]


def test_baseline_is_of_all_examples_together(study, examples, llava_vlm):
    together = mv.contextualization(llava_vlm, llava_vlm.inputs([e.image for e in examples], "what is this"))
    found = study.tables["baseline"].query("model == @LLAVA and pair == 'inter'").sort_values("layer")["value"]
    np.testing.assert_allclose(found, together.baseline[0], atol=1e-5)


@pytest.mark.parametrize("size", [1, 7])
def test_batches_change_nothing(study, llava_vlm, blip_vlm, examples, size):
    same(run([llava_vlm, blip_vlm], dataset(examples), prompt="what is this", batch_size=size), study)


def test_phases_are_those_of_the_curves(study):
    curves = study.tables["contextualization"].query("model == @LLAVA and pair == 'inter'")
    curves = curves.pivot(index="example", columns="layer", values="value").to_numpy()
    direct = mv.fit_phases(curves)
    assert study.phases[LLAVA].directions == direct.directions
    assert study.phases[LLAVA].boundaries == direct.boundaries
    rows = study.tables["phases"].query("model == @LLAVA")
    assert list(rows["direction"]) == list(direct.directions)


def test_one_example_is_enough(llava_vlm, tmp_path):
    made = run([llava_vlm], "scenes", n=1, out=tmp_path / "one")
    assert set(made.tables["lens"]["captions"]) == {"own", "single"}
    assert made.tables["baseline"]["value"].isna().all()
    assert (tmp_path / "one" / "report.html").is_file()


# --- what is set aside ---


@pytest.fixture(scope="module")
def with_bad(tmp_path_factory):
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
    """Without the draw's order, which depends on how many there are."""
    data = load_dataset(spec)
    examples = tuple(sorted(data.examples, key=lambda e: e.id))
    return Dataset("made", examples, data.set_aside, data.fingerprint)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_bad_examples_are_set_aside_and_the_rest_is_unchanged(with_bad, llava_vlm, tmp_path, size):
    bad, good = map(in_order, with_bad)
    made, among_good = (
        run([llava_vlm], bad, batch_size=size, out=tmp_path / "bad"),
        run([llava_vlm], good, batch_size=4),
    )
    same(made, among_good, tables=("contextualization", "baseline", "norm_attention"))
    lens = [s.tables["lens"] for s in (made, among_good)]
    own, own_among_good = (t[t["captions"] == "own"].reset_index(drop=True) for t in lens)
    pd.testing.assert_frame_equal(own, own_among_good)
    # The control is the next example of the data set, which may be one that cannot be read.
    captions = {e.id: e.captions for e in bad.examples}
    following = dict(zip(captions, [*list(captions)[1:], next(iter(captions))], strict=True))
    assert following["2.png"] == "3.png"
    assert following["3.png"] == "cut.jpg"
    for example in good.examples:
        lens = mv.logit_lens(llava_vlm, llava_vlm.inputs(example.image, PROMPT), k=1)
        direct = [precision_recall(p, captions[following[example.id]]).recall for p in lens.pieces()]
        rows = made.tables["lens"].query("example == @example.id and captions == 'other' and measure == 'recall'")
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
    whole = type(vlm).inputs

    def inputs(self, images, prompts):
        made = whole(self, images, prompts)
        for row, (image,) in enumerate(made.images):
            if image.getpixel((0, 0)) == examples[2].image.getpixel((0, 0)):
                made.encoding["pixel_values"][row] = torch.nan
        return made

    monkeypatch.setattr(type(vlm), "inputs", inputs)
    made = run([vlm], dataset(examples), batch_size=4)
    assert list(made.skipped["example"]) == ["e2"]
    assert "NaN or infinite" in made.skipped["reason"][0]
    assert made.models[LLAVA]["n_examples"] == 6


def test_nothing_left(llava_vlm, tmp_path):
    (tmp_path / "x.png").write_text("no")
    spec = write_folder(tmp_path, [{"image": "x.png", "captions": ["x"]}])
    with pytest.raises(InputError, match=r"None of the 1 examples .*x\.png"):
        run([llava_vlm], spec, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_room_or_text_is_said_once(llava_vlm, blip_vlm):
    with pytest.raises(InputError, match="leaves no room"):
        run([llava_vlm], "scenes", n=3, prompt="word " * 3000)
    with pytest.raises(InputError, match="without a text token"):
        run([blip_vlm], "scenes", n=3, prompt="")


# --- the folder ---


def test_the_folder_is_whole_and_reads_back(study):
    names = {str(p.relative_to(study.out)) for p in study.out.rglob("*") if p.is_file()}
    drawn = {
        f"figures/{n}.{s}" for n in ("phases", "lens", "contextualization", "norm_attention") for s in ("png", "svg")
    }
    views = {f"views/{i + 1:02}-{VLM}-e{i % 6}.html" for i, VLM in enumerate([LLAVA] * 6 + [BLIP] * 6)}
    single = {"report.html", "run.json", "settings.json", "skipped.csv", "data/README.txt", "views/gallery.parquet"}
    assert names == single | drawn | views | {f"data/{n}.parquet" for n in study.tables}
    assert not [p for p in study.out.rglob("*") if p.is_dir() and not any(p.iterdir())]
    for name, table in mv.Study.open(study.out).tables.items():
        pd.testing.assert_frame_equal(table, study.tables[name], check_dtype=False)


def test_run_json_says_how_to_do_it_again(study, examples):
    record = json.loads((study.out / "run.json").read_text())
    assert record["dataset"] == {"name": "made", "n": 7, "fingerprint": fingerprint(examples)}
    assert record["seed"] == 0
    asked = {
        "models",
        "dataset",
        "prompt",
        "n",
        "seed",
        "device",
        "device_map",
        "remote",
        "dtype",
        "batch_size",
        "out",
        "measures",
    }
    assert set(record["settings"]) == asked
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


def test_figures_can_be_drawn_from_the_files_alone(study):
    drawn = mv.Study.open(study.out).figures()
    lens, caption = drawn["lens"]
    labels = [t.get_text() for t in lens.legends[0].get_texts()]
    assert labels == [
        "image tokens, own captions",
        "image tokens, each caption alone",
        "image tokens, another image's captions",
        "image tokens, another's captions, each alone",
        "text tokens, own captions",
        " ",
        "± 1 standard deviation",
        "95% interval of the mean",
    ]
    assert "template included" in caption
    mean = study.tables["lens"].query(
        "model == @LLAVA and tokens == 'image' and captions == 'own' and measure == 'recall'"
    ).groupby("layer")["value"].mean()  # fmt: skip
    np.testing.assert_allclose(lens.axes[1].lines[0].get_ydata(), mean)
    assert list(lens.axes[1].lines[0].get_xdata()) == [0, 1, 2, 3], "layers count from 0 to n_layers"


def requests_of(page: str) -> list[str]:
    """Whatever a browser would fetch, before anything is clicked."""
    page = re.sub(r'<a [^>]*href="views/[\w-]+\.html"', "<a ", page)
    found = re.findall(r"(?:src|href|srcset|poster|data|action)\s*=\s*[\"']?([^\"'\s>]+)", page, re.IGNORECASE)
    found += re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", page, re.IGNORECASE)
    return [f for f in found if not f.startswith("data:")]


def test_the_report_asks_for_nothing_and_runs_nothing(study):
    page = (study.out / "report.html").read_text()
    assert requests_of(page) == []
    assert "<script" not in page.lower()
    assert page.count("data:image/svg+xml;base64,") == 4
    assert page.count('<div class="card">') == 6


def test_hostile_text_is_escaped(llava_vlm, tmp_path):
    examples = [Example(f"{i} {HOSTILE}", noise_image(i), (HOSTILE + " dog",)) for i in range(3)]
    (tmp_path / "<script>x.png").write_text("no picture")
    examples.append(Example("<script>x", tmp_path / "<script>x.png", ("x y",)))
    made = run([llava_vlm], dataset(examples), prompt="what is <script>alert(2)</script> this", out=tmp_path / "out")
    assert len(made.views) == 3
    assert {p.parent for p in made.out.rglob("*.html")} == {made.out, made.out / "views"}
    for file in (made.out / "views").glob("*.html"):
        assert file.read_text().count("<script") == 3, "its own: that scripts run, the numbers, and what draws them"
    page = (made.out / "report.html").read_text()
    assert "&lt;script&gt;alert(" in page
    assert "<script" not in page.lower()
    assert "<img src=http" not in page
    assert page.count("</style>") == 1
    assert [r for r in requests_of(page) if "evil" not in r] == [], "only as text"
    assert len(made.skipped) == 1


def test_the_report_says_where_the_phases_do_not_show(study):
    page = (study.out / "report.html").read_text()
    for name in (LLAVA, BLIP):
        said = "does not show the paper" if not study.phases[name].shows_pattern else "shows the paper"
        assert said in page
        assert study.phases[name].explanation.split(".")[0] in page


def test_summary_has_a_row_a_model(study):
    rows = summary(study).set_index("model")
    curves = study.tables["contextualization"].query("model == @BLIP and pair == 'inter'")
    means = curves.groupby("layer")["value"].mean()
    assert rows.loc[BLIP, "highest"] == pytest.approx(means.max())
    assert rows.loc[BLIP, "lowest_layer"] == means.argmin()
    assert rows.loc[LLAVA, "layers"] == 3
