"""Methods as functions: each runs one probe in one forward a batch.

`inputs` are what `vlm.inputs` gives, or a list of batches; results of several batches are joined.
`mechvlm.read` runs several probes in one forward.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from mechvlm.errors import refuse_renamed
from mechvlm.inputs.batches import Answers
from mechvlm.probes.contextualization import Contextualization, ContextualizationResult
from mechvlm.probes.logit_attribution import LogitAttribution, LogitAttributionResult
from mechvlm.probes.logit_lens import LogitLens, LogitLensResult
from mechvlm.probes.memory_attention import MemoryAttention, MemoryAttentionResult
from mechvlm.probes.norm_attention import NormAttention, NormAttentionResult
from mechvlm.probes.query_reading import QueryReading, QueryReadingResult
from mechvlm.tracing.reading import Readable, read
from mechvlm.vlm.vlm import VLM

P, R = ParamSpec("P"), TypeVar("R")


def names_options(method: Callable[P, R]) -> Callable[P, R]:
    """The method, whose TypeError about an unknown option names the options that there are."""
    _, _, *options = inspect.signature(method).parameters

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := sorted(kwargs.keys() - {"vlm", "inputs", *options}):
            there = f"its options are {', '.join(options)}" if options else "it has none"
            raise TypeError(f"{method.__name__} has no option {', '.join(unknown)}; {there}.")
        return method(*args, **kwargs)

    return call


@refuse_renamed(layers="states")
@names_options
def logit_lens(
    vlm: VLM,
    inputs: Readable,
    k: int = 5,
    positions: Any = "image",
    states: Any = None,
    final_norm: bool = True,
) -> LogitLensResult:
    """The k likeliest tokens of states, decoded by the unembedding: the logit lens.

    Runs the probe `LogitLens` in a forward of its own; see there for the options and the result.

    >>> lens = mv.logit_lens(vlm, inputs, k=3, positions="image")
    """
    return read(vlm, inputs, LogitLens(k, positions, states, final_norm))[0]


@names_options
def contextualization(
    vlm: VLM, inputs: Readable, self_pairs: bool = True, special: bool = False, subtract_baseline: bool = False
) -> ContextualizationResult:
    """Mean pairwise cosines of image and text tokens.

    Runs the probe `Contextualization` in a forward of its own; see there for the options and the
    result.

    >>> cosines = mv.contextualization(vlm, inputs)
    """
    return read(vlm, inputs, Contextualization(self_pairs, special, subtract_baseline))[0]


@names_options
def norm_attention(vlm: VLM, inputs: Readable, dst: Any = ("last_text", "last_image")) -> NormAttentionResult:
    """Norm-based attention of chosen destinations.

    Runs the probe `NormAttention` in a forward of its own; see there for the options and the
    result.

    >>> norms = mv.norm_attention(vlm, inputs, dst="last")
    """
    return read(vlm, inputs, NormAttention(dst))[0]


@names_options
def memory_attention(vlm: VLM, inputs: Readable, dst: Any = "last_text") -> MemoryAttentionResult:
    """Norm-based attention of chosen destinations to the image's memory (Mllama, Idefics).

    Runs the probe `MemoryAttention` in a forward of its own; see there for the formula, the options
    and the result.

    >>> memory = mv.memory_attention(vlm, inputs, dst="last")
    """
    return read(vlm, inputs, MemoryAttention(dst))[0]


@names_options
def query_reading(vlm: VLM, inputs: Readable) -> QueryReadingResult:
    """The places on the image that each query reads.

    Runs the probe `QueryReading` in a forward of its own; see there for the result.

    >>> reading = mv.query_reading(vlm, inputs)
    """
    return read(vlm, inputs, QueryReading())[0]


@names_options
def logit_attribution(
    vlm: VLM, inputs: Readable, answers: Answers = None, versus: Answers = None
) -> LogitAttributionResult:
    """The parts of an answer's logit that each layer, head and MLP wrote at the last position.

    In logits; with `versus`, parts of the difference of two answers' logits. Runs the probe
    `LogitAttribution`, which gives the formula; its parts sum to the model's logit.

    >>> parts = mv.logit_attribution(vlm, inputs, "red", versus="blue")

    Args:
        vlm: the model.
        inputs: one batch or several, each one forward.
        answers: a word or a token id for all examples, or one per example over all batches in
            order; None: the token that the model itself would write first.
        versus: the same, for the answer whose logit is subtracted; None subtracts nothing.

    Raises:
        InputError: for another number of answers than examples, or an answer that is no token.
        ValueError: when an answer is its own `versus`.
    """
    return read(vlm, inputs, LogitAttribution(answers, versus))[0]
