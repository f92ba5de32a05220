"""One call a method: each runs one forward with one probe. Several in one forward: `mechvlm.read`."""

from collections.abc import Sequence

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


def logit_lens(
    vlm: VLM,
    inputs: Inputs,
    k: int = 5,
    positions: str | Sequence[int] = "image",
    layers: Sequence[int] | None = None,
    final_norm: bool = True,
) -> LogitLensResult:
    """The k likeliest tokens of states, through the unembedding: the probe `LogitLens`, in a forward of its own."""
    return read(vlm, inputs, LogitLens(k, positions, layers, final_norm))[0]


def contextualization(
    vlm: VLM, inputs: Inputs, self_pairs: bool = True, special: bool = False, subtract_baseline: bool = False
) -> ContextualizationResult:
    """Mean pairwise cosines of image and text tokens: the probe `Contextualization`, in a forward of its own."""
    return read(vlm, inputs, Contextualization(self_pairs, special, subtract_baseline))[0]


def norm_attention(
    vlm: VLM, inputs: Inputs, dst: str | int | Sequence[str | int] = ("last_text", "last_image")
) -> NormAttentionResult:
    """Norm-based attention of chosen destinations: the probe `NormAttention`, in a forward of its own."""
    return read(vlm, inputs, NormAttention(dst))[0]


def query_reading(vlm: VLM, inputs: Inputs) -> QueryReadingResult:
    """Where on the image each query reads: the probe `QueryReading`, in a forward of its own."""
    return read(vlm, inputs, QueryReading())[0]


def logit_attribution(
    vlm: VLM, inputs: Inputs | Sequence[Inputs], answers: Answers = None, versus: Answers = None
) -> LogitAttributionResult:
    """What each layer, head and MLP wrote toward an answer's logit at the last position, or the difference of two (logits).

    The formula is the probe's, `LogitAttribution`; its parts sum to the model's logit.

    Args:
        vlm: the model.
        inputs: a batch, or a list of batches, each one forward.
        answers: a word or a token id for all examples, or one per example over all batches in order; None: the token that
            the model itself would write first.
        versus: the same, for the answer whose logit is subtracted; None subtracts nothing.

    Raises:
        InputError: for another number of answers than examples, or an answer that is no token.
        ValueError: when an answer is its own `versus`.
    """
    batches = as_batches(inputs)
    each = list(zip(batches, by_batch(batches, answers), by_batch(batches, versus), strict=True))
    return attribution.merge(
        [read(vlm, batch, LogitAttribution(a, b))[0] for batch, a, b in track(each, "logit attribution, batches")]
    )
