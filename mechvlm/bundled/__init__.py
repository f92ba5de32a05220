"""The small trained models that ship with the package. Each folder has a model card, README.md.

Those of `NAMES` are whole. Those of `WITH_SMOLLM2` read images for a language model that stands in
a package of its own: their folders hold all but its weights, and `path` puts both together.
"""

from pathlib import Path

NAMES = ("tiny-llava", "tiny-instructblip")
WITH_SMOLLM2 = ("smol-llava", "smol-instructblip")
ALL = NAMES + WITH_SMOLLM2


def path(name: str) -> Path:
    """The folder of a bundled model, as `from_pretrained` takes it.

    A model of `WITH_SMOLLM2` is put together in the user's cache on its first use.

    Raises:
        KeyError: for a name that is not bundled.
        ModelError: for a model of `WITH_SMOLLM2` whose language model is not installed, or whose
            folder in the cache cannot be written. It says what to install.
    """
    if name in WITH_SMOLLM2:
        from mechvlm.bundled.assemble import assembled  # apart: it needs pydantic

        return assembled(shipped(name))
    return shipped(name)


def shipped(name: str) -> Path:
    """The folder of a bundled model as it ships, with its card.

    Raises:
        KeyError: for a name that is not bundled.
    """
    if name not in ALL:
        raise KeyError(f"There is no bundled model {name!r}. The bundled models are {', '.join(ALL)}.")
    return Path(__file__).parent / name
