"""The sdist and the wheel made of it are whole: installed apart from the checkout, they work."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORK = """
import mechvlm as mv
from mechvlm.datasets.scenes import scenes

vlm = mv.load("tiny-llava")
answer = vlm.generate(vlm.inputs(next(scenes(1)).image, "Describe the scene."))[0]
lens, norms = mv.read(vlm, answer.inputs, mv.LogitLens(), mv.NormAttention())
mv.view.patches(answer.inputs, lens, norms).save("page.html")
print(mv.__file__)
print(answer)
"""


def run(*command, folder: Path, **env: str) -> str:
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, check=True
    ).stdout.strip()


def built(kind: str, source: Path, to: Path) -> Path:
    """The one file that setuptools builds of a source folder, as pip would, without the network."""
    to.mkdir()
    code = f"from setuptools.build_meta import build_{kind}; print(build_{kind}({str(to)!r}))"
    return to / run(sys.executable, "-c", code, folder=source).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the sdist, which is built from a copy of what git holds."""
    home = tmp_path_factory.mktemp("release")
    listed = run("git", "ls-files", folder=ROOT).splitlines()
    for name in listed:
        if not name.startswith(("tests/", "docs/", "tutorials/", "scripts/")):
            (home / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            (home / "checkout" / name).write_bytes((ROOT / name).read_bytes())
    sdist = built("sdist", home / "checkout", home / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(home / "unpacked", filter="data")
    (unpacked,) = (home / "unpacked").iterdir()
    return built("wheel", unpacked, home / "wheel")


@pytest.mark.long
def test_the_wheel_holds_the_whole_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("mechvlm/")}
        (named,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(named))
    tracked = set(run("git", "ls-files", "mechvlm", folder=ROOT).splitlines())
    assert inside == tracked
    assert "mechvlm/py.typed" in inside
    assert metadata["Name"] == "mechvlm"
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == set(PROJECT["optional-dependencies"])


@pytest.mark.long
def test_it_works_apart_from_the_checkout(wheel, tmp_path):
    """In an environment of its own, beside this one's other packages: data, pages and command."""
    venv.create(tmp_path / "environment", with_pip=False)
    python = tmp_path / "environment" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = (
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        str(wheel),
    )
    run(sys.executable, *install, folder=tmp_path)
    env = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    place, answer = run(python, "-c", WORK, folder=tmp_path, **env).splitlines()[-2:]
    assert Path(place).is_relative_to(site)
    assert answer == "a yellow diamond on snow."
    assert (tmp_path / "page.html").stat().st_size > 50_000
    command = python.with_name("mechvlm")
    assert run(command, "--version", folder=tmp_path, **env) == f"mechvlm {PROJECT['version']}"
    run(command, "study", "--model", "tiny-llava", "--n", "4", "--out", "study", folder=tmp_path, **env)
    assert (tmp_path / "study" / "report.html").stat().st_size > 100_000


def test_the_version_has_one_place():
    """pyproject.toml says it, the package asks for it, and no other file repeats it."""
    version = PROJECT["version"]
    repeats = [
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("*.cff"), *(ROOT / "mechvlm").rglob("*.py"), *(ROOT / "docs").glob("*.py")]
        if re.search(rf"version\W+{re.escape(version)}", path.read_text(encoding="utf-8"), re.IGNORECASE)
    ]
    assert repeats == []


MODULES = {"pillow": "PIL", "websocket-client": "websocket"}
"""What a package is imported as, where it is not its name."""
NOT_IMPORTED = {"accelerate": "device_map", "circuitsvis": 'find_spec("circuitsvis")'}
"""Packages that are needed and not imported, and the text that says where: transformers needs the
first to spread a model, and of the second a file is read."""


def test_every_dependency_is_used():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "mechvlm").rglob("*.py")]
    unused = []
    for requirement in PROJECT["dependencies"]:
        name = re.match(r"[\w-]+", requirement)[0]
        module = MODULES.get(name, name.replace("-", "_"))
        used = re.compile(
            re.escape(NOT_IMPORTED[name]) if name in NOT_IMPORTED else rf"^\s*(import|from) {module}\b", re.M
        )
        unused += [] if any(used.search(source) for source in sources) else [name]
    assert unused == []


def changelog_titles() -> list[str]:
    return re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def test_the_changelog_has_this_version_and_what_is_not_released():
    titles = changelog_titles()
    released = [title.split(" ")[0].strip("[]") for title in titles]
    assert PROJECT["version"] in released
    assert released[0] in ("Unreleased", PROJECT["version"])


def test_the_citation_can_be_read():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors", "type"} <= set(citation)
    assert citation["license"] == PROJECT["license"]
    assert f"{PROJECT['version']} - {citation['date-released']}" in changelog_titles()
