"""The Python of README.md and of every page runs, prints what is shown, and writes what it names.

All pages run in one process: run with `pytest -m docs -n 0`. The study on a model with SmolLM2
takes minutes: the lane `-m smollm2` runs that page with few scenes, and compares no numbers.
"""

import functools
import importlib
import importlib.util
import inspect
import re
import types
from pathlib import Path

import pytest

import mechvlm

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("run_pages", ROOT / "scripts" / "run_pages.py")
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

SAVED = re.compile(r"(?:savefig|save)\(\"([\w-]+\.\w+)\"\)")


def needs_smollm2(path: Path) -> bool:
    return any('"smol-' in block.code for block in script.blocks_of(path.read_text(encoding="utf-8")))


def drawn(text: str, folder: Path) -> None:
    """All files that the page saves, and all pictures that it shows, are in the folder."""
    for name in SAVED.findall(text):
        assert (folder / name).stat().st_size > 1000, name
    for name in re.findall(r"pictures/([\w-]+\.png)", text):
        if "tutorial" not in name:
            assert (folder / name).exists(), f"the page shows {name}, and its program does not draw it"


@pytest.mark.docs
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "path",
    [path for path in script.pages() if not needs_smollm2(path)],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_it_runs_as_it_stands(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    for block, output in script.printed(text, tmp_path):
        if block.shown is None:
            assert not output.strip(), f"line {block.line} prints what the page does not show:\n{output}"
        else:
            assert script.same(block.shown, output), f"line {block.line} prints:\n{output}"
    drawn(text, tmp_path)


@pytest.mark.smollm2
@pytest.mark.filterwarnings("ignore")
def test_the_study_on_a_real_decoder_runs_with_few_scenes(tmp_path):
    text = (ROOT / "docs" / "real-decoder.md").read_text(encoding="utf-8")
    assert [path.name for path in script.pages() if needs_smollm2(path)] == ["real-decoder.md"]
    assert text.count("n=100") == 1
    for block, output in script.printed(text.replace("n=100", "n=6"), tmp_path):
        labels = [line.split(":")[0] for line in output.splitlines()]
        assert labels[:1] == [line.split(":")[0] for line in (block.shown or "").splitlines()][:1], output
    drawn(text, tmp_path)


def test_a_wrong_output_is_told(tmp_path):
    """A word, a number, a line more; and rounding, which is none."""
    page = "# A\n\n```python\nx = 2\nprint('two', x / 3)\n```\n\n```text\ntwo 0.6667\n```\n\n```python\nprint(x)\n```\n"
    (first, shown), (second, number) = script.printed(page, tmp_path)
    assert (first.line, second.line, second.shown, number) == (4, 13, None, "2\n")
    assert script.same(first.shown, shown)
    for wrong in ("three 0.6667", "two 0.61", "two 0.6667 0.1", "two -0.6667", "two 0.6667\nand more"):
        assert not script.same(wrong, shown), wrong
    assert script.same("-0 1 \n 2", "0   1\n2")
    new = script.written(page, [shown, number])
    assert new == page.rstrip("\n") + "\n\n```text\n2\n```\n"
    assert script.written(new, [shown, number]) == new
    assert "two 0.75" in script.written(page, ["two 0.75\n", ""])


def test_a_failure_names_the_pages_line(tmp_path):
    page = "# A\n\ntext\n\n```python\nx = 1\nraise ValueError(x)\n```\n"
    with pytest.raises(ValueError, match="1") as error:
        list(script.printed(page, tmp_path))
    assert error.traceback[-1].lineno + 1 == 7


# -- the reference --


def documented() -> list[str]:
    """Every name that a page of the reference shows."""
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md"))]
    return re.findall(r"^\.\. auto(?:class|function|data):: (\S+)", "\n".join(pages), re.M)


def public() -> set[str]:
    from mechvlm import datasets, figures, view

    rooms = {"bundled", "datasets", "figures", "study", "view"}
    names = {f"mechvlm.{name}" for name in mechvlm.__all__ if name not in rooms}
    for module in (datasets, figures, view):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    return names | {"mechvlm.study.run"}


def test_every_public_name_stands_in_the_reference_once():
    names = documented()
    assert len(names) == len(set(names))
    assert public() <= set(names) | {"mechvlm.view.View"}


def value_of(name: str):
    """What a dotted name means: an attribute of the longest module that it begins with."""
    parts = name.split(".")
    cut = max(n for n in range(1, len(parts)) if is_module(".".join(parts[:n])))
    value = importlib.import_module(".".join(parts[:cut]))
    for part in parts[cut:]:
        value = getattr(value, part)
    return value


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def without_docstring(owner: type) -> list[str]:
    """The public methods and properties of a class that it and its bases do not describe.

    A property may be described among the attributes of the class.
    """
    bare = []
    for name, member in vars(owner).items():
        described = any(inspect.getdoc(vars(base).get(name)) for base in owner.__mro__)
        attribute = re.search(rf"^\s+(?:\w+, )*{name}(?:, \w+)*: ", owner.__doc__ or "", re.M)
        if not name.startswith("_") and isinstance(member, MEMBERS) and not (described or attribute):
            bare.append(f"{owner.__name__}.{name}")
    return bare


MEMBERS = (property, classmethod, staticmethod, types.FunctionType, functools.cached_property)


def test_a_bare_method_would_be_found():
    class Base:
        """A class.

        Attributes:
            size, listed: numbers.
        """

        @property
        def listed(self): ...

        def described(self):
            """It is."""

        @property
        def bare(self): ...

    class Child(Base):
        def described(self): ...

    assert [name for owner in Child.__mro__[:2] for name in without_docstring(owner)] == ["Base.bare"]


def test_nothing_public_is_without_a_docstring():
    bare = set()
    for name in documented():
        value = value_of(name)
        assert inspect.getdoc(value) or not callable(value), name
        for owner in value.__mro__ if inspect.isclass(value) else ():
            bare |= set(without_docstring(owner)) if owner.__module__.startswith("mechvlm") else set()
    assert bare == set()
