"""Look inside vision-language models: where image and text tokens meet, layer by layer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechvlm.errors import InputError, ModelError, NonFiniteError
    from mechvlm.inputs import Inputs
    from mechvlm.loading import load
    from mechvlm.phases import fit_phases
    from mechvlm.probes.contextualization import Contextualization, ContextualizationResult
    from mechvlm.probes.logit_lens import LogitLens, LogitLensResult
    from mechvlm.probes.norm_attention import NormAttention, NormAttentionResult
    from mechvlm.probes.query_reading import QueryReading, QueryReadingResult
    from mechvlm.reading import contextualization, logit_lens, norm_attention, query_reading, read
    from mechvlm.tokens import Modality, PatchGrid, TokenMap
    from mechvlm.vlm import VLM
    from mechvlm.words import precision_recall

# Where each public name lives. They are imported when they are first used: `mechvlm --help` needs no torch.
_HOMES = {
    "errors": ("InputError", "ModelError", "NonFiniteError"),
    "inputs": ("Inputs",),
    "loading": ("load",),
    "phases": ("fit_phases",),
    "probes.contextualization": ("Contextualization", "ContextualizationResult"),
    "probes.logit_lens": ("LogitLens", "LogitLensResult"),
    "probes.norm_attention": ("NormAttention", "NormAttentionResult"),
    "probes.query_reading": ("QueryReading", "QueryReadingResult"),
    "reading": ("contextualization", "logit_lens", "norm_attention", "query_reading", "read"),
    "tokens": ("Modality", "PatchGrid", "TokenMap"),
    "vlm": ("VLM",),
    "words": ("precision_recall",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "VLM", "Contextualization", "ContextualizationResult", "InputError", "Inputs", "LogitLens", "LogitLensResult", "Modality",
    "ModelError", "NonFiniteError", "NormAttention", "NormAttentionResult", "PatchGrid", "QueryReading", "QueryReadingResult",
    "TokenMap", "contextualization", "fit_phases", "load", "logit_lens", "norm_attention", "precision_recall", "query_reading",
    "read",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "view":
        return import_module("mechvlm.view")
    if name not in _HOME:
        raise AttributeError(f"module 'mechvlm' has no attribute {name!r}")
    value = getattr(import_module(f"mechvlm.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
