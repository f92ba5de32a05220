"""Checksums of a study's folder, made anew after a test has changed files in it."""

import json
from pathlib import Path

from mechvlm.outside.integrity import SEAL, digests_of_files, sealed


def seal_json(path: Path, **changes) -> None:
    """Change a sealed JSON file, and seal it again."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(sealed({key: value for key, value in content.items() if key != SEAL})))


def seal_study(folder: Path, **changes) -> None:
    """Change run.json, and let it vouch for the files that are there now."""
    seal_json(folder / "run.json", files=digests_of_files(folder), **changes)


def seal_shard(folder: Path, **changes) -> None:
    """The same for a shard's about.json."""
    files = {name: sha for name, sha in digests_of_files(folder).items() if name != "about.json"}
    seal_json(folder / "about.json", files=files, **changes)
