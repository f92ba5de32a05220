"""The house keeps its order: data flows LOAD -> TRACE -> MEASURE -> VIEW, and nothing heavy loads before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import mechvlm

ROOT = Path(mechvlm.__file__).parent

# Each room, and the rooms it may import from; a room knows what stands above it in the flow, and no more.
LOAD = {
    "answers",
    "batches",
    "errors",
    "architectures",
    "tokens",
    "images",
    "inputs",
    "accessors",
    "weights",
    "decoder",
    "connection",
    "remote",
    "jobs",
    "vlm",
    "checks",
    "bundled",
    "loading",
}
MEASURE = {"results", "probes", "words", "segments", "phases", "intervals", "pairs"}
ALLOWED = {
    **{room: LOAD for room in LOAD},
    **{room: LOAD | {"progress"} for room in ("connection", "jobs")},
    "datasets": {"errors", "images", "datasets"},
    "progress": set(),
    # Measures see tensors, never a model: of LOAD they know positions and the attention's formula.
    **{room: MEASURE | {"tokens", "accessors"} for room in MEASURE},
    # Probes are told which tokens to measure, in prepare().
    "probes": MEASURE | {"tokens", "accessors", "batches"},
    "reading": LOAD | MEASURE | {"progress"},
    "interventions": LOAD,
    "experiments": LOAD | MEASURE | {"datasets", "reading", "interventions", "experiments", "progress"},
    "view": MEASURE | {"errors", "tokens", "inputs", "experiments", "view"},
    "lens_cache": LOAD | {"lens_bridge"},
    "lens_bridge": LOAD,
    "study": LOAD | MEASURE | {"reading", "experiments", "view", "datasets", "study"},
    "cli": LOAD | {"study", "datasets", "progress", "cli"},
}


def imports(path: Path, functions: bool) -> set[str]:
    """The rooms of mechvlm that a file imports; at its top, or inside functions too."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if functions else tree.body:
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "mechvlm" else [f"mechvlm.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mechvlm.")}
    return found


def test_rooms_import_only_what_stands_above_them():
    wrong = {}
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in ALLOWED, f"{path} stands in no room of the house: give it one here and in the README"
        # Imports upwards, inside methods: results ask the view for their picture when .plot() is called, and the VLM asks for
        # TransformerLens when .bridge() or .run_with_cache() is.
        upwards = {"results": {"view"}, "vlm": {"lens_bridge", "lens_cache"}}.get(room, set())
        assert not upwards & imports(path, functions=False)
        rooms = imports(path, functions=True) - upwards
        if rooms - ALLOWED[room] - {room}:
            wrong[str(path.relative_to(ROOT))] = sorted(rooms - ALLOWED[room] - {room})
    assert not wrong


def test_only_some_rooms_know_nnsight():
    knowing = {p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py") if "nnsight" in _packages(p)}
    experiments = {f"experiments/{name}.py" for name in ("rerun", "multimodal_neurons")}
    ndif = {"remote.py", "connection.py", "jobs.py"}
    assert knowing == ndif | {"vlm.py", "reading.py", "checks.py", "lens_cache.py"} | experiments


def _packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light():
    """Neither `import mechvlm` nor its command line's help loads torch; loading a model never loads TransformerLens."""
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
    assert set(mechvlm.__all__) <= set(dir(mechvlm))


def test_files_are_short_enough_to_read():
    long = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long
