"""Tutorials: they run, and their committed outputs are small and name no machine."""

import base64
import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
BY_NAME = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)

spec = importlib.util.spec_from_file_location("run_tutorials", ROOT / "scripts" / "run_tutorials.py")
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook) -> list[str]:
    """The printed text of each cell, without rounding errors such as 2.9e-06."""
    text = ["".join(o.text for o in c.get("outputs", []) if o.output_type == "stream") for c in notebook.cells]
    return [re.sub(r"\d\.?\d*e[-+]\d+", "", t) for t in text]


def test_there_are_eight():
    assert [path.stem[0] for path in TUTORIALS] == list("12345678")


@pytest.mark.tutorial
@BY_NAME
def test_it_runs(path):
    """No cell fails, and each prints the committed text up to rounding: the prose quotes it."""
    committed = nbformat.read(path, as_version=4)
    ran = script.run(path)
    assert any("<iframe " in o.get("data", {}).get("text/html", "") for o in outputs(ran)) == (
        "mv.view." in path.read_text()
    )
    script.tidy(ran)
    for before, now in zip(printed(committed), printed(ran), strict=True):
        assert words(now) == words(before)
        assert numbers(now) == pytest.approx(numbers(before), rel=0.1, abs=0.06)


@pytest.mark.ndif
def test_the_ndif_tutorial_runs_on_a_server(server, tmp_path):
    """The notebook is committed with REMOTE = "local". On a server it prints the same."""
    committed = nbformat.read(ROOT / "tutorials" / "7_local_and_ndif.ipynb", as_version=4)
    (tmp_path / "remote.ipynb").write_text(nbformat.writes(committed).replace('REMOTE = \\"local\\"', "REMOTE = True"))
    ran = script.run(tmp_path / "remote.ipynb")
    script.tidy(ran)
    assert "REMOTE = True" in ran.cells[1].source
    assert "False" not in "".join(printed(ran))
    assert printed(ran) == printed(committed)


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]


@BY_NAME
def test_its_outputs_are_small_and_name_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000
    assert notebook.metadata == script.METADATA
    assert [cell.id for cell in notebook.cells] == [f"cell-{n:02d}" for n in range(len(notebook.cells))]
    assert not any(cell.metadata for cell in notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run from the first to the last"
    pictures = 0
    for output in outputs(notebook):
        assert output.output_type != "error"
        if output.output_type == "stream":
            assert output.name == "stdout"
            assert len(output.text) < 5000
        else:
            assert set(output.data) <= {"text/plain", "image/png"}
            pictures += "image/png" in output.data
            assert len(base64.b64decode(output.data.get("image/png", ""))) < 120_000
    assert 1 <= pictures <= 2
    for place in ("/home/", "/root/", "/tmp/", "/usr/", "/Users/", "\\Users\\", "site-packages", str(ROOT)):
        assert place not in json.dumps(notebook), place


@BY_NAME
def test_it_says_what_changes_for_a_large_model(path):
    line = 'mv.load("llava-hf/llava-1.5-7b-hf", device="cuda", dtype="bfloat16")'
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert sum(cell.count(line) for cell in cells) == 1


def test_a_view_is_committed_as_its_preview():
    """Views become pictures. Progress bars, stderr and metadata are dropped."""
    png = "aGVsbG8="
    view = f'<div><img alt="a" src="data:image/png;base64,{png}"><iframe srcdoc="&lt;script&gt;"></iframe></div>'
    new = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell("view", metadata={"execution": {"shell.execute_reply": "now"}})
    cell.outputs = [
        new("stream", name="stdout", text="one\n"),
        new("stream", name="stderr", text="Loading /home/me\n"),
        new("stream", name="stdout", text="two\n"),
        new("display_data", data={"text/html": "<pre>bar</pre>", "text/plain": "bar"}),
        new("execute_result", data={"text/html": view, "text/plain": "View(...)"}, execution_count=1),
        new("execute_result", data={"text/plain": "VLM(...)"}, execution_count=1),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "3"}})
    script.tidy(notebook)
    text, picture, value = notebook.cells[0].outputs
    assert text.text == "one\ntwo\n"
    assert picture.data == {"image/png": png}
    assert value.data == {"text/plain": "VLM(...)"}
    assert notebook.cells[0].metadata == {}
    assert notebook.metadata == script.METADATA
