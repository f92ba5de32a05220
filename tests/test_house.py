"""The order of the house: data flows one way, no circles of imports, nothing heavy loads early."""

import ast
import dataclasses
import io
import json
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

import mechvlm

ROOT = Path(mechvlm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TESTS = sorted(Path(__file__).parent.rglob("*.py"))

# From the ground up: a room imports itself and the rooms before it, lazily or not.
ROOMS = [
    "errors", "outside", "progress", "intervals", "bundled", "figures", "results", "families", "inputs", "decoder",
    "measures", "datasets", "ndif", "probes", "vlm", "view", "tracing", "experiments", "methods", "explore", "study", "cli",
]  # fmt: skip

# Rooms that never see these, although they stand above them in the list.
NEVER = {
    "figures": {"errors", "progress", "bundled"},
    "measures": {"decoder", "families", "inputs"},
    "probes": {"ndif", "datasets"},
    "view": {"ndif", "vlm", "datasets"},
}
KNOW_NNSIGHT = {"ndif", "vlm", "tracing", "experiments"}

Graph = dict[str, set[str]]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def graph_of(root: Path) -> Graph:
    """For each file, the package's files that it imports: at its top, lazily, or for types."""
    files = {".".join(p.relative_to(root.parent).with_suffix("").parts): p for p in root.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: Graph = {}
    for name, path in files.items():
        imported = set()
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert not node.level, f"{path}: relative imports do not travel to NDIF"
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= {one if one in files else node.module for one in inside}
        graph[name] = imported & files.keys() - {name}
    return graph


def circles_of(graph: Graph) -> list[list[str]]:
    """The groups of files that import each other, directly or around corners."""
    reach = {name: set(imported) for name, imported in graph.items()}
    for middle in graph:  # Warshall's transitive closure
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    found = {frozenset(b for b in graph if b in reach[a] and a in reach[b]) for a in graph}
    return sorted(sorted(circle) for circle in found if circle)


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def climbs_of(graph: Graph) -> list[str]:
    """The imports that run up the list of rooms, or into one that must not be seen."""
    height = {room: i for i, room in enumerate(ROOMS)}
    wrong = []
    for name, imported in graph.items():
        here = room_of(name)
        for other in imported if here else ():
            there = room_of(other)
            if there == "" or height[there] > height[here] or there in NEVER.get(here, ()):
                wrong.append(f"{name} imports {other}")
    return sorted(wrong)


GRAPH = graph_of(ROOT)


def test_every_file_stands_in_a_room():
    rooms = {room_of(name) for name in GRAPH} - {""}
    assert rooms == set(ROOMS), "a new room gets its place in ROOMS here, and in the tree of docs/house.md"
    assert len(list(ROOT.glob("*.py"))) <= 8


def test_no_import_climbs():
    assert climbs_of(GRAPH) == []


def test_no_files_import_each_other():
    assert circles_of(GRAPH) == []


def test_a_planted_circle_is_found(tmp_path):
    """Lazy and type-checking imports count."""
    package = tmp_path / "mechvlm"
    for name, source in {
        "__init__": "", "errors": "", "inputs/__init__": "", "decoder/__init__": "",
        "inputs/a": "from mechvlm.inputs.b import x", "inputs/b": "def f():\n    from mechvlm.inputs import c",
        "inputs/c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mechvlm.inputs.a",
        "inputs/d": "from mechvlm.decoder import e", "decoder/e": "import mechvlm.errors",
    }.items():  # fmt: skip
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(source)
    graph = graph_of(package)
    assert circles_of(graph) == [["mechvlm.inputs.a", "mechvlm.inputs.b", "mechvlm.inputs.c"]]
    assert climbs_of(graph) == ["mechvlm.inputs.d imports mechvlm.decoder.e"]


def test_only_some_rooms_know_nnsight():
    knowing = {room_of(name) for name in GRAPH if "nnsight" in _packages(name)}
    assert knowing <= KNOW_NNSIGHT


def _packages(name: str) -> set[str]:
    path = ROOT.parent / (name.replace(".", "/") + ".py")
    path = path if path.is_file() else path.with_suffix("") / "__init__.py"
    return {module.split(".")[0] for module in _imported(path)}


FACTS = {
    "attention_interface": {"families/record.py", "decoder/attention.py"},
    "(?<!_)text_config": {"families/record.py", "families/known.py", "decoder/decoder.py"},
    "image_token_(id|index)": {"families/record.py", "families/known.py"},
    "rms_norm_eps": {"families/record.py", "bundled/smollm2.py"},
    "variance_epsilon|norm\\.weight": {"decoder/norms.py", "families/derive.py"},
    "qformer_config|vision_config|language_model_outputs": {"families/record.py", "families/known.py"},
}
"""Facts about a family, as patterns, and the only files that may state them."""


@pytest.mark.parametrize("pattern", FACTS)
def test_a_fact_about_a_family_has_one_home(pattern):
    uses = re.compile(rf"(?<!record\.)(?<!vlm\.)(?<!self\.)\b({pattern})\b")
    stating = set()
    for path in FILES:
        code = "\n".join(line for line in _code(path) if "import" not in line and "attention_call(" not in line)
        if uses.search(code):
            stating.add(path.relative_to(ROOT).as_posix())
    assert stating <= FACTS[pattern]


@cache
def _code(path: Path) -> list[str]:
    """The lines of a file without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))  # not `tree_of`, which others read whole
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and len(body) > 1:
            node.body = [part for part in body if not _is_prose(part)]  # type: ignore[attr-defined]
    return ast.unparse(tree).split("\n")


def _is_prose(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_a_name_means_the_same_in_every_result():
    """`layers` are numbers, only inputs have `tokens`, and other fields have one type each."""
    kinds: dict[str, set[str]] = {}
    for result in _results():
        for field in dataclasses.fields(result):
            kinds.setdefault(field.name, set()).add(_kind(field.type))
        shown = {name for name in dir(result) if not name.startswith("_")}
        assert "tokens" not in shown | {field.name for field in dataclasses.fields(result)}, result
    assert kinds["layers"] == {"numbers"}
    several = {name: found for name, found in kinds.items() if len(found) > 1}
    assert several == {}


def _results() -> list[type]:
    names = [getattr(mechvlm, name) for name in mechvlm.__all__ if name.endswith("Result")]
    from mechvlm.measures.phases import Phases

    return [*names, Phases]


def _kind(annotation) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if "Tensor" in text:
        return "tensor"
    return {"tuple[int, ...]": "numbers"}.get(str(annotation), str(annotation))


# -- how it speaks ---------------------------------------------------------------------------------

VAGUE = ("found", "one", "asked")


def test_a_constant_has_one_meaning():
    """No two modules define a constant of the same name."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in tree_of(path).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                for name in ast.walk(target) if target is not None else ():
                    if isinstance(name, ast.Name) and name.id.isupper() and len(name.id) > 1:
                        homes.setdefault(name.id, []).append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_nothing_registers_itself():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nameless = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, functions) and node.name == "_"
    ]
    assert nameless == []


def vague_names(tree: ast.Module) -> list[str]:
    """Scopes in which `found`, `one` or `asked` lives for more than three lines."""
    scopes = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    long = []

    def uses(node: ast.AST, name: str) -> list[int]:
        lines = []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, scopes) and name in bound(child):
                continue
            if isinstance(child, ast.Name) and child.id == name:
                lines.append(child.lineno)
            lines += uses(child, name)
        return lines

    def bound(scope: ast.AST) -> set[str]:
        if isinstance(scope, ast.FunctionDef | ast.Lambda):
            names = {arg.arg for arg in ast.walk(scope.args) if isinstance(arg, ast.arg)}
            body = scope.body if isinstance(scope.body, list) else []
            return names | {n.id for part in body for n in ast.walk(part) if _is_stored(n)}
        return {n.id for generator in scope.generators for n in ast.walk(generator.target) if isinstance(n, ast.Name)}

    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}.intersection(VAGUE)
    for scope in [tree, *(node for node in ast.walk(tree) if used and isinstance(node, scopes))]:
        for name in sorted(used):
            if scope is tree or name in bound(scope):
                lines = uses(scope, name)
                if isinstance(scope, ast.FunctionDef) and name in {
                    a.arg for a in ast.walk(scope.args) if isinstance(a, ast.arg)
                }:
                    lines.append(scope.lineno)
                if lines and max(lines) - min(lines) > 2:
                    long.append(f"{name}, lines {min(lines)} to {max(lines)}")
    return long


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def test_vague_names_live_for_three_lines():
    assert vague_names(ast.parse("def f(x):\n    found = x\n    x += 1\n    return found")) == []
    assert vague_names(ast.parse("def f(x):\n    found = x\n    x += 1\n\n    return found")) == ["found, lines 2 to 5"]
    wrong = {str(path): vague_names(tree_of(path)) for path in [*FILES, *TESTS]}
    assert {name: lines for name, lines in wrong.items() if lines} == {}


def test_prose_is_100_columns_wide():
    """Comments and docstrings; code may take 120."""
    wide = []
    for path in [*FILES, *TESTS]:
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        prose = {
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:", "# fmt:"))
        }
        for node in ast.walk(tree_of(path)):
            if _is_prose(node):
                prose |= set(range(node.lineno, node.end_lineno + 1))
        wide += [f"{path}:{line}" for line in sorted(prose) if len(lines[line - 1]) > 100]
    assert wide == []


NOT_ENGLISH = re.compile(r"what there is of|\bthat which\b|of which what\b|what .{0,30}, of that\b", re.IGNORECASE)


def test_no_riddles():
    """Phrases that have to be decoded."""
    riddles = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in FILES
        for match in NOT_ENGLISH.finditer(" ".join(path.read_text(encoding="utf-8").split()))
    ]
    assert riddles == []


def test_tests_share_helpers_and_not_each_other():
    tests = Path(__file__).parent
    wrong = [
        f"{path.relative_to(tests)} imports {module}"
        for path in tests.rglob("*.py")
        for module in _imported(path)
        if module.split(".")[0].startswith("test_") or module == "conftest"
    ]
    assert wrong == []
    rooms = {room for room in ROOMS if (ROOT / room).is_dir()} | {"helpers", "data", "convert"}
    folders = {path.name for path in tests.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    assert folders <= rooms


def _imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return modules


# -- what it costs, and what it shows --------------------------------------------------------------


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light():
    """`import mechvlm` and `--help` load no torch; loading a model loads no TransformerLens."""
    heavy = {"torch", "nnsight", "transformers", "matplotlib"}
    code = f"import sys, mechvlm, mechvlm.cli; print(sorted({heavy} & set(sys.modules)))"
    assert run(code) == "[]"
    code = (
        "import sys, PIL.Image, mechvlm as mv; mv.read; vlm = mv.load('tiny-llava'); "
        "vlm.run_with_cache(vlm.inputs(PIL.Image.new('RGB', (9, 9)), 'a'), 'hook_embed'); "
        "before = 'transformer_lens' in sys.modules; vlm.OV(0); print(before, 'transformer_lens' in sys.modules)"
    )
    assert run(code) == "False True"


def test_public_names_are_there():
    for name in mechvlm.__all__:
        assert getattr(mechvlm, name) is not None
        assert getattr(mechvlm, name).__doc__, f"mechvlm.{name} has no docstring"
    assert dir(mechvlm) == sorted(mechvlm.__all__), "mv. completes to the public names, and not to imports"


def test_files_are_short_enough_to_read():
    long = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def undefined(folder: Path) -> list[str]:
    """Names that nothing defines, outside of strings: ruff takes jaxtyping's axes for names."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "F821",
        "--output-format",
        "json",
        folder,
    ]
    seen = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    names = []
    for name in seen:
        path, row, column = Path(name["filename"]), name["location"]["row"], name["location"]["column"] - 1
        with path.open("rb") as file:
            texts = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.STRING]
        if not any(text.start <= (row, column) < text.end for text in texts):
            names.append(f"{path}:{row}: {name['message']}")
    return names


@pytest.mark.parametrize(
    "folder", [ROOT, Path(__file__).parent, ROOT.parent / "scripts"], ids=lambda folder: folder.name
)
def test_every_name_is_defined(folder):
    assert undefined(folder) == []


def test_an_undefined_name_would_be_seen(tmp_path):
    (tmp_path / "a.py").write_text('def f(x: "batch dest"):\n    return y\n')
    (line,) = undefined(tmp_path)
    assert line.endswith("a.py:2: Undefined name `y`")
