"""Which backend runs a trace, here or on NDIF, and how one request holds many traces."""

import ast
import inspect
import threading
from collections.abc import Callable
from typing import Any

import nnsight
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.modeling import huggingface
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend

from mechvlm.errors import ModelError, RemoteError
from mechvlm.ndif.connection import Connection
from mechvlm.ndif.pickling import dumps
from mechvlm.ndif.unsaved import mark_unsaved

ONE_AT_A_TIME = threading.RLock()
"""Held while a trace or a generation runs here: nnsight runs one at a time, other threads wait."""


def register_folder(folder: str) -> None:
    """Let nnsight name a model by its folder: the server finds it at the same path.

    nnsight 0.8.1 asks the hub for the spelling of every name, folders included. Remove this once
    `to_model_key` leaves folders alone.
    """
    huggingface._ID_CACHE[folder] = folder


def backend_for(vlm, remote: bool | str | None = None, blocking: bool = True, job_id: str | None = None) -> Any:
    """The backend that runs a trace of this VLM.

    A `Request` to NDIF (remote=True), a `Rehearsal` on this machine (remote="local"), or a
    `LocalTrace` (remote=False). `remote` is by default the VLM's own.

    Raises:
        ModelError: for a job (`blocking=False`, or a `job_id`) where the model runs here.
    """
    remote = vlm.remote if remote is None else remote
    if remote:
        # A server cannot import mechvlm: from now on its functions are pickled by value.
        nnsight.register("mechvlm")
    if remote is True:
        return Request(vlm.model.to_model_key(), env=vlm.model._remoteable_get_env(), blocking=blocking, job_id=job_id)
    if not blocking or job_id is not None:
        raise ModelError(
            f"blocking=False and job_id are for jobs on NDIF, and {vlm.name} runs here: load it with remote=True, or "
            "leave these options out."
        )
    return Rehearsal(vlm.model) if remote == "local" else LocalTrace()


def in_one_request(vlm, work: Callable, *args):
    """work(vlm, *args), as ONE request where the model is remote, however many traces `work` holds.

    `work` is a plain function of tensors, numbers and `Inputs`, and returns the same. Only what it
    returns comes back.
    """
    if not vlm.remote:
        with ONE_AT_A_TIME:
            return work(vlm, *args)
    with vlm.model.session(backend=backend_for(vlm)):
        result = nnsight.save(work(vlm, *args))
    return result


class LocalTrace(Backend):
    """A trace that runs here, after those of other threads."""

    def __call__(self, tracer) -> None:
        with ONE_AT_A_TIME:
            super().__call__(tracer)
        mark_unsaved(tracer.info.frame, tracer.node)


class Request(Connection):
    """One request to NDIF, from the block to the values that it saved."""

    def request(self, request: RequestModel, tracer) -> Any:
        result = super().request(request, tracer)
        # A server may set the names that the block speaks of, and no others of the code around it.
        spoken = {node.id for part in tracer.node.body for node in ast.walk(part) if isinstance(node, ast.Name)}
        if other := sorted(result.keys() - spoken):
            raise RemoteError(f"NDIF's result holds {other[0]!r:.40}, which the block does not name. It is not used.")
        self._push(result, tracer)
        mark_unsaved(tracer.info.frame, tracer.node)
        return result

    def _serialize(self, tracer) -> bytes:
        blob = dumps(tracer)
        self._log(f"payload: {len(blob):,} bytes")
        if self.compress:
            import zstandard

            blob = zstandard.ZstdCompressor(level=6).compress(blob)
        return blob


class Rehearsal(LocalSimulationBackend):
    """A request without a server: a block is packed, unpacked with mechvlm hidden, and run here."""

    def __call__(self, tracer) -> None:
        with ONE_AT_A_TIME:
            self._run(tracer)
        mark_unsaved(tracer.info.frame, tracer.node)

    def _run(self, tracer) -> None:
        blob = dumps(tracer)
        persistent = self.model._remoteable_persistent_objects()
        hidden = self._hide_local_modules()
        try:
            restored = RequestModel.deserialize(blob, persistent)
        finally:
            self._restore(hidden)
        inspect.linecache.cache.pop(restored.info.frame.f_code.co_filename, None)  # type: ignore[attr-defined]
        tracer.info.code = restored.info.code
        tracer.execute(tracer.info.code)
