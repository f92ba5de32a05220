"""The progress bar, where it can be drawn and where it cannot."""

import importlib.util

import nbclient
import nbformat
import pytest

from mechvlm.progress import track


def test_it_gives_the_items():
    assert list(track([3, 1, 2], "numbers")) == [3, 1, 2]
    assert list(track([], "nothing")) == []


@pytest.mark.skipif(importlib.util.find_spec("ipywidgets") is not None, reason="with ipywidgets the bar is drawn")
def test_a_notebook_that_cannot_draw_it_is_left_clean():
    code = "from mechvlm.progress import track; print(list(track([1, 2], 'numbers')))"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120).execute()
    (output,) = notebook.cells[0].outputs
    assert output.text == "[1, 2]\n"
