"""On a real NDIF server: the paper's study and the commands."""

import json
import time
from functools import partial

import nnsight
import pandas as pd
import pytest

from helpers.cut_line import Line
from helpers.ndif import TOLERANCE
from mechvlm.cli import main
from mechvlm.datasets.scenes import scenes
from mechvlm.errors import StoppedError
from mechvlm.ndif import connection
from mechvlm.ndif.requests import Request
from mechvlm.study import run
from mechvlm.study.running import settings

pytestmark = pytest.mark.ndif


def test_a_study_of_twenty(pair, traffic):
    """Equals the local study.

    Takes one request a batch, one for the gallery's answers, and one that asks for the dtype.
    """
    there, here = (run([vlm], n=20, batch_size=8, seed=3) for vlm in (pair.there, pair.here))
    assert traffic.requests <= 3 + 3 * 3 + 1 + 1  # batches, controls, answers, the dtype
    for name, table in here.tables.items():
        pd.testing.assert_frame_equal(there.tables[name], table, atol=TOLERANCE, rtol=1e-5, obj=name)
    assert there.tables["contextualization"]["example"].nunique() == 20
    assert there.dataset == here.dataset
    # The words of all positions at every layer are by far the largest part.
    assert max(traffic.received) < 600_000


def test_a_study_of_answers(pair, traffic):
    """Each batch takes two requests: one writes the answers, one reads prompt and answer."""
    there, here = (run([vlm], n=10, batch_size=8, seed=4, answers=True) for vlm in (pair.there, pair.here))
    assert traffic.requests <= 2 * 2 + 3 * 2 + 1 + 1
    assert {"answer_tokens", "answer_attention", "answer_lens"} <= set(here.tables)
    for name, table in here.tables.items():
        assert len(table), name
        pd.testing.assert_frame_equal(there.tables[name], table, atol=TOLERANCE, rtol=1e-5, obj=name)


def run_cli(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_the_command(server, traffic, tmp_path, monkeypatch, capfd):
    """`mechvlm study --remote` writes the same as `mechvlm study`, and never the key."""
    key = "3f2b8a10-5a1e-4c56-9b7d-0c0ffee0beef"
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", key)
    arguments = ("study", "--model", "tiny-instructblip", "--n", 20, "--batch-size", 8)
    assert run_cli(*arguments, "--remote", "--out", tmp_path / "there") == 0
    assert traffic.requests == 3 + 3 * 3 + 1 + 6 + 1  # with patch views
    assert run_cli(*arguments, "--out", tmp_path / "here") == 0
    tables = sorted(p.name for p in (tmp_path / "here" / "data").glob("*.parquet"))
    assert len(tables) > 4
    for name in tables:
        there, here = (pd.read_parquet(tmp_path / place / "data" / name) for place in ("there", "here"))
        pd.testing.assert_frame_equal(there, here, atol=TOLERANCE, rtol=1e-5, obj=name)
    about = json.loads((tmp_path / "there" / "run.json").read_text())["models"]["tiny-instructblip"]
    assert (about["device"], about["dtype"]) == ("ndif", "float32")
    for file in (tmp_path / "there").rglob("*"):
        assert file.is_dir() or key.encode() not in file.read_bytes(), file
    written = capfd.readouterr()
    assert key not in written.out + written.err


def test_a_study_goes_on_over_a_connection_that_is_lost(server, traffic, monkeypatch, tmp_path):
    """A lost batch is read again. A longer cut stops the study, and the same command goes on."""
    line = Line(server)
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", line.address)
    monkeypatch.setattr(connection, "RETRY_WAITS", (0.2,))
    post, sent = Request._post, []

    def cutting(self, *args):
        sent.append(1)
        if len(sent) == 2:
            line.cut()  # once: the second batch's answer is lost
        if len(sent) == 5:
            line.cut(seconds=4.0)  # the fourth batch, for longer than the study waits
        return post(self, *args)

    monkeypatch.setattr(Request, "_post", cutting)
    study = partial(
        run, ["tiny-llava"], n=20, batch_size=4, prompt="Describe the scene.", out=tmp_path / "there", remote=True
    )
    monkeypatch.setattr(settings, "EXAMPLES_PER_SHARD", 4)
    with pytest.raises(StoppedError, match=r"was lost|No NDIF answers") as caught:
        study()
    assert "the same command goes on" in str(caught.value)
    before = traffic.requests
    time.sleep(4.0)
    there = study()
    assert traffic.requests - before == 2 + 3 * 5 + 2 + 6 + 1  # three of five batches were done
    here = run(["tiny-llava"], n=20, batch_size=4)
    for name, table in here.tables.items():
        pd.testing.assert_frame_equal(there.tables[name], table, atol=TOLERANCE, rtol=1e-5, obj=name)


def test_a_view(server, traffic, tmp_path):
    image = tmp_path / "scene.png"
    next(scenes(1)).image.save(image)
    for options in (["--remote"], []):
        out = tmp_path / f"view{len(options)}.html"
        assert run_cli("view", "tiny-llava", image, "--prompt", "What color is it?", *options, "--out", out) == 0
    assert traffic.requests == 2  # one writes the answer, one reads it
    there, here = ((tmp_path / f"view{n}.html").stat().st_size for n in (1, 0))
    assert abs(there - here) < 0.01 * here


def test_a_command_that_finds_no_server(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(connection, "RETRY_WAITS", (0.01,))
    image = tmp_path / "scene.png"
    next(scenes(1)).image.save(image)
    assert run_cli("view", "tiny-llava", image, "--prompt", "What?", "--remote", "--out", tmp_path / "view.html") == 1
    assert "Error: No NDIF answers at http://127.0.0.1:9" in capfd.readouterr().err
    assert run_cli("study", "--model", "tiny-llava", "--n", 3, "--remote", "--out", tmp_path / "study") == 3
    assert "the same command goes on from there" in capfd.readouterr().err
