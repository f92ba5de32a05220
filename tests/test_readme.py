"""The README's example runs as it stands, and its file tree is the package's."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.long
def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves a figure
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    file = tmp_path / "example.py"  # nnsight reads a trace's source from its file
    file.write_text(code)
    names: dict = {}
    exec(compile(code, str(file), "exec"), names)
    assert (tmp_path / "lens.png").stat().st_size > 10_000
    assert (tmp_path / "patches.html").stat().st_size > 50_000
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    assert (tmp_path / "phases.png").stat().st_size > 10_000
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    assert names["curves"]["n"].eq(8).all()
    vlm, inputs = names["vlm"], names["inputs"]
    assert names["changed"].shape == (1, len(inputs[0].tokens), vlm.d_vocab)
    assert names["flow"].p_knocked.shape == (4, vlm.n_layers, 40)
    inputs = vlm.inputs(names["image"], "Describe the scene.")
    assert names["resid"].shape == (1, len(inputs.tokens), vlm.d_model)
    assert names["weights"].shape == (1, vlm.n_heads, 1, len(inputs.tokens))
    assert names["lens"].ids.shape == (vlm.n_layers + 1, len(inputs.tokens.image), 5)


@pytest.mark.ndif
def test_the_example_on_NDIF_runs(server, tmp_path):
    """Its block has an info string of its own: it needs a server."""
    (code,) = re.findall(r"```python ndif\n(.*?)```", README, re.S)
    file = tmp_path / "example.py"
    file.write_text(code)
    names: dict = {}
    exec(compile(code, str(file), "exec"), names)
    assert not names["there"].has_weights
    assert names["logits"].shape == (1, names["there"].d_vocab)
    assert names["lens"].ids.shape[0] == names["there"].n_layers + 1
    assert names["found"]["norm"].shape == (1, len(names["inputs"].tokens))


def test_every_python_block_is_run_somewhere():
    assert set(re.findall(r"^```(\w.*)$", README, re.M)) == {"python", "python ndif", "sh", "sh setup"}


def test_the_file_tree_is_the_packages():
    tree = README.split("```\nmechvlm/\n")[1].split("```")[0]
    listed = set(re.findall(r"^  (\S+)", tree, re.M))
    there = {
        p.name + ("/" if p.is_dir() else "")
        for p in (ROOT / "mechvlm").iterdir()
        if p.name not in ("__pycache__", "py.typed")
    }
    assert listed == there


def test_every_figure_and_link_is_there():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
