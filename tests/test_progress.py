"""The progress bar in a terminal, in a notebook, and for a study; and the pace that it shows."""

import io
import time

import nbclient
import nbformat
import pytest
from rich.console import Console

from mechvlm import progress
from mechvlm.progress import StudyBar, pace, track


def test_track_yields_the_items():
    assert list(track([3, 1, 2], "numbers")) == [3, 1, 2]
    assert list(track([], "nothing")) == []


@pytest.mark.parametrize(("n", "terminal", "shown"), [(3, True, True), (1, True, False), (3, False, False)])
def test_the_bar_shows_only_in_a_terminal_and_for_several_items(n, terminal, shown, monkeypatch, capsys):
    monkeypatch.setattr(progress, "STDERR", Console(force_terminal=terminal, stderr=True))
    assert list(track(range(n), "examples [of 3]")) == list(range(n))
    out, err = capsys.readouterr()
    assert out == ""
    assert ("examples [of 3]" in err) is shown
    assert bool(err) is shown, "nothing is written without a bar"


CELLS = """
import time
from mechvlm.progress import StatusLine, study_stages, track
print(list(track([1, 2], "quick")))
---
for _ in track(range(3), "slow <steps>"): time.sleep(0.4)
---
for i in track(range(3), "broken"): time.sleep(0.6 / (1 - i))
---
with study_stages() as show:
    show("settings", 0, 0)
    for done in range(5): show("tiny: reading", done, 8); time.sleep(0.3)
    for done in range(4, 9): show("other: reading", done, 8); time.sleep(0.3)
    show("report", 0, 0)
    time.sleep(1)
---
with StatusLine("waiting") as line:
    line.update("still waiting")
    time.sleep(1)
---
import mechvlm as mv
print(mv.load("tiny-llava").name)
"""


def test_a_notebook_shows_bars_without_ipywidgets():
    """In its outputs, as they are saved: what was quick is silent, and what ended says so."""
    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS.split("---")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=120, allow_errors=True).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert {out.get("name") for cell in outputs for out in cell if out.output_type == "stream"} == {"stdout"}
    assert [out.text for out in outputs[-1] if out.output_type == "stream"] == ["tiny-llava\n"], (
        "tqdm's warning and transformers' bar would be red"
    )
    quick, slow, broken, study, waiting, _ = ([out.data for out in cell if "data" in out] for cell in outputs)
    assert quick == []
    assert [out["text/plain"] for out in slow] == ["slow <steps> · 3 of 3 · done, 1 s"]
    assert '<progress value="3" max="3">' in slow[0]["text/html"]
    assert "slow &lt;steps&gt;" in slow[0]["text/html"]
    assert [out["text/plain"].split(" · ")[0] for out in broken] == ["broken"]
    assert "stopped" in broken[0]["text/plain"]
    assert [out["text/plain"].split(", ")[0] for out in study] == [
        "tiny: reading · done", "other: reading · 8 of 8 · done", "report · done",
    ], "a stage that takes long is shown though it says nothing; one of several models' is not said to be all"  # fmt: skip
    assert '<progress value="1" max="1">' in study[0]["text/html"], "what is done looks done"
    assert [out["text/plain"].split(",")[0] for out in waiting] == ["still waiting · done"]


@pytest.mark.parametrize(
    ("done", "left", "seconds", "text"),
    [
        (0, 9, 3.0, ""), (50, 100, 10.0, "5.0/s, 20 s left"), (50, 6000, 10.0, "5.0/s, 20 min left"),
        (3, 100, 600.0, "200.0 s each, 5.6 h left"), (7, 0, 2.0, "3.5/s"),
    ],
)  # fmt: skip
def test_the_pace_and_the_time_left(done, left, seconds, text):
    assert pace(done, left, seconds) == text


@pytest.mark.parametrize("width", [80, 120])
def test_a_studys_bar_folds_names_and_keeps_its_numbers(width, monkeypatch):
    console = Console(force_terminal=True, width=width, file=io.StringIO(), color_system=None)
    monkeypatch.setattr(progress, "STDERR", console)
    bar = StudyBar()
    bar.show("some-owner/some-model-of-7b: answers, views, controls", 0, 0)
    bar.show("some-owner/some-model-of-7b: reading", 1600, 2000)
    bar.tasks[-1].fields["pace"] = "11.3 s each, 23 min left"
    console.print(bar.get_renderable())
    lines = console.file.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    (line,) = (line for line in lines if "1600/2000 0:00:00 11.3 s each, 23 min left" in line)
    assert "\u2501" * 6 in line, "and a bar"


def test_a_studys_pace_covers_all_models_and_only_this_run(monkeypatch):
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    bar = StudyBar()
    bar.show("a: reading", 80, 200)  # 80 by an earlier run
    clock = 10.0
    bar.show("a: reading", 100, 200)
    assert bar.tasks[-1].completed == 100
    assert bar.tasks[-1].fields["pace"] == "2.0/s, 50 s left"
    clock = 300.0
    bar.show("b: loading", 0, 0)
    clock = 500.0
    bar.show("b: reading", 100, 200)
    clock = 520.0
    bar.show("b: reading", 140, 200)
    assert bar.tasks[-1].fields["pace"] == "2.0/s, 30 s left", "of both models; loading does not count"
    bar.finish()
