"""The progress bar in a terminal, in a notebook, and for a study; and the pace that it shows."""

import importlib.util
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


@pytest.mark.skipif(importlib.util.find_spec("ipywidgets") is not None, reason="with ipywidgets the bar is drawn")
def test_a_notebook_that_cannot_draw_it_is_left_clean():
    code = "from mechvlm.progress import track; print(list(track([1, 2], 'numbers')))"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120).execute()
    (output,) = notebook.cells[0].outputs
    assert output.text == "[1, 2]\n"


@pytest.mark.parametrize(
    ("done", "left", "seconds", "text"),
    [
        (0, 9, 3.0, ""), (50, 100, 10.0, "5.0/s, 20 s left"), (50, 6000, 10.0, "5.0/s, 20 min left"),
        (3, 100, 600.0, "200.0 s each, 5.6 h left"), (7, 0, 2.0, "3.5/s"),
    ],
)  # fmt: skip
def test_the_pace_and_the_time_left(done, left, seconds, text):
    assert pace(done, left, seconds) == text


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
