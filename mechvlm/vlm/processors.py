"""A model's processor, also on a machine without torchvision.

transformers asks for torchvision in three places, though the images go through Pillow. A video
processor needs it always, and is a part of the processors of Qwen-VL, InternVL, LLaVA-OneVision and
others, which then cannot be built at all. Pixtral's processor imports a function from a file that
needs it. And some families' image processors have no second version that needs Pillow alone.

The first two are mended here: `load_processor` gives such a processor with a `NoVideos` where the
video processor would be. Images go the same way as ever; a video is refused. The third is an error
that says what to install.
"""

import importlib.util
import json
import sys
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoProcessor, ProcessorMixin
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import cached_file, is_torchvision_available

from mechvlm.errors import InputError, ModelError

FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""Where a folder names the class of its processor; the first that does counts."""

VIDEOS = "video_preprocessor_config.json"
"""Where older folders hold the settings for videos."""


class NoVideos(dict):
    """Stands where a processor keeps its video processor, which torchvision is needed for.

    It holds that part's settings as they were stored, so that `save_pretrained` writes them again.
    """

    _auto_class = None  # transformers asks every part whether its code is stored with it
    model_input_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        """A stored setting or None: SmolVLM's chat template asks how many frames, of images too."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self.get(name)

    def __call__(self, *args, **kwargs):
        raise InputError(
            "A video was given; this processor was loaded without torchvision, which videos need, and takes images alone. "
            "`pip install torchvision`, and load it again."
        )


def load_processor(source: str | PathLike, **options: Any) -> Any:
    """`AutoProcessor.from_pretrained`, which needs no torchvision where images alone are read.

    >>> processor = load_processor("Qwen/Qwen2.5-VL-7B-Instruct")
    >>> processor(images=[image], text=["<|vision_start|><|image_pad|><|vision_end|>"])

    Args:
        source: a folder or a hub id.
        options: of `AutoProcessor.from_pretrained`, such as revision and trust_remote_code.

    Returns:
        The processor, of the class that `processor_class` gives; or what else `AutoProcessor`
        finds, such as a tokenizer alone.

    Raises:
        ModelError: for a processor that needs a package that is not installed: torchvision, where
            transformers has no image processor that needs Pillow alone.
        OSError, ValueError: as `AutoProcessor` raises them, for files that are not there.
    """
    name = None if is_torchvision_available() else _named(source, **options)
    try:
        kind = AutoProcessor if name is None else processor_class(name)
        return kind.from_pretrained(source, **options)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        if "torchvision" in reason.lower() and not is_torchvision_available():
            raise ModelError(
                f"The processor of {source} needs torchvision, which is not installed: transformers has no image processor for "
                "it that needs Pillow alone. `pip install torchvision`."
            ) from error
        if isinstance(error, ImportError):
            raise ModelError(f"The processor of {source} needs a package that is not installed: {reason}") from error
        raise


@cache
def processor_class(name: str) -> type[ProcessorMixin]:
    """transformers' processor of this name; without torchvision, for images alone.

    >>> processor_class("InternVLProcessor")(images, tokenizer, NoVideos(), image_seq_length=256)

    Args:
        name: of the class.

    Returns:
        The class. Without torchvision, if it has a video processor, one derived from it of the same
        name, whose `from_pretrained` puts a `NoVideos` there; such processors save as ever.

    Raises:
        ImportError: for a class that needs what is not installed.
    """
    plain = getattr(transformers, name)
    if not is_torchvision_available() and not issubclass(plain, ProcessorMixin):
        plain = _imported_with_pillow(plain.__module__, name)
    if is_torchvision_available() or "video_processor" not in plain.get_attributes():
        return plain
    return type(name, (_ImageOnly, plain), {"__doc__": plain.__doc__, "__module__": plain.__module__})


def _imported_with_pillow(module: str, name: str) -> type[ProcessorMixin]:
    """A class from a file that imports the image processor of its family, which needs torchvision.

    The file gets the one that needs Pillow alone, which has the same functions.
    """
    folder, file = module.rsplit(".", 1)
    family = file.removeprefix("processing_")
    needed, pillow = (f"{folder}.image_processing_{kind}{family}" for kind in ("", "pil_"))
    if importlib.util.find_spec(pillow) is None:
        raise ImportError(f"{name} requires torchvision.")
    sys.modules[needed] = importlib.import_module(pillow)
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        del sys.modules[needed]


class _ImageOnly(ProcessorMixin):
    """What changes in a processor: how its video processor is loaded, and what may stand for it."""

    def __reduce__(self):
        # Its class is made here: another process, of a DataLoader for one, finds it by its name.
        return _restored, (type(self).__name__,), self.__dict__

    def check_argument_for_proper_class(self, argument_name, argument):
        if isinstance(argument, NoVideos):
            return NoVideos
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def _get_arguments_from_pretrained(cls, source, processor_dict=None, **options):
        names = cls.get_attributes()
        # Asked for its parts, this class names all but the video processor.
        others = type(cls.__name__, (cls,), {"get_attributes": lambda: [n for n in names if n != "video_processor"]})
        parts = super(_ImageOnly, others)._get_arguments_from_pretrained(source, processor_dict, **options)
        settings = (processor_dict or {}).get("video_processor") or _stored(source, VIDEOS, **options)
        parts.insert(names.index("video_processor"), NoVideos(settings))
        return parts


def foreign_types(processor: Any, config: Any) -> tuple[str, ...]:
    """The types of models that a processor of transformers belongs to, if the model is of none.

    A processor with the image processor of the model's own type is not foreign: Qwen2-VL's prepares
    an image for Qwen2.5-VL as its own does. Nor is one that transformers does not list.

    >>> foreign_types(processor_of_paligemma, config_of_llava)
    ('paligemma',)
    """
    kind = type(processor).__name__
    types = tuple(sorted(of for of, name in PROCESSOR_MAPPING_NAMES.items() if name == kind))
    own = {config.model_type, *(value.model_type for value in vars(config).values() if hasattr(value, "model_type"))}
    if own & set(types):
        return ()
    usual = {name.removesuffix("Pil") for name in (IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type) or {}).values()}
    return types if usual and type(processor.image_processor).__name__.removesuffix("Pil") not in usual else ()


def usual_processor(config: Any) -> str:
    """What transformers' processor for a model is called, in brackets; "" where none is known."""
    name = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    return "" if name is None else f" ({name})"


def unfit(hf: Any, processor: Any, name: str, error: Exception) -> ModelError:
    """The error about a processor with whose output a model's own forward fails."""
    return ModelError(
        f"The processor of {name} does not fit it: the forward of {type(hf).__name__} fails on what this "
        f"{type(processor).__name__} returns ({error}). Give the processor that was saved with the "
        f"model{usual_processor(hf.config)}."
    )


def _restored(name: str) -> ProcessorMixin:
    return object.__new__(processor_class(name))


def _named(source: str | PathLike, **options: Any) -> str | None:
    """The class that a folder or a repository names, or its config's; None for one of its own."""
    for file in FILES:
        if name := _stored(source, file, **options).get("processor_class"):
            return name if hasattr(transformers, name) else None
    try:
        return PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(source, **options).model_type)
    except (OSError, ValueError):
        return None


def _stored(source: str | PathLike, file: str, **options: Any) -> dict[str, Any]:
    """What a JSON file of a folder or a repository holds; nothing where it is not there."""
    hub = {name: options[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in options}
    path = cached_file(
        source, file, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, **hub,
    )  # fmt: skip
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
