"""The numbers on the report's page and in the terminal, held to the study's tables."""

import base64
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import mechvlm as mv
from helpers.studies import made_study
from mechvlm.datasets import Example
from mechvlm.experiments.winoground_result import WinogroundResult, pair_scores
from mechvlm.intervals import mean_interval
from mechvlm.study.record import GalleryView
from mechvlm.study.report.page import FIGURE_TITLES, render
from mechvlm.study.report.terminal import print_summary

DEPTHS = {"deep": 9, "other": 6}
SEED = 3
EXAMPLES = [Example(f"e{i:03}", Image.new("RGB", (4, 3)), (f"caption {i}",)) for i in range(2)]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (4, 3), (shade, shade, shade))


def pair_values(model: str) -> torch.Tensor:
    n_pairs = 90 + DEPTHS[model] % 2  # of few pairs, every seed has the same percentiles
    values = torch.rand(5, DEPTHS[model] + 1, n_pairs, 2, 2, generator=torch.Generator().manual_seed(DEPTHS[model]))
    values[4, -1, :50, 0, 0] += 1
    values[4, -1, :30, 1, 1] += 1
    return values


@pytest.fixture(scope="module")
def study() -> mv.Study:
    """With two examples in its gallery, and Winoground's pairs.

    Precision is highest before the last states, recall at the last.
    """
    made = made_study(DEPTHS, n=5, seed=SEED)
    lens = made.tables["lens"].copy()
    late = (lens["measure"] == "precision") & (lens["state"] > 4)
    lens.loc[late, "value"] *= 0.5
    answers, words, views, pairs, scores = [], [], {}, [], []
    for model, n_layers in DEPTHS.items():
        for i, example in enumerate(EXAMPLES):
            answers.append({"model": model, "example": example.id, "answer": f"answer of {model} to {i}"})
            for state in range(n_layers + 1):
                words.append({"model": model, "example": example.id, "state": state, "word": f"{model}{i}at{state}"})
            views[model, example.id] = GalleryView("", picture(10 * i + n_layers), f"token{i}", i)
        result = WinogroundResult(
            pair_values(model), tuple(map(str, range(pair_values(model).shape[2]))), (), "d", model
        )
        pairs.append(result.to_frame().assign(model=model))
        scores.append(pd.DataFrame({"model": model, "pair": result.pairs}))
    tables = {
        "lens": lens, "answers": pd.DataFrame(answers), "words": pd.DataFrame(words), "pairs": pd.concat(pairs),
        "pair_scores": pd.concat(scores),
    }  # fmt: skip
    return replace(
        made, tables={**made.tables, **tables}, gallery=[(e, picture(200 + i)) for i, e in enumerate(EXAMPLES)], views=views,
        models={model: {**about, "pairs_set_aside": []} for model, about in made.models.items()},
        dataset={**made.dataset, "pairs": 91, "half_pairs": 0}, out=Path("there"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(study, tmp_path_factory) -> str:
    figures = tmp_path_factory.mktemp("figures")
    for name in FIGURE_TITLES:
        (figures / f"{name}.svg").write_text(f'<svg width="321.6pt">the figure {name}')
    models = {
        model: {**about, "class": "A", "device": "cpu", "revision": None} for model, about in study.models.items()
    }
    record = {
        "dataset": study.dataset, "finished": "2024-01-02", "versions": {"mechvlm": "1"}, "seed": SEED,
        "settings": study.settings, "models": models,
    }  # fmt: skip
    files = {key: f"views/{key[0]}-{key[1]}.html" for key in study.views}
    return render(study, record, {name: f"caption of {name}" for name in FIGURE_TITLES}, figures, files)


def rows_of(html: str) -> list[list[str]]:
    """The cells of each row of the tables in a part of the page, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
    return [[" ".join(unescape(re.sub(r"<[^>]*>", " ", cell)).split()) for cell in row] for row in cells]


def words_of(study, model: str, measure: str, captions: str = "own") -> np.ndarray:
    """[example state] of the words on image tokens."""
    rows = study.tables["lens"].query(
        "model == @model and tokens == 'image' and captions == @captions and measure == @measure"
    )
    return rows.pivot(index="example", columns="state", values="value").to_numpy(float)


def with_interval(values: np.ndarray, state: int, between: str = "") -> str:
    """A mean over examples and its interval, as the page writes them."""
    mean, low, high = (x[state].item() for x in mean_interval(torch.tensor(values), seed=SEED))
    return f"{mean:.2f}{between} {low:.2f} to {high:.2f}"


def in_brackets(values: np.ndarray, at: int) -> str:
    """A mean over examples and its interval, as a finding says them."""
    mean, low, high = (x[at].item() for x in mean_interval(torch.tensor(values), seed=SEED))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def test_the_first_table_holds_each_models_means_and_intervals(study, page):
    table = rows_of(page.split("<table>")[1].split("</table>")[0])
    assert [row[0] for row in table] == ["model", *DEPTHS]
    for model, row in zip(DEPTHS, table[1:], strict=True):
        cosines = study.tables["contextualization"].query("model == @model and pair == 'inter'")
        inter = cosines.pivot(index="example", columns="state", values="value").to_numpy()
        expected = [model, str(DEPTHS[model]), "5"]
        for measure in ("precision", "recall"):
            own, other = words_of(study, model, measure), words_of(study, model, measure, "other")
            best = int(own.mean(0).argmax())
            expected += [with_interval(own, best, f" ({best})"), f"{own.mean(0)[0]:.2f}", with_interval(other, best)]
            if measure == "precision":
                expected += [with_interval(words_of(study, model, "word_share"), best)]
        for state in (int(inter.mean(0).argmin()), int(inter.mean(0).argmax())):
            expected += [with_interval(inter, state, f" ({state})")]
        assert row[: len(expected)] == expected
    best = [int(words_of(study, model, "precision").mean(0).argmax()) for model in DEPTHS]
    assert best != [int(words_of(study, model, "recall").mean(0).argmax()) for model in DEPTHS], (
        "else nothing is tested"
    )


def test_each_figure_stands_under_its_own_title(page):
    for name, title in FIGURE_TITLES.items():
        part = page.split(f". {title}</h2>")[1].split("</figure>")[0]
        source = re.search(r'src="data:image/svg\+xml;base64,([^"]*)"', part)
        assert source is not None
        assert base64.b64decode(source[1]).decode() == f'<svg width="321.6pt">the figure {name}'
        assert f"<figcaption>caption of {name}</figcaption>" in part
        assert 'style="width: max(322px, min(100%, 429px))"' in part, "type of 9 points is 9 pixels high"
        links = re.findall(r'href="([^"]*)"', page.split(f". {title}</h2>")[1].split("<h")[0])
        assert links == [f"figures/{name}.{suffix}" for suffix in ("png", "png", "svg", "pdf")]


def test_each_figure_stands_under_what_it_found(study, page):
    """Its sentence holds the tables' numbers; n, controls, intervals and seed stand beneath."""
    told = {
        name: unescape(re.search(f'<h2 id="{name}">.*?<p class="finding">(.*?)</p>', page, re.S)[1])
        for name in FIGURE_TITLES
        if name != "answers"
    }
    for model in DEPTHS:
        own, other = words_of(study, model, "precision"), words_of(study, model, "precision", "other")
        best = int(own.mean(0).argmax())
        words = told["lens"].split(f"{model}: ")[1].split(";")[0]
        assert words.startswith(f"at state {best} of {DEPTHS[model]}, {in_brackets(own, best)} of the words")
        assert words.rstrip(".").endswith(f"and {in_brackets(other, best)} in another image's")
        cosines = study.tables["contextualization"].query("model == @model and pair == 'inter'")
        inter = cosines.pivot(index="example", columns="state", values="value").to_numpy()
        low, high = int(inter.mean(0).argmin()), int(inter.mean(0).argmax())
        alike = told["contextualization"].split(f"{model}: ")[1].split(";")[0]
        assert f"least alike at state {low} (mean cosine {in_brackets(inter, low)})" in alike
        assert f"most at state {high} ({in_brackets(inter, high)})" in alike
        shares = {}
        for measure in ("norm", "weight"):
            rows = study.tables["attention_share"].query(
                "model == @model and dest == 'last_text' and measure == @measure"
            )
            shares[measure] = rows.pivot(index="example", columns="layer", values="value").to_numpy()
        layer = int(shares["norm"].mean(0).argmax())
        read = told["norm_attention"].split(f"{model}: ")[1].split(";")[0]
        norm, weight = (in_brackets(shares[measure], layer) for measure in ("norm", "weight"))
        assert f"at layer {layer}: {norm} of its norms, and {weight} of its raw weights" in read
        phases, shows = study.phases[model], told["phases"].split(f"{model}: ")[1].split(";")[0]
        assert ("does not show" in shows) != phases.shows_pattern
        right = pair_scores(pair_values(model)[4, -1])[0]
        text = told["pairs"].split(f"{model}: ")[1].split(";")[0]
        assert text.startswith(f"{100 * right.double().mean():.1f} % [")
    for name in FIGURE_TITLES:
        rows = re.search(f'<h2 id="{name}">.*?<dl class="facts">(.*?)</dl>', page, re.S)[1]
        facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", rows))
        of_pairs = ", ".join(f"{model} {len(pair_values(model)[0, 0])} pairs" for model in DEPTHS)
        assert facts["n"] == (of_pairs if name == "pairs" else "deep 5, other 5")
        assert facts["seed"] == str(SEED)
        assert re.match(
            r"95 % bootstrap of the mean, [\d,]+ resamples of the " + ("pairs" if name == "pairs" else "examples"),
            facts["intervals"],
        )
        assert facts["controls"]


def test_the_contents_lead_to_every_section(page):
    contents = re.findall(r'<li><a href="#(\w+)">', page.split("<nav")[1].split("</nav>")[0])
    assert contents == re.findall(r'<h2 id="(\w+)"', page)
    assert contents == ["findings", *FIGURE_TITLES, "examples", "run"]


def test_phases_are_told_with_their_intervals(study, page):
    part = page.split("The four-phase diagram</h2>")[1].split("<h2")[0]
    for model in DEPTHS:
        phases = study.phases[model]
        table = rows_of(part.split(f"<h3>{model}</h3>")[1].split("</table>")[0])[1:]
        for i, row in enumerate(table):
            first, last = phases.intervals[i]
            assert row[:4] == [phases.labels[i] or "not named", phases.directions[i], str(first), str(last)]
            ends = phases.boundary_intervals[i] if i < len(phases.boundaries) else None
            assert row[4] == (f"{ends[0]:.0f} to {ends[1]:.0f}" if ends else "–")
            for cell, curve in zip(row[5:], ("inter", "image", "text"), strict=True):
                value, low, high = phases.changes[curve][i]
                assert cell == f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def test_each_card_holds_its_own_answers_words_and_pictures(study, page):
    cards = page.split('<div class="card">')[1:]
    assert len(cards) == 2
    for i, card in enumerate(cards):
        readings = re.split(r"<div><a href=", card.split("<h2")[0])
        assert f"caption {i}" in readings[0]
        for reading, (model, n_layers) in zip(readings[1:], DEPTHS.items(), strict=True):
            assert f"<b>{model}</b>: answer of {model} to {i}<" in reading
            words = re.findall(r"<dt>state (\d+)</dt><dd>(.*?)</dd>", reading)
            states = (0, n_layers // 2, n_layers)
            assert words == [(str(state), f"{model}{i}at{state}") for state in states]
            assert reading.count(f'"views/{model}-e00{i}.html"') == 2
            assert f"What “token{i}” reads at layer {i}" in reading
            assert f">Patch view of e00{i}, “Describe the scene.”, {model}</a>" in reading


def test_pairs_have_their_scores_and_intervals_with_the_studys_seed(study, page):
    table, other_seed = rows_of(page.split("Winoground’s pairs</h2>")[1].split("</table>")[0]), []
    for model, row in zip(DEPTHS, table[1:], strict=True):
        logprob = pair_values(model)[4, -1]
        expected = [model, str(len(logprob))]
        for right in pair_scores(logprob):
            mean, low, high = (x.item() for x in mean_interval(100 * right.double(), seed=SEED))
            expected.append(f"{mean:.1f} {low:.1f} to {high:.1f}")
            other_seed.append((low, high) != tuple(x.item() for x in mean_interval(100 * right.double())[1:]))
        own = (logprob[:, 0, 0] + logprob[:, 1, 1]) / 2
        other = (logprob[:, 1, 0] + logprob[:, 0, 1]) / 2
        mean, low, high = (x.item() for x in mean_interval(own - other, seed=SEED))
        assert row == [*expected, f"{mean:+.2f} {low:+.2f} to {high:+.2f}"]
    assert any(other_seed), "else nothing is tested"


def test_the_terminal_holds_the_same_numbers(study, capsys):
    print_summary(study)
    lines = capsys.readouterr().out.split("\n")
    for model in DEPTHS:
        first = next(i for i, line in enumerate(lines) if line.split()[:1] == [model])
        numbers, ends = lines[first].split(), " ".join(lines[first + 1].split())
        expected, intervals = [model, str(DEPTHS[model]), "5"], []
        for measure in ("precision", "recall"):
            own, other = words_of(study, model, measure), words_of(study, model, measure, "other")
            best = int(own.mean(0).argmax())
            expected += [f"{own.mean(0)[best]:.2f}", f"({best})", f"{own.mean(0)[0]:.2f}", f"{other.mean(0)[best]:.2f}"]
            intervals.append(with_interval(own, best).split(" ", 1)[1])
            if measure == "precision":
                share = words_of(study, model, "word_share")
                expected.append(f"{share.mean(0)[best]:.2f}")
                intervals.append(with_interval(share, best).split(" ", 1)[1])
        assert numbers[: len(expected)] == expected
        assert ends.startswith(" ".join(intervals))
    assert any(line.startswith("Winoground's scores, deep: text ") for line in lines)


def test_in_80_columns_the_terminal_holds_the_same_numbers(study, capsys, monkeypatch):
    """In tables one after the other, none of which is cut; the sentences are not part of them."""

    def numbers(text: str) -> list[str]:
        return sorted(re.findall(r"\d+\.\d\d", text.split("Beneath each mean")[0]))

    print_summary(study)
    wide = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    print_summary(study)
    narrow = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert numbers(narrow) == numbers(wide) != []
    tables = narrow.split("Beneath each mean")[0]
    assert "…" not in tables
    assert max(map(len, tables.split("\n"))) <= 80
    assert [line.strip() for line in tables.split("\n") if line.startswith(("Words", "Inter"))] == [
        "Words on visual tokens: precision", "Words on visual tokens: recall", "Inter-modal cosine and phases",
    ]  # fmt: skip
