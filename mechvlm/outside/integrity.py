"""Checksums, and files of others: they are measured and checked before they are believed.

A JSON object is sealed: its key `sha256` holds the digest of everything else in it. The digests of
the files beside it stand in it too, so one sealed file vouches for a whole folder. A checksum tells
a flipped bit and a file of another place; it stops nobody who computes it anew.
"""

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

SEAL = "sha256"
"""The key of a sealed object's own digest."""
MOST_JSON_BYTES = 64 * 2**20
MOST_JSON_ENTRIES = 4_000_000
"""Lists, objects and commas in a JSON text: each takes up to 80 bytes once it is read."""
MOST_JSON_LEVELS = 32
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


def digest(content: Any) -> str:
    """The SHA-256 of anything that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by its path in it with `/`, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_of_file(path) for path in files}


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The object with its own digest, under the key `SEAL`."""
    return content | {SEAL: digest(content)}


def check_seal(content: dict[str, Any]) -> None:
    """Raise ValueError for an object that is not as it was sealed."""
    if SEAL not in content:
        raise ValueError("it carries no checksum")
    if content[SEAL] != digest({key: value for key, value in content.items() if key != SEAL}):
        raise ValueError("its content does not match its checksum")


def check_file(path: Path, expected: str | None) -> None:
    """Raise ValueError for a file that differs from its recorded digest, or has none."""
    check_size(path)
    if expected is None:
        raise ValueError("no checksum of it is recorded")
    if digest_of_file(path) != expected:
        raise ValueError("its content does not match its checksum")


def check_size(path: Path, most: int | None = None) -> None:
    """Raise ValueError for what is no regular file, or for a file of more than `most` bytes.

    Raises:
        OSError: where there is no such file.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is no regular file")
    if most is not None and about.st_size > most:
        raise ValueError(f"it has {about.st_size:,} bytes, and at most {most:,} are read")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is no JSON object, or too large or too deep to be one of ours.
    """
    check_size(path, MOST_JSON_BYTES)
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> dict[str, Any]:
    """The object in a JSON text; raises ValueError as `read_json` does."""
    if (entries := sum(map(text.count, "[{,"))) > MOST_JSON_ENTRIES:
        raise ValueError(f"it has {entries:,} entries, and at most {MOST_JSON_ENTRIES:,} are read")
    try:
        content = json.loads(text)
    except RecursionError:
        content = None
    if content is None or not _is_flat(content, MOST_JSON_LEVELS):
        raise ValueError(f"it is no JSON object of at most {MOST_JSON_LEVELS} levels")
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    return content


def _is_flat(content: Any, levels: int) -> bool:
    if not isinstance(content, dict | list):
        return True
    parts = content.values() if isinstance(content, dict) else content
    return levels > 0 and all(_is_flat(part, levels - 1) for part in parts)


def check_type(value: Any, annotation: Any, name: str = "") -> None:
    """Raise ValueError for a value that an annotation does not allow: it names the first place.

    Types are strict (a text is no number), and may be pydantic models or jaxtyping's tensors.
    """
    is_model = hasattr(annotation, "model_fields")  # a model has its own settings
    try:
        TypeAdapter(annotation, config=None if is_model else _STRICT).validate_python(value)
    except (ValidationError, RecursionError) as error:
        raise ValueError(_first_problem(error, name)) from None


def _first_problem(error: ValidationError | RecursionError, name: str) -> str:
    if isinstance(error, RecursionError):
        return f"{name} is nested too deeply".strip()
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, ([name] if name else []) + list(first["loc"])))
    if first["type"] == "missing":
        return f"it lacks {place}"
    return f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}"
