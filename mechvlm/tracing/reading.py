"""read(): any number of probes in one forward. It knows no probe by name.

1. Every probe prepares a plan, before the forward (`mechvlm.probes.probe` says what a probe is).
2. One trace runs the forward. `_readings` goes through it in its order, and reads only what one of
   the probes has a method for.
3. Every reading goes to the method of each probe that has it. A probe gives a small row back:
   nothing of the size of the residual stream outlives its layer.
4. Whether each state is finite is noted on the way. NaN is refused, with the layer where it begins.
5. Every probe makes its result out of its rows.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import nnsight
import torch
from torch import Tensor

from mechvlm.decoder.attention import read_attention
from mechvlm.errors import InputError, NonFiniteError
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import Modality
from mechvlm.ndif.jobs import Job
from mechvlm.ndif.requests import backend_for
from mechvlm.probes.probe import READS, Attended, Queried, State, Written
from mechvlm.vlm.vlm import VLM


@overload
def read(vlm: VLM, inputs: Inputs, *probes) -> tuple: ...


@overload
def read(vlm: VLM, inputs: Inputs, *probes, blocking: Literal[False], job_id: str | None = None) -> Job: ...


def read(vlm: VLM, inputs: Inputs, *probes, blocking: bool = True, job_id: str | None = None) -> tuple | Job:
    """Run ONE forward and return each probe's result, in the order of the probes.

    >>> lens, norms = mv.read(vlm, inputs, mv.LogitLens(k=5), mv.NormAttention(dst="last"))

    Args:
        vlm: the model.
        inputs: what `vlm.inputs(image, prompt)` gives.
        probes: `mv.LogitLens()` and its kin, or probes of your own (`mechvlm.probes.probe`).
        blocking: False leaves the work on NDIF and returns a `mechvlm.Job`, whose `result()` is the
            same tuple.
        job_id: the id of a job that the same call with `blocking=False` began, in this process or
            another: the job is found again, and nothing is sent.

    Raises:
        InputError: from the job's `result()`, when the job with this id was given other inputs or
            other probes.
        RemoteError: when NDIF gave no result; it says why, and what to do.
        NonFiniteError: when a state holds NaN or infinity; it names the layer and the examples.
        ValueError: when no probe is given, or one asks for positions that are not there.
    """
    _refuse_unreadable(inputs, probes)
    plans = [probe.prepare(vlm, inputs) for probe in probes]
    wanted = {method for method in READS for probe in probes if hasattr(probe, method)}
    real = torch.stack([m.modality != Modality.PADDING for m in inputs.token_maps])
    real = real.to(vlm.device) if vlm.has_weights else real

    def results(saved: dict[str, Any]) -> tuple:
        _require_whole(saved, probes, vlm)
        _refuse_nonfinite(torch.stack([f.cpu() for f in saved["finite"]]), vlm)
        return tuple(
            probe.result(plan, [row for row in kept if row is not None], vlm, inputs)
            for probe, plan, kept in zip(probes, plans, saved["rows"], strict=True)
        )

    question = "" if blocking else _question(inputs, probes)
    if job_id is not None:
        request = backend_for(vlm, blocking=False, job_id=job_id)
        return Job(request, lambda saved: results(_answer_to(question, saved)))

    with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1, blocking=blocking) as tracer:
        # A job's result holds these by their names: `_answer_to` compares `asked`.
        asked = nnsight.save([question])  # noqa: F841
        rows = nnsight.save([[] for _ in probes])
        finite = nnsight.save([])
        for method, reading in _readings(vlm, wanted):
            if method == "at_state":
                finite.append(is_finite(reading.resid, real))
            for probe, plan, kept in zip(probes, plans, rows, strict=True):
                if hasattr(probe, method):
                    kept.append(without_autocast(getattr(probe, method), plan, reading))

    if not blocking:
        return Job(tracer.backend, results)
    return results({"rows": rows, "finite": finite})


def _readings(vlm, wanted: set[str]) -> Iterator[tuple[str, Any]]:
    """Inside a trace: each reading, in the order of the forward, after the name of its method."""
    norm, unembed = vlm.readout()
    if "at_queries" in wanted:
        for number, module in enumerate(vlm.cross_attentions):
            yield "at_queries", Queried(number, read_attention(module, vlm.record))
    for layer in range(vlm.n_layers):
        yield "at_state", State(layer, vlm.resid_pre[layer], norm, unembed)
        if not wanted & {"at_attention", "at_writes"}:
            continue
        o_proj = vlm.projection("o_proj", layer)
        parts, w_o, b_o = vlm.attention[layer], o_proj.weight, o_proj.bias
        if "at_attention" in wanted:
            yield "at_attention", Attended(layer, parts, w_o)
        if "at_writes" in wanted:
            writes = vlm.z[layer], vlm.attn_out[layer], vlm.mlp_out[layer]
            yield "at_writes", Written(layer, *writes, parts, w_o, b_o, norm, unembed)
    yield "at_state", State(vlm.n_layers, vlm.resid_post[vlm.n_layers - 1], norm, unembed)


def _refuse_unreadable(inputs: Any, probes: tuple) -> None:
    if not probes:
        raise ValueError("read() was given no probe. Try mechvlm.read(vlm, inputs, mechvlm.LogitLens()).")
    if not isinstance(inputs, Inputs):
        raise ValueError(f"read() takes what vlm.inputs(image, prompt) gives, not {type(inputs).__name__}.")
    classes = [probe.__name__ for probe in probes if isinstance(probe, type)]
    if classes:
        raise ValueError(f"read() takes probes, not their classes {classes}: write {classes[0]}(), with its options.")
    strange = [type(probe).__name__ for probe in probes if not hasattr(probe, "prepare")]
    if strange:
        raise ValueError(
            f"read() takes probes one by one, mechvlm.read(vlm, inputs, mechvlm.LogitLens(), ...); got {strange}."
        )
    idle = [type(probe).__name__ for probe in probes if not any(hasattr(probe, method) for method in READS)]
    if idle:
        raise ValueError(f"These probes read nothing: {idle}. Give each one or more of the methods {', '.join(READS)}.")


def _require_whole(saved: dict[str, Any], probes: tuple, vlm: VLM) -> None:
    """Refuse a forward of which readings are missing: the results would be of some layers only."""
    n_layers = vlm.n_layers
    calls = {"at_state": n_layers + 1, "at_attention": n_layers, "at_writes": n_layers}
    calls["at_queries"] = len(vlm.cross_attentions)
    counts = {"finite": (len(saved["finite"]), n_layers + 1)}
    for probe, rows in zip(probes, saved["rows"], strict=True):
        expected = sum(n for method, n in calls.items() if hasattr(probe, method))
        counts[type(probe).__name__] = (len(rows), expected)
    lacking = [f"{name} {got} of {expected}" for name, (got, expected) in counts.items() if got != expected]
    if lacking:
        raise RuntimeError(
            f"The forward of {vlm.name} gave readings of some layers only ({', '.join(lacking)}), so there is no result. "
            "Did another trace of the same model run meanwhile, outside of mechvlm? Read again when it has ended."
        )


def _question(inputs: Inputs, probes: tuple) -> str:
    """A digest of inputs and probes: it travels with a job, and must be the same to collect it."""
    digest = hashlib.sha256(inputs.model.encode())
    for name, value in sorted(inputs.encoding.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().cpu().numpy().tobytes())
    # The default repr shows an object's address, which differs from process to process.
    asked_for = "\n".join(re.sub(r" at 0x[0-9a-f]+", "", repr(probe)) for probe in probes)
    # Earlier versions called the lens's states layers: a job that they left is still collected.
    digest.update(asked_for.replace("states=", "layers=").encode())
    # The repr of a long array leaves its middle out.
    for value in (value for probe in probes for value in getattr(probe, "__dict__", {}).values()):
        for part in value if isinstance(value, list | tuple) else [value]:
            if hasattr(part, "tolist"):
                digest.update(str(part.tolist()).encode())
    return digest.hexdigest()


def _answer_to(question: str, saved: dict[str, Any]) -> dict[str, Any]:
    if saved.get("asked") != [question]:
        raise InputError(
            "This job was asked something else: its model, inputs or probes are not those given here. Give those that it "
            "was submitted with, or take what it saved, as it is, from vlm.job(id).result()."
        )
    return saved


def without_autocast(measure: Callable, *args):
    """measure(*args), outside of the autocast under which NDIF runs models in half precision."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        return measure(*args)


def is_finite(resid: Tensor, real: Tensor) -> Tensor:
    """Whether all of an example's positions but padding hold finite numbers, [batch].

    `resid` is [batch pos d_model], and `real` is [batch pos], False at padding.
    """
    # One sum a position keeps NaN and infinity, and needs no [batch pos d_model] booleans. A sum
    # can overflow in float16, so the largest entry stands for it there.
    sums = resid.float().abs().amax(-1) if resid.dtype == torch.float16 else resid.sum(-1)
    return (torch.isfinite(sums) | ~real.to(sums.device)).all(-1)


def _refuse_nonfinite(finite: Tensor, vlm: VLM) -> None:
    bad = tuple((~finite.all(0)).nonzero().squeeze(-1).tolist())
    if not bad:
        return
    first = int((~finite[:, list(bad)]).any(1).nonzero()[0, 0])
    where = (
        "the embeddings that enter the decoder"
        if first == 0
        else f"the output of layer {first - 1} (of layers 0 to {vlm.n_layers - 1})"
    )
    if vlm.dtype == torch.float16:
        why = "In float16 large activations overflow: load with dtype='bfloat16' or 'float32'."
    elif first == 0:
        why = "The decoder's input holds them already: check the image's pixels and the vision encoder's weights."
    else:
        why = "The weights of that layer, or what was assigned to it, may hold NaN."
    raise NonFiniteError(
        f"Activations of {vlm.name} are NaN or infinite from {where} on, in example(s) {list(bad)} of this batch. {why}",
        examples=bad,
    )
