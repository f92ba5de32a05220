"""The study on Winoground: pairs are measured as by `mechvlm.winoground`, up to the report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mechvlm as mv
from helpers.datasets import winoground, write_winoground
from helpers.models import llava
from helpers.seals import seal_study
from mechvlm.datasets import load_dataset, pairs_of
from mechvlm.errors import InputError
from mechvlm.study import run
from mechvlm.study.report.pairs import pair_lines, pair_results, pair_summary
from mechvlm.study.running import atomic, settings, shards

pytestmark = pytest.mark.long

PROMPT = "what is this"
PAIRS = 5
OPTIONS = {"prompt": PROMPT, "batch_size": 8, "seed": 3}  # two pairs a forward
TESTS = Path(__file__).parents[1]
PAIR_TABLES = {"pair_scores", "pairs"}


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return mv.load(*llava(layers=2))


@pytest.fixture(autouse=True, scope="module")
def small():
    """Shards of one batch each, three of them of pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "EXAMPLES_PER_SHARD", 8)
        patch.setattr(settings, "PAIRS_PER_SHARD", 2)
        patch.setattr(shards, "GALLERY_EXAMPLES", 1)
        patch.setattr("mechvlm.study.running.merge.GALLERY_EXAMPLES", 1)
        yield


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    entries = winoground(PAIRS)
    del entries[1]["tag"]
    return f"winoground:{write_winoground(tmp_path_factory.mktemp('data') / 'w', entries)}"


@pytest.fixture(scope="module")
def study(vlm, spec, tmp_path_factory):
    return run([vlm], spec, out=tmp_path_factory.mktemp("study") / "out", **OPTIONS)


@pytest.fixture(scope="module")
def direct(vlm, spec):
    return mv.winoground(vlm, pairs_of(load_dataset(spec, seed=3).examples), PROMPT, batch_size=8)


def tables(out) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "data").glob("*.parquet"))}


def test_the_tables_are_what_winoground_gives(study, direct):
    assert set(study.tables) >= PAIR_TABLES
    expected = direct.to_frame()
    table = study.tables["pairs"]
    assert list(table) == ["model", *expected]
    assert set(table["model"]) == {direct.model}
    keys = list(expected)[:-1]
    rows, expected = (frame.sort_values(keys, ignore_index=True) for frame in (table[list(expected)], expected))
    pd.testing.assert_frame_equal(rows, expected, check_dtype=False, check_exact=True)
    scores = study.tables["pair_scores"]
    assert tuple(scores["pair"]) == direct.pairs
    for name, right in direct.scores._asdict().items():
        assert scores[name].tolist() == right.tolist()
    tags = scores.set_index("pair")["tag"]
    assert pd.isna(tags["1"])
    assert set(tags.drop("1")) == {"Object"}


@pytest.mark.parametrize("opened", [False, True])
def test_the_result_is_read_back_whole(study, direct, opened):
    result = pair_results(mv.Study.open(study.out) if opened else study)[direct.model]
    assert torch.equal(result.values.nan_to_num(9), direct.values.nan_to_num(9))
    assert (result.pairs, result.set_aside, result.prompt) == (direct.pairs, (), PROMPT)


def test_summary_lines_and_report(study, direct):
    expected = direct.scores.to_frame(seed=3)
    pd.testing.assert_frame_equal(pair_summary(study).drop(columns="model"), expected)
    (line,) = pair_lines(study)
    first = expected.iloc[0]
    assert f"text {first['percent']:.1f} % [{first['low']:.1f}, {first['high']:.1f}]" in line
    assert line.endswith("n = 5 pairs, chance 25.0, 25.0, 16.7 %")
    page = (study.out / "report.html").read_text()
    _, _, section = page.partition("5. Winoground’s pairs")
    assert section
    for row in expected.itertuples():
        assert f"{row.score} score, % (chance {row.chance:.1f})" in section
        assert f"<b>{row.percent:.1f}</b>" in section
    likelihood = direct.difference.mean[direct.measures.index("log-likelihood"), -1].item()
    assert f"{likelihood:+.2f}" in section
    record = json.loads((study.out / "run.json").read_text())
    assert (record["dataset"]["pairs"], record["dataset"]["half_pairs"]) == (5, 0)
    caption = record["figures"]["pairs"]
    assert "n = 5 (0 set aside)" in caption
    assert "seed 3" in caption
    assert {p.name for p in (study.out / "figures").glob("pairs.*")} == {"pairs.png", "pairs.svg", "pairs.pdf"}


def test_the_figure_shows_matched_less_mismatched(study, direct):
    captioned = mv.Study.open(study.out).plot("pairs")
    titles = [ax.get_title(loc="left").split("\n")[-1] for ax in captioned.figure.axes]
    panel = captioned.figure.axes[titles.index("cosine of image and caption")]
    matched, mismatched = direct.by_condition[:, direct.measures.index("contextualization")]
    expected = (matched - mismatched).mean((-1, -2)).numpy()
    assert np.abs(expected).max() > 1e-4
    assert panel.get_lines()[-1].get_ydata() == pytest.approx(expected, abs=1e-6)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", range(1, 7))
def test_interrupted_at_any_folder_it_comes_to_the_same(vlm, spec, study, tmp_path, monkeypatch, undrawn, at):
    """Stopped before a folder has its name: two shards of examples, three of pairs, the gallery."""
    begun, write = [], atomic.write_folder

    def stops(folder, *rest):
        begun.append(folder.name)
        if len(begun) == at:
            (folder.parent / f".{folder.name}-half.tmp").mkdir()
            raise Stop
        write(folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_folder", stops)
        with pytest.raises(Stop):
            run([vlm], spec, out=tmp_path / "out", **OPTIONS)
    written = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "shards").iterdir() if p.suffix != ".tmp"}
    assert sorted(written) == sorted(begun[: at - 1])
    again = []
    monkeypatch.setattr(shards, "write_folder", lambda folder, *rest: (again.append(folder.name), write(folder, *rest)))
    run([vlm], spec, out=tmp_path / "out", **OPTIONS)
    assert not set(written) & set(again), "what was done is not done again"
    names = ["0-00000", "0-00001", *(f"0-pairs-{i:05}" for i in range(3)), "0-gallery"]
    assert [*begun[: at - 1], *again] == names
    assert tables(tmp_path / "out") == tables(study.out)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in study.out.iterdir()}


@pytest.mark.kills
def test_killed_again_and_again_it_comes_to_the_same(tmp_path):
    """helpers/killed.py with sides of pairs, one pair in a shard.

    SIGKILL comes at random times and at random steps on the disk.
    """
    code = (
        "import json, sys; from pathlib import Path; from helpers import killed; from mechvlm.datasets import Example; "
        "killed.settings.PAIRS_PER_SHARD = 1; killed.Example = lambda id, *rest: "
        "Example(id, *rest, {'pair': str(int(id[1:]) // 2), 'side': int(id[1:]) % 2}); "
        "print(json.dumps(killed.main(6, 5, Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=TESTS.parent, env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] >= 6
    assert (tmp_path / "whole" / "data" / "pairs.parquet").is_file()


def test_progress_counts_the_pairs_sides_once_more(vlm, spec, tmp_path):
    counts = []
    run(
        [vlm],
        spec,
        progress=lambda stage, done, total: counts.append((done, total)) if "reading" in stage else 0,
        **OPTIONS,
    )
    assert {total for _, total in counts} == {2 * PAIRS + 2 * PAIRS}
    assert [done for done, _ in counts] == sorted(done for done, _ in counts)
    assert counts[-1][0] == 4 * PAIRS


def test_a_pair_of_which_one_side_was_drawn_is_left_out_and_counted(vlm, spec, tmp_path, undrawn):
    study = run([vlm], spec, n=5, out=tmp_path / "out", **OPTIONS)
    assert study.tables["pair_scores"]["pair"].nunique() == 2
    assert (study.dataset["pairs"], study.dataset["half_pairs"], study.dataset["usable"]) == (2, 1, 2 * PAIRS)
    assert "Left out: 1 of which only one side" in mv.Study.open(study.out).plot("pairs").caption


def test_no_pair_drawn_whole(vlm, spec, tmp_path, undrawn):
    study = run([vlm], spec, n=1, out=tmp_path / "out", **OPTIONS)
    assert not PAIR_TABLES & set(study.tables)
    assert (study.dataset["pairs"], study.dataset["half_pairs"]) == (0, 1)
    assert "only one side was drawn" in (tmp_path / "out" / "report.html").read_text()
    assert pair_lines(mv.Study.open(tmp_path / "out")) == []


def test_a_pair_that_cannot_be_read_is_set_aside(vlm, direct, tmp_path, undrawn):
    folder = write_winoground(tmp_path / "w", winoground(PAIRS))
    (folder / "images" / "ex_2_img_1.png").write_bytes(b"no image")
    study = run([vlm], f"winoground:{folder}", out=tmp_path / "out", **OPTIONS)
    opened = mv.Study.open(study.out)
    result = pair_results(opened)[direct.model]
    assert sorted(result.pairs) == ["0", "1", "3", "4"]
    ((pair, reason),) = result.set_aside
    assert pair == "2"
    assert "ex_2_img_1.png" in reason
    assert "n = 4 (1 set aside)" in opened.plot("pairs").caption
    # The other pairs have the same values, up to the last bits: their batches differ.
    for i, name in enumerate(result.pairs):
        whole = direct.values[:, :, direct.pairs.index(name)]
        torch.testing.assert_close(result.values[:, :, i], whole, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_pairs_of_which_none_can_be_read(vlm, tmp_path, undrawn):
    folder = write_winoground(tmp_path / "w", winoground(2))
    for i in range(2):
        (folder / "images" / f"ex_{i}_img_1.png").write_bytes(b"no image")
    study = run([vlm], f"winoground:{folder}", out=tmp_path / "out", **OPTIONS)
    assert [len(study.tables[name]) for name in sorted(PAIR_TABLES)] == [0, 0]
    assert "n = 0 (2 set aside)" in (tmp_path / "out" / "report.html").read_text()
    opened = mv.Study.open(tmp_path / "out")
    assert pair_lines(opened) == []
    with pytest.raises(InputError, match="There is no figure 'pairs'"):
        opened.plot("pairs")


def test_pairs_without_room_are_halved_and_that_is_recorded(vlm, spec, direct, monkeypatch):
    read = shards.read_pairs

    def limited(vlm, pairs, prompt):
        if len(pairs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(vlm, pairs, prompt)

    monkeypatch.setattr(shards, "read_pairs", limited)
    study = run([vlm], spec, **OPTIONS)
    result = pair_results(study)[direct.model]
    assert result.pairs == direct.pairs
    torch.testing.assert_close(result.values, direct.values, atol=1e-4, rtol=1e-4, equal_nan=True)
    firsts = [{"first": direct.pairs[i], "pairs": 2} for i in (0, 2)]
    assert study.models[direct.model]["halved"] == firsts


def test_other_data_have_none_of_it(vlm, tmp_path, undrawn):
    study = run([vlm], "scenes", n=2, out=tmp_path / "out", **OPTIONS)
    assert not PAIR_TABLES & set(study.tables)
    assert not [p for p in (tmp_path / "out").rglob("*pair*")]
    assert set(study.dataset) == {"name", "n", "fingerprint"}
    assert "pairs_set_aside" not in next(iter(study.models.values()))
    assert "Winoground" not in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(InputError, match="There is no figure 'pairs'"):
        study.plot("pairs")


@pytest.mark.parametrize("name", sorted(PAIR_TABLES))
def test_a_table_that_is_missing_or_damaged_is_named(study, tmp_path, name):
    out = shutil.copytree(study.out, tmp_path / "out")
    file = out / "data" / f"{name}.parquet"
    pd.read_parquet(file).drop(columns="pair").to_parquet(file)
    seal_study(out)
    with pytest.raises(InputError, match=f"{name}.parquet .*lacks the columns pair"):
        mv.Study.open(out)
    file.unlink()
    with pytest.raises(InputError, match=f"{name}.parquet is missing"):
        mv.Study.open(out)
    seal_study(out)
    with pytest.raises(InputError, match=f"not whole: data/{name}.parquet is missing"):
        mv.Study.open(out)
