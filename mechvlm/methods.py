"""Methods as functions: each runs one probe in one forward.

`mechvlm.read` runs several probes in one forward.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from mechvlm.inputs.batch import Answers, Inputs, as_batches, by_batch
from mechvlm.probes import logit_attribution as attribution
from mechvlm.probes.contextualization import Contextualization, ContextualizationResult
from mechvlm.probes.logit_attribution import LogitAttribution, LogitAttributionResult
from mechvlm.probes.logit_lens import LogitLens, LogitLensResult
from mechvlm.probes.norm_attention import NormAttention, NormAttentionResult
from mechvlm.probes.query_reading import QueryReading, QueryReadingResult
from mechvlm.progress import track
from mechvlm.tracing.reading import read
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


@names_options
def logit_lens(
    vlm: VLM,
    inputs: Inputs,
    k: int = 5,
    positions: str | Sequence[int] = "image",
    layers: int | Sequence[int] | None = None,
    final_norm: bool = True,
) -> LogitLensResult:
    """The k likeliest tokens of states, decoded by the unembedding: the logit lens.

    Runs the probe `LogitLens` in a forward of its own; see there for the options and the result.

    >>> lens = mv.logit_lens(vlm, inputs, k=3, positions="image")
    """
    return read(vlm, inputs, LogitLens(k, positions, layers, final_norm))[0]


@names_options
def contextualization(
    vlm: VLM, inputs: Inputs, self_pairs: bool = True, special: bool = False, subtract_baseline: bool = False
) -> ContextualizationResult:
    """Mean pairwise cosines of image and text tokens.

    Runs the probe `Contextualization` in a forward of its own; see there for the options and the
    result.

    >>> cosines = mv.contextualization(vlm, inputs)
    """
    return read(vlm, inputs, Contextualization(self_pairs, special, subtract_baseline))[0]


@names_options
def norm_attention(
    vlm: VLM, inputs: Inputs, dst: str | int | Sequence[str | int] = ("last_text", "last_image")
) -> NormAttentionResult:
    """Norm-based attention of chosen destinations.

    Runs the probe `NormAttention` in a forward of its own; see there for the options and the
    result.

    >>> norms = mv.norm_attention(vlm, inputs, dst="last")
    """
    return read(vlm, inputs, NormAttention(dst))[0]


@names_options
def query_reading(vlm: VLM, inputs: Inputs) -> QueryReadingResult:
    """The places on the image that each query reads.

    Runs the probe `QueryReading` in a forward of its own; see there for the result.

    >>> reading = mv.query_reading(vlm, inputs)
    """
    return read(vlm, inputs, QueryReading())[0]


@names_options
def logit_attribution(
    vlm: VLM, inputs: Inputs | Sequence[Inputs], answers: Answers = None, versus: Answers = None
) -> LogitAttributionResult:
    """The parts of an answer's logit that each layer, head and MLP wrote at the last position.

    In logits; with `versus`, parts of the difference of two answers' logits. Runs the probe
    `LogitAttribution`, which gives the formula; its parts sum to the model's logit.

    >>> parts = mv.logit_attribution(vlm, inputs, "red", versus="blue")

    Args:
        vlm: the model.
        inputs: a batch, or a list of batches, each one forward.
        answers: a word or a token id for all examples, or one per example over all batches in
            order; None: the token that the model itself would write first.
        versus: the same, for the answer whose logit is subtracted; None subtracts nothing.

    Raises:
        InputError: for another number of answers than examples, or an answer that is no token.
        ValueError: when an answer is its own `versus`.
    """
    batches = as_batches(inputs)
    work = list(zip(batches, by_batch(batches, answers), by_batch(batches, versus), strict=True))
    return attribution.merge(
        [read(vlm, batch, LogitAttribution(a, b))[0] for batch, a, b in track(work, "logit attribution, batches")]
    )
