"""read(): any number of probes in one forward. The only loop over layers.

A probe is asked at every layer for a small tensor made of what passes by, inside the trace; nothing of the size of the
residual stream is kept. Layers are states: 0 is what enters the decoder (the embeddings), l is what leaves its l-th
layer, n_layers is what the final norm and the unembedding read.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, overload

import nnsight
import torch
from torch import Tensor

from mechvlm.accessors import Attention
from mechvlm.batches import Answers, as_batches, by_batch
from mechvlm.errors import InputError, NonFiniteError
from mechvlm.inputs import Inputs
from mechvlm.jobs import Job
from mechvlm.probes.contextualization import Contextualization, ContextualizationResult
from mechvlm.probes.logit_attribution import LogitAttribution, LogitAttributionResult, merge
from mechvlm.probes.logit_lens import LogitLens, LogitLensResult
from mechvlm.probes.norm_attention import NormAttention, NormAttentionResult
from mechvlm.probes.query_reading import QueryReading, QueryReadingResult
from mechvlm.progress import track
from mechvlm.remote import backend_for
from mechvlm.results import Result
from mechvlm.tokens import Modality
from mechvlm.vlm import VLM


class State(NamedTuple):
    """The residual stream at one layer, 0 to n_layers, as a probe is given it.

    resid: [batch pos d_model], before the next layer; final_norm, unembed: the model's own, callable.
    """

    layer: int
    resid: Tensor
    final_norm: Callable[[Tensor], Tensor]
    unembed: Callable[[Tensor], Tensor]


class Attended(NamedTuple):
    """The attention that makes state `layer` (1 to n_layers) out of the one before.

    parts: what the weights are computed from; w_o: [d_model, head * d_head], the output projection's weight.
    """

    layer: int
    parts: Attention
    w_o: Tensor


class Written(NamedTuple):
    """What layer `layer` (1 to n_layers) wrote to the residual stream, to make state `layer` out of the one before.

    z: [batch pos head d_head], the heads' outputs before W_O; attn_out, mlp_out: [batch pos d_model]; parts: what z is
    computed from; w_o: [d_model, head * d_head] and b_o: [d_model] or None, the output projection's; final_norm, unembed: the
    model's own.
    """

    layer: int
    z: Tensor
    attn_out: Tensor
    mlp_out: Tensor
    parts: Attention
    w_o: Tensor
    b_o: Tensor | None
    final_norm: Callable[[Tensor], Tensor]
    unembed: Callable[[Tensor], Tensor]


class Probe(Protocol):
    """What read() asks of a probe. Write your own: `Contextualization` is the shortest to start from.

    `prepare` runs before the forward and turns names into positions; the `at_` methods run inside it, on the model's
    device, and give a dict of small tensors (or None); `result` is given those dicts, in the order of the layers.
    """

    reads: frozenset[str]
    """Which of "states", "attention", "writes", "queries" it wants: `at_state`, `at_attention`, `at_writes`, `at_queries`."""

    def prepare(self, vlm: VLM, inputs: Inputs) -> Any: ...

    def result(self, plan: Any, rows: list[dict[str, Tensor]], vlm: VLM, inputs: Inputs) -> Result: ...


@overload
def read(vlm: VLM, inputs: Inputs, *probes) -> tuple: ...


@overload
def read(vlm: VLM, inputs: Inputs, *probes, blocking: Literal[False], job_id: str | None = None) -> Job: ...


def read(vlm: VLM, inputs: Inputs, *probes, blocking: bool = True, job_id: str | None = None) -> tuple | Job:
    """Run ONE forward and give each probe's result, in their order.

    With `blocking=False`, of a model on NDIF, nobody waits: what comes back is a `mechvlm.jobs.Job`, whose `result()` is that
    tuple. The same call with the job's id finds it again, in another process too, and sends nothing.

    Raises:
        InputError: from the job's `result()`, when the job with this id was given other inputs or other probes.
        RemoteError: where NDIF gave no result; it says why, and what to do.
        NonFiniteError: when a state holds NaN or infinity; it names the layer and the examples.
        ValueError: when no probe is given, or one asks for positions that are not there.
    """
    if not probes:
        raise ValueError("read() was given no probe. Try mechvlm.read(vlm, inputs, mechvlm.LogitLens()).")
    if not isinstance(inputs, Inputs):
        raise ValueError(f"read() takes what vlm.inputs(image, prompt) gives, not {type(inputs).__name__}.")
    strange = [type(probe).__name__ for probe in probes if not hasattr(probe, "prepare")]
    if strange:
        raise ValueError(
            f"read() takes probes one by one, mechvlm.read(vlm, inputs, mechvlm.LogitLens(), ...); got {strange}."
        )
    plans = [probe.prepare(vlm, inputs) for probe in probes]
    wants = frozenset().union(*(probe.reads for probe in probes))
    real = torch.stack([m.modality != Modality.PADDING for m in inputs.token_maps])
    real = real if vlm.apart else real.to(vlm.device)
    n = vlm.n_layers
    crosses = vlm.cross_attentions if "queries" in wants else []

    def results(found: dict[str, Any]) -> tuple:
        rows = found["rows"]
        _refuse_nonfinite(torch.stack([f.cpu() for f in found["finite"]]), vlm)
        return tuple(
            probe.result(plan, [row for row in kept if row is not None], vlm, inputs)
            for probe, plan, kept in zip(probes, plans, rows, strict=True)
        )

    question = "" if blocking else _question(inputs, probes)
    if job_id is not None:
        return Job(backend_for(vlm, blocking=False, job_id=job_id), lambda found: results(_answer_to(question, found)))

    with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1, blocking=blocking) as tracer:
        asked = nnsight.save([question])
        rows = nnsight.save([[] for _ in probes])
        finite = nnsight.save([])
        norm, unembed = vlm.part(vlm.record.norm), vlm.part(vlm.record.unembed)
        for number, cross in enumerate(crosses):
            (_, q, k, *_), options = getattr(cross.source, vlm.record.attention_call).inputs
            for probe, plan, kept in zip(probes, plans, rows, strict=True):
                if "queries" in probe.reads:
                    kept.append(exactly(probe.at_queries, plan, number, q, k, options["scaling"]))
        for layer in range(n + 1):
            resid = vlm.resid_pre[layer] if layer < n else vlm.resid_post[n - 1]
            finite.append(is_finite(resid, real))
            state = State(layer, resid, norm, unembed)
            for probe, plan, kept in zip(probes, plans, rows, strict=True):
                if "states" in probe.reads:
                    kept.append(exactly(probe.at_state, plan, state))
            if layer == n or not wants & {"attention", "writes"}:
                continue
            o_proj = vlm.part(vlm.record.o_proj, layer)
            parts, w_o, b_o = vlm.attention[layer], o_proj.weight, o_proj.bias
            attended = Attended(layer + 1, parts, w_o)
            for probe, plan, kept in zip(probes, plans, rows, strict=True):
                if "attention" in probe.reads:
                    kept.append(exactly(probe.at_attention, plan, attended))
            if "writes" in wants:
                writes = vlm.z[layer], vlm.attn_out[layer], vlm.mlp_out[layer]
                written = Written(layer + 1, *writes, parts, w_o, b_o, norm, unembed)
                for probe, plan, kept in zip(probes, plans, rows, strict=True):
                    if "writes" in probe.reads:
                        kept.append(exactly(probe.at_writes, plan, written))

    if not blocking:
        return Job(tracer.backend, results)
    return results({"asked": asked, "rows": rows, "finite": finite})


def _question(inputs: Inputs, probes: tuple) -> str:
    """What a job is asked, as a digest that goes with it: whoever collects it shows the same."""
    digest = hashlib.sha256(inputs.model.encode())
    for name, value in sorted(inputs.encoding.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().cpu().numpy().tobytes())
    # What has no repr of its own shows its address, which is another one in another process.
    digest.update("\n".join(re.sub(r" at 0x[0-9a-f]+", "", repr(probe)) for probe in probes).encode())
    return digest.hexdigest()


def _answer_to(question: str, found: dict[str, Any]) -> dict[str, Any]:
    if found.get("asked") != [question]:
        raise InputError(
            "This job was asked something else than is collected here. Give the model, the inputs and the probes that it was "
            "submitted with, or vlm.job(id) for what it saved, as it is."
        )
    return found


def exactly(measure: Callable, *args):
    """measure(*args) in the precision that it asks for: NDIF runs blocks under autocast where a model is in half precision."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        return measure(*args)


def is_finite(resid: Tensor, real: Tensor) -> Tensor:
    """Per example [batch]: whether all its positions but padding hold finite numbers."""
    # One sum a position: NaN and infinity survive it, and [batch pos d_model] booleans are never made.
    sums = resid.float().abs().amax(-1) if resid.dtype == torch.float16 else resid.sum(-1)
    return (torch.isfinite(sums) | ~real.to(sums.device)).all(-1)


def _refuse_nonfinite(finite: Tensor, vlm: VLM) -> None:
    bad = tuple((~finite.all(0)).nonzero().squeeze(-1).tolist())
    if not bad:
        return
    first = int((~finite[:, list(bad)]).any(1).nonzero()[0, 0])
    where = "the embeddings that enter the decoder" if first == 0 else f"layer {first} of {vlm.n_layers}"
    if vlm.dtype == torch.float16:
        why = "In float16 large activations overflow: load with dtype='bfloat16' or 'float32'."
    elif first == 0:
        why = "They already enter the decoder so: look at the image's pixels and the vision encoder's weights."
    else:
        why = "The weights of that layer, or what was assigned to it, may hold NaN."
    raise NonFiniteError(
        f"Activations of {vlm.name} are NaN or infinite from {where} on, in example(s) {list(bad)} of this batch. {why}",
        examples=bad,
    )


def logit_lens(vlm: VLM, inputs: Inputs, **options) -> LogitLensResult:
    """Top-k tokens of states through the unembedding; `options` are those of the probe `LogitLens`."""
    return read(vlm, inputs, LogitLens(**options))[0]


def contextualization(vlm: VLM, inputs: Inputs, **options) -> ContextualizationResult:
    """Mean pairwise cosines by layer; `options` are those of the probe `Contextualization`."""
    return read(vlm, inputs, Contextualization(**options))[0]


def norm_attention(vlm: VLM, inputs: Inputs, **options) -> NormAttentionResult:
    """Norm-based attention by layer; `options` are those of the probe `NormAttention`."""
    return read(vlm, inputs, NormAttention(**options))[0]


def query_reading(vlm: VLM, inputs: Inputs) -> QueryReadingResult:
    """Where on the image each query reads: the probe `QueryReading`."""
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
    asked = list(zip(batches, by_batch(batches, answers), by_batch(batches, versus), strict=True))
    return merge(
        [read(vlm, one, LogitAttribution(a, b))[0] for one, a, b in track(asked, "logit attribution, batches")]
    )
