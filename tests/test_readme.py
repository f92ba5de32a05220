"""The README is short, and it and the pages name what is there; the house's tree is the package's.

That their examples run, and print what is shown, is tested in `test_pages.py`.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]
BLOCKS = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_the_set_up_commands_are_two():
    """They are run as they stand, in a fresh environment."""
    assert [info for info, _ in BLOCKS.findall(README)].count("sh setup") == 2


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_code_is_90_columns_wide(path):
    """As much as a page shows without scrolling."""
    blocks = BLOCKS.findall(path.read_text(encoding="utf-8"))
    lines = [line for info, block in blocks if info.split(" ")[0] in ("python", "sh") for line in block.splitlines()]
    assert [line for line in lines if len(line) > 90] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_python_block_is_run_somewhere(path):
    """Blocks for a server stand in one page, and are run beside it."""
    infos = {info for info, _ in BLOCKS.findall(path.read_text(encoding="utf-8"))}
    known = {"python", "text", "sh", "sh setup", "", "{toctree}", "{eval-rst}"}
    assert infos <= known | ({"python ndif"} if path.name == "ndif.md" else set())


@pytest.mark.ndif
def test_the_example_on_NDIF_runs(server, tmp_path):
    """Its block has an info string of its own: it needs a server."""
    page = (ROOT / "docs" / "ndif.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python ndif\n(.*?)```", page, re.S)
    file = tmp_path / "example.py"
    file.write_text(code)
    names: dict = {}
    exec(compile(code, str(file), "exec"), names)
    assert not names["there"].has_weights
    assert names["logits"].shape == (1, names["there"].d_vocab)
    assert names["lens"].ids.shape[0] == names["there"].n_layers + 1
    assert names["found"]["norm"].shape == (1, len(names["inputs"].tokens))


def rooms() -> set[str]:
    there = (ROOT / "mechvlm").iterdir()
    return {p.name + ("/" if p.is_dir() else "") for p in there if p.name not in ("__pycache__", "py.typed")}


def test_the_file_tree_is_the_packages():
    tree = (ROOT / "docs" / "house.md").read_text(encoding="utf-8").split("```\nmechvlm/\n")[1].split("```")[0]
    assert set(re.findall(r"^  (\S+)", tree, re.M)) == rooms()


def test_the_readmes_tree_has_every_room():
    tree = README.split("```\nmechvlm/\n")[1].split("```")[0]
    lines = [line.strip().split("  ")[0] for line in tree.splitlines() if line.startswith("  ")]
    named = {name for line in lines for name in line.split(", ")}
    assert named == {name.rstrip("/").removesuffix(".py") for name in rooms()} - {"__init__"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_figure_and_link_is_there(path):
    text = BLOCKS.sub("", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), link


def anchors(page: str) -> set[str]:
    """What a page can be linked to by: its headings, and the names of the reference."""
    titles = re.findall(r"^#+ (.+)$", BLOCKS.sub("", page), re.M)
    names = set(re.findall(r"^\.\. auto\w+:: (\S+)", page, re.M))
    return names | {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
