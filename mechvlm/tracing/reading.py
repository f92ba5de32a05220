"""read(): any number of probes in one forward a batch. It knows no probe by name.

`read_batch` reads one batch:

1. Every probe prepares a plan, before the forward (`mechvlm.probes.probe` says what a probe is).
2. One trace runs the forward. `_readings` goes through it in its order, and reads only what one of
   the probes has a method for.
3. Every reading goes to the method of each probe that has it. A probe gives a small row back:
   nothing of the size of the residual stream outlives its layer.
4. Whether each state is finite is noted on the way. NaN is refused, with the layer where it begins.
5. Every probe makes its result out of its rows.

`read` takes batch after batch, halves those that do not fit into memory, and joins the results.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import nnsight
import torch
from torch import Tensor

from mechvlm.decoder.attention import read_attention
from mechvlm.errors import InputError, NonFiniteError, RemoteError
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import Batches, as_batches
from mechvlm.inputs.tokens import Modality
from mechvlm.ndif.jobs import Job
from mechvlm.ndif.requests import backend_for
from mechvlm.probes.probe import READS, Attended, Queried, State, Written
from mechvlm.results import Result, concat, stack
from mechvlm.tracing.memory import over_batches
from mechvlm.vlm.encoding import require_cpu_default
from mechvlm.vlm.vlm import VLM

Readable = Inputs | Batches | Sequence[Inputs]
"""One batch or several."""


@overload
def read(vlm: VLM, inputs: Readable, *probes) -> tuple: ...


@overload
def read(vlm: VLM, inputs: Readable, *probes, blocking: Literal[False], job_id: str | None = None) -> Job: ...


def read(vlm: VLM, inputs: Readable, *probes, blocking: bool = True, job_id: str | None = None) -> tuple | Job:
    """Run ONE forward a batch and return each probe's result, in the order of the probes.

    >>> lens, norms = mv.read(vlm, inputs, mv.LogitLens(k=5), mv.NormAttention(dst="last"))

    Of several batches one is in memory at a time. Their results are joined as by `mv.concat`:
    examples are numbered through. A batch that does not fit into memory is halved, and a warning
    says what size fitted.

    Args:
        vlm: the model.
        inputs: what `vlm.inputs(images, prompts)` gives, with or without a batch_size, or a list of
            batches.
        probes: `mv.LogitLens()` and its kin, or probes of your own (`mechvlm.probes.probe`).
            Settings that hold something for each example hold it for those of all batches.
        blocking: False leaves the work on NDIF and returns a `mechvlm.Job`, whose `result()` is the
            same tuple. It takes one batch.
        job_id: the id of a job that the same call with `blocking=False` began, in this process or
            another: the job is found again, and nothing is sent.

    Raises:
        InputError: for several batches with blocking=False, or results of several batches that
            cannot be joined; from the job's `result()`, when the job with this id was given other
            inputs or other probes.
        RemoteError: when NDIF gave no result; it says why, and what to do.
        NonFiniteError: when a state holds NaN or infinity; it names the layer and the examples.
        ValueError: when no probe is given, or one asks for positions that are not there.
        torch.OutOfMemoryError: when an example does not fit into memory even alone.
    """
    _refuse_unreadable(probes)
    batches = as_batches(inputs)
    if not blocking or job_id is not None:
        if len(batches) > 1:
            raise InputError(
                f"blocking=False sends one job, and {len(batches)} batches were given. Send one job a batch, jobs = "
                "[mv.read(vlm, batch, ..., blocking=False) for batch in batches], and join what they give: "
                "[mv.concat(parts) for parts in zip(*(job.result() for job in jobs))]."
            )
        return read_batch(vlm, batches[0], *probes, blocking=blocking, job_id=job_id)

    def read_part(part: Inputs, numbers: range) -> tuple:
        if len(numbers) == batches.n_examples:
            return read_batch(vlm, part, *probes)
        results = read_batch(
            vlm, part, *(_part_of(probe, numbers, batches.n_examples) for probe in probes), first=numbers.start
        )
        for probe, result in zip(probes, results, strict=True):
            _refuse_apart(probe, result)
        return results

    parts = over_batches(vlm, batches, read_part, "reading, batches")
    if len(parts) == 1:
        return parts[0]
    return tuple(_join(probe, list(results)) for probe, results in zip(probes, zip(*parts, strict=True), strict=True))


def read_batch(
    vlm: VLM, inputs: Inputs, *probes, first: int = 0, blocking: bool = True, job_id: str | None = None
) -> Any:
    """Run one forward of one batch, and return each probe's result, or the `Job`; see `read`.

    `first` is the number by which errors call the first example.
    """
    require_cpu_default()
    plans = _plans(vlm, inputs, probes, first)
    wanted = {method for method in READS for probe in probes if hasattr(probe, method)}
    real = torch.stack([m.modality != Modality.PADDING for m in inputs.token_maps])
    real = on_device(real, vlm)
    placed = [on_device(plan, vlm) for plan in plans]

    def results(saved: dict[str, Any]) -> tuple:
        _require_whole(saved, probes, vlm)
        _refuse_nonfinite(stack(saved["finite"]), vlm, first)
        return tuple(
            _with_ids(probe.result(plan, [row for row in kept if row is not None], vlm, inputs), inputs)
            for probe, plan, kept in zip(probes, plans, saved["rows"], strict=True)
        )

    question = "" if blocking else _question(inputs, probes)
    if job_id is not None:
        request = backend_for(vlm, blocking=False, job_id=job_id)
        return Job(request, lambda saved: checked(results, _answer_to(question, saved), vlm))

    with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1, blocking=blocking) as tracer:
        # A job's result holds these by their names: `_answer_to` compares `asked`.
        asked = nnsight.save([question])  # noqa: F841
        rows = nnsight.save([[] for _ in probes])
        finite = nnsight.save([])
        for method, reading in _readings(vlm, wanted):
            if method == "at_state":
                finite.append(is_finite(reading.resid, real))
            for probe, plan, kept in zip(probes, placed, rows, strict=True):
                if hasattr(probe, method):
                    kept.append(without_autocast(getattr(probe, method), plan, reading))

    if not blocking:
        return Job(tracer.backend, lambda saved: checked(results, saved, vlm))
    return checked(results, {"rows": rows, "finite": finite}, vlm)


def _plans(vlm: VLM, inputs: Inputs, probes: tuple, first: int) -> list:
    try:
        return [probe.prepare(vlm, inputs) for probe in probes]
    except ValueError as error:
        if first:
            error.add_note(f"Examples are counted within their batch here: its first is example {first} of all.")
        raise


def on_device(plan: Any, vlm: VLM) -> Any:
    """A plan with its tensors on the model's device: a layer that moved them would wait for a GPU.

    Tensors are looked for in tuples, lists and dicts. On NDIF all stays as it is, and travels.
    """
    if not vlm.has_weights or vlm.device.type == "cpu":
        return plan
    if isinstance(plan, Tensor):
        return plan.to(vlm.device)
    if isinstance(plan, dict):
        return {name: on_device(value, vlm) for name, value in plan.items()}
    if isinstance(plan, tuple | list):
        parts = [on_device(value, vlm) for value in plan]
        return type(plan)(*parts) if hasattr(plan, "_fields") else type(plan)(parts)
    return plan


def _with_ids(result: Any, inputs: Inputs) -> Any:
    return replace(result, example_ids=inputs.ids) if isinstance(result, Result) and inputs.ids else result


def _part_of(probe: Any, numbers: range, n_examples: int) -> Any:
    """The probe for some of the examples; see `mechvlm.probes.probe`."""
    return probe.part_of(numbers, n_examples) if hasattr(probe, "part_of") else probe


def _join(probe: Any, results: list) -> Any:
    return probe.join(results) if hasattr(probe, "join") else concat(results)


def _refuse_apart(probe: Any, result: Any) -> None:
    """Refuse results of several batches that could not be joined at the end."""
    name = type(probe).__name__
    if hasattr(probe, "join") or (isinstance(result, Result) and not result.apart):
        return
    raise InputError(
        f"{name} gives a {type(result).__name__}, which mv.concat does not join over batches. Give {name} a method "
        "join(results), or read each batch by itself."
    )


def _readings(vlm, wanted: set[str]) -> Iterator[tuple[str, Any]]:
    """Inside a trace: each reading, in the order of the forward, after the name of its method."""
    norm, unembed = vlm.readout()
    if "at_queries" in wanted:
        for number, module in enumerate(vlm.cross_attentions):
            yield "at_queries", Queried(number, read_attention(module))
    for layer in range(vlm.n_layers):
        yield "at_state", State(layer, vlm.resid_pre[layer], norm, unembed)
        memory = vlm.layer_parts[layer].kind.memory
        attention = "at_memory" if memory else "at_attention"
        if not wanted & {attention, "at_writes"}:
            continue
        parts = vlm.memory_attention[layer] if memory else vlm.attention[layer]
        z = vlm.z[layer] if "at_writes" in wanted else None
        w_o, b_o, divisor = vlm.write_path(layer)
        if attention in wanted:
            yield attention, Attended(layer, parts, w_o, divisor, {})
        if z is not None:
            writes = z, vlm.attn_out[layer], vlm.mlp_out[layer]
            yield "at_writes", Written(layer, *writes, parts, w_o, b_o, norm, unembed, divisor, memory)
    yield "at_state", State(vlm.n_layers, vlm.resid_post[vlm.n_layers - 1], norm, unembed)


def _refuse_unreadable(probes: tuple) -> None:
    if not probes:
        raise ValueError("read() was given no probe. Try mechvlm.read(vlm, inputs, mechvlm.LogitLens()).")
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
    n_memory = len(vlm.memory_layers)
    calls = {
        "at_state": n_layers + 1,
        "at_attention": n_layers - n_memory,
        "at_memory": n_memory,
        "at_writes": n_layers,
    }
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


def checked(results: Callable, saved: dict[str, Any], vlm) -> tuple:
    """results(saved); a `RemoteError` where a server sent something else than the block saves."""
    if vlm.remote is not True:
        return results(saved)
    try:
        return results(saved)
    except (InputError, NonFiniteError, RemoteError):
        raise
    except Exception as error:
        reason = type(error).__name__
    # Raised outside of the except block: the error itself may show what a server sent.
    raise RemoteError(
        f"NDIF's result is not what the block saves, so nothing can be computed from it ({reason}). Is it a server of NDIF? "
        "Send the request again, or to another one."
    )


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


def _refuse_nonfinite(finite: Tensor, vlm: VLM, first: int) -> None:
    bad = tuple((~finite.all(0)).nonzero().squeeze(-1).tolist())
    if not bad:
        return
    state = int((~finite[:, list(bad)]).any(1).nonzero()[0, 0])
    where = (
        "the embeddings that enter the decoder"
        if state == 0
        else f"the output of layer {state - 1} (of layers 0 to {vlm.n_layers - 1})"
    )
    if vlm.dtype == torch.float16:
        why = "In float16 large activations overflow: load with dtype='bfloat16' or 'float32'."
    elif state == 0:
        why = "The decoder's input holds them already: check the image's pixels and the vision encoder's weights."
    else:
        why = "The weights of that layer, or what was assigned to it, may hold NaN."
    raise NonFiniteError(
        f"Activations of {vlm.name} are NaN or infinite from {where} on, in example(s) {[first + row for row in bad]}. {why}",
        examples=tuple(first + row for row in bad),
    )
