"""Look inside vision-language models: where image and text tokens meet, layer by layer."""

import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechvlm import bundled, datasets, figures, study, view
    from mechvlm.errors import InputError, ModelError, NonFiniteError, RemoteError, ViewError
    from mechvlm.experiments.causal_trace import CausalTraceResult, causal_trace
    from mechvlm.experiments.contextualization_controls import contextualization_controls
    from mechvlm.experiments.contextualization_controls_result import ContextualizationControlsResult
    from mechvlm.experiments.head_ablation import head_ablation
    from mechvlm.experiments.head_ablation_result import HeadAblationResult, HeadSetsResult
    from mechvlm.experiments.information_flow import InformationFlowResult, information_flow
    from mechvlm.experiments.multimodal_neurons import multimodal_neurons
    from mechvlm.experiments.multimodal_neurons_result import MultimodalNeuronsResult
    from mechvlm.experiments.object_ablation import ObjectAblationResult, object_ablation
    from mechvlm.experiments.patch_grid import patch_grid
    from mechvlm.experiments.patch_grid_result import PatchGridResult
    from mechvlm.experiments.winoground import caption_logprob, winoground
    from mechvlm.experiments.winoground_result import PairScores, WinogroundResult, pair_scores
    from mechvlm.experiments.word_reading import word_reading
    from mechvlm.experiments.word_reading_result import WordReadingResult
    from mechvlm.inputs.answer import Answer
    from mechvlm.inputs.batch import Inputs
    from mechvlm.inputs.batches import Batches
    from mechvlm.inputs.grids import PatchGrid
    from mechvlm.inputs.tokens import Modality, TokenMap
    from mechvlm.measures.phase_fit import fit_phases
    from mechvlm.measures.words import precision_recall
    from mechvlm.methods import (
        contextualization,
        logit_attribution,
        logit_lens,
        memory_attention,
        norm_attention,
        query_reading,
    )
    from mechvlm.ndif.jobs import Job
    from mechvlm.probes.attention_share import AttentionShare
    from mechvlm.probes.contextualization import Contextualization, ContextualizationResult
    from mechvlm.probes.likelihood import Likelihood, LikelihoodResult
    from mechvlm.probes.localization import LocalizationHeads, LocalizationHeadsResult
    from mechvlm.probes.logit_attribution import LogitAttribution, LogitAttributionResult
    from mechvlm.probes.logit_lens import LogitLens, LogitLensResult
    from mechvlm.probes.memory_attention import MemoryAttention, MemoryAttentionResult
    from mechvlm.probes.norm_attention import NormAttention, NormAttentionResult
    from mechvlm.probes.query_reading import QueryReading, QueryReadingResult
    from mechvlm.probes.shares import AttentionShareResult
    from mechvlm.results import concat
    from mechvlm.study.compare import Comparison, compare
    from mechvlm.study.study import Study
    from mechvlm.tracing.interventions import ablate, knock_out, patch, steer
    from mechvlm.tracing.reading import read
    from mechvlm.tracing.reweighting import reweight
    from mechvlm.vlm.loading import load
    from mechvlm.vlm.vlm import VLM

# The file that defines each public name, room by room. A name is imported when it is first used, so
# that `mechvlm --help` does not wait for torch.
_HOMES = {
    "errors": ("InputError", "ModelError", "NonFiniteError", "RemoteError", "ViewError"),
    "inputs.answer": ("Answer",),
    "inputs.batch": ("Inputs",),
    "inputs.batches": ("Batches",),
    "inputs.grids": ("PatchGrid",),
    "inputs.tokens": ("Modality", "TokenMap"),
    "measures.phase_fit": ("fit_phases",),
    "measures.words": ("precision_recall",),
    "ndif.jobs": ("Job",),
    "probes.attention_share": ("AttentionShare",),
    "probes.contextualization": ("Contextualization", "ContextualizationResult"),
    "probes.likelihood": ("Likelihood", "LikelihoodResult"),
    "probes.localization": ("LocalizationHeads", "LocalizationHeadsResult"),
    "probes.logit_attribution": ("LogitAttribution", "LogitAttributionResult"),
    "probes.logit_lens": ("LogitLens", "LogitLensResult"),
    "probes.memory_attention": ("MemoryAttention", "MemoryAttentionResult"),
    "probes.norm_attention": ("NormAttention", "NormAttentionResult"),
    "probes.query_reading": ("QueryReading", "QueryReadingResult"),
    "probes.shares": ("AttentionShareResult",),
    "results": ("concat",),
    "vlm.loading": ("load",),
    "vlm.vlm": ("VLM",),
    "tracing.interventions": ("ablate", "knock_out", "patch", "steer"),
    "tracing.reading": ("read",),
    "tracing.reweighting": ("reweight",),
    "experiments.causal_trace": ("CausalTraceResult", "causal_trace"),
    "experiments.contextualization_controls": ("contextualization_controls",),
    "experiments.contextualization_controls_result": ("ContextualizationControlsResult",),
    "experiments.head_ablation": ("head_ablation",),
    "experiments.head_ablation_result": ("HeadAblationResult", "HeadSetsResult"),
    "experiments.information_flow": ("InformationFlowResult", "information_flow"),
    "experiments.multimodal_neurons": ("multimodal_neurons",),
    "experiments.multimodal_neurons_result": ("MultimodalNeuronsResult",),
    "experiments.object_ablation": ("ObjectAblationResult", "object_ablation"),
    "experiments.patch_grid": ("patch_grid",),
    "experiments.patch_grid_result": ("PatchGridResult",),
    "experiments.winoground": ("caption_logprob", "winoground"),
    "experiments.winoground_result": ("PairScores", "WinogroundResult", "pair_scores"),
    "methods": (
        "contextualization",
        "logit_attribution",
        "logit_lens",
        "memory_attention",
        "norm_attention",
        "query_reading",
    ),
    "experiments.word_reading": ("word_reading",),
    "experiments.word_reading_result": ("WordReadingResult",),
    "study.compare": ("Comparison", "compare"),
    "study.study": ("Study",),
}
_MODULES = ("bundled", "datasets", "figures", "study", "view")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "VLM", "Answer", "AttentionShare", "AttentionShareResult", "Batches", "CausalTraceResult", "Comparison",
    "Contextualization", "ContextualizationControlsResult", "ContextualizationResult", "HeadAblationResult",
    "HeadSetsResult", "InformationFlowResult", "InputError", "Inputs", "Job", "Likelihood", "LikelihoodResult",
    "LocalizationHeads", "LocalizationHeadsResult", "LogitAttribution", "LogitAttributionResult", "LogitLens",
    "LogitLensResult", "MemoryAttention", "MemoryAttentionResult", "Modality", "ModelError",
    "MultimodalNeuronsResult", "NonFiniteError", "NormAttention", "NormAttentionResult", "ObjectAblationResult",
    "PairScores", "PatchGrid", "PatchGridResult", "QueryReading", "QueryReadingResult", "RemoteError", "Study",
    "TokenMap", "ViewError", "WinogroundResult", "WordReadingResult", "ablate", "bundled", "caption_logprob",
    "causal_trace", "compare", "concat", "contextualization", "contextualization_controls", "datasets", "figures",
    "fit_phases", "head_ablation", "information_flow", "knock_out", "load", "logit_attribution", "logit_lens",
    "memory_attention", "multimodal_neurons", "norm_attention", "object_ablation", "pair_scores", "patch",
    "patch_grid", "precision_recall", "query_reading", "read", "reweight", "steer", "study", "view", "winoground",
    "word_reading",
]  # fmt: skip


if "ipykernel" in sys.modules:
    # In a notebook without ipywidgets tqdm, which transformers imports, would warn in red.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("tqdm.auto")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("mechvlm")
    if name in _MODULES:
        return import_module(f"mechvlm.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mechvlm' has no attribute {name!r}")
    value = getattr(import_module(f"mechvlm.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
