"""Look inside vision-language models: where image and text tokens meet, layer by layer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechvlm import view
    from mechvlm.errors import InputError, ModelError, NonFiniteError, RemoteError, ViewError
    from mechvlm.experiments.causal_trace import causal_trace
    from mechvlm.experiments.information_flow import information_flow
    from mechvlm.experiments.multimodal_neurons import multimodal_neurons
    from mechvlm.experiments.object_ablation import object_ablation
    from mechvlm.experiments.pair_results import WinogroundResult
    from mechvlm.experiments.results import CausalTraceResult, InformationFlowResult, ObjectAblationResult
    from mechvlm.experiments.winoground import caption_logprob, winoground
    from mechvlm.inputs import Inputs
    from mechvlm.interventions import ablate, knock_out, patch, steer
    from mechvlm.jobs import Job
    from mechvlm.loading import load
    from mechvlm.pairs import PairScores, pair_scores
    from mechvlm.phases import fit_phases
    from mechvlm.probes.contextualization import Contextualization, ContextualizationResult
    from mechvlm.probes.likelihood import Likelihood, LikelihoodResult
    from mechvlm.probes.logit_attribution import LogitAttribution, LogitAttributionResult
    from mechvlm.probes.logit_lens import LogitLens, LogitLensResult
    from mechvlm.probes.neurons import MultimodalNeuronsResult
    from mechvlm.probes.norm_attention import NormAttention, NormAttentionResult
    from mechvlm.probes.query_reading import QueryReading, QueryReadingResult
    from mechvlm.reading import contextualization, logit_attribution, logit_lens, norm_attention, query_reading, read
    from mechvlm.study.compare import Comparison, compare
    from mechvlm.study.study import Study
    from mechvlm.tokens import Modality, PatchGrid, TokenMap
    from mechvlm.vlm import VLM
    from mechvlm.words import precision_recall

# Where each public name lives. They are imported when they are first used: `mechvlm --help` needs no torch.
_HOMES = {
    "errors": ("InputError", "ModelError", "NonFiniteError", "RemoteError", "ViewError"),
    "experiments.causal_trace": ("causal_trace",),
    "experiments.information_flow": ("information_flow",),
    "experiments.object_ablation": ("object_ablation",),
    "experiments.pair_results": ("WinogroundResult",),
    "experiments.results": ("CausalTraceResult", "InformationFlowResult", "ObjectAblationResult"),
    "experiments.multimodal_neurons": ("multimodal_neurons",),
    "experiments.winoground": ("caption_logprob", "winoground"),
    "inputs": ("Inputs",),
    "interventions": ("ablate", "knock_out", "patch", "steer"),
    "jobs": ("Job",),
    "loading": ("load",),
    "pairs": ("PairScores", "pair_scores"),
    "phases": ("fit_phases",),
    "probes.contextualization": ("Contextualization", "ContextualizationResult"),
    "probes.likelihood": ("Likelihood", "LikelihoodResult"),
    "probes.logit_attribution": ("LogitAttribution", "LogitAttributionResult"),
    "probes.logit_lens": ("LogitLens", "LogitLensResult"),
    "probes.neurons": ("MultimodalNeuronsResult",),
    "probes.norm_attention": ("NormAttention", "NormAttentionResult"),
    "probes.query_reading": ("QueryReading", "QueryReadingResult"),
    "reading": ("contextualization", "logit_attribution", "logit_lens", "norm_attention", "query_reading", "read"),
    "study.compare": ("Comparison", "compare"),
    "study.study": ("Study",),
    "tokens": ("Modality", "PatchGrid", "TokenMap"),
    "vlm": ("VLM",),
    "words": ("precision_recall",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "VLM", "CausalTraceResult", "Comparison", "Contextualization", "ContextualizationResult", "InformationFlowResult",
    "InputError", "Inputs", "Job", "Likelihood", "LikelihoodResult", "LogitAttribution", "LogitAttributionResult",
    "LogitLens", "LogitLensResult", "Modality", "ModelError", "MultimodalNeuronsResult", "NonFiniteError",
    "NormAttention", "NormAttentionResult", "ObjectAblationResult", "PairScores", "PatchGrid", "QueryReading",
    "QueryReadingResult", "RemoteError", "Study", "TokenMap", "ViewError", "WinogroundResult", "ablate",
    "caption_logprob", "causal_trace", "compare", "contextualization", "fit_phases", "information_flow", "knock_out",
    "load", "logit_attribution", "logit_lens", "multimodal_neurons", "norm_attention", "object_ablation", "pair_scores",
    "patch", "precision_recall", "query_reading", "read", "steer", "view", "winoground",
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
