"""The small trained models that ship with the package. Each folder has a model card, README.md."""

from pathlib import Path

NAMES = ("tiny-llava", "tiny-instructblip")


def path(name: str) -> Path:
    """The folder of a bundled model.

    Raises:
        KeyError: for a name that is not in `NAMES`.
    """
    if name not in NAMES:
        raise KeyError(f"There is no bundled model {name!r}. The bundled models are {', '.join(NAMES)}.")
    return Path(__file__).parent / name
