"""NDIF: how a trace travels to a server that holds the weights, and what of mechvlm goes with it.

A server has torch, transformers, einops and nnsight, and not mechvlm. A trace's block travels as source, with the objects that it
names; mechvlm's functions and classes travel by value. Of what a block names there goes

- of a `VLM` the `Decoder`: accessors and weights, without processor and tokenizer;
- of a probe its settings and its `at_` methods: `prepare` and `result` run here;
- of `Inputs` all but the original images.

What runs there must be plain: functions, dataclasses and closures, with imports at the top of the file. Decorators, context
managers, `super()` without arguments and references to modules of one's own do not travel, and what a block changes outside of
itself is lost: results are what it saves.
"""

import inspect
from collections.abc import Callable
from typing import Any

import nnsight
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.modeling import huggingface
from nnsight.schema.request import RequestModel

from mechvlm.errors import ModelError
from mechvlm.ndif.connection import Connection
from mechvlm.ndif.pickling import dumps


def known_here(folder: str) -> None:
    """Let nnsight name a model by a folder: the server finds it at the same path.

    nnsight 0.8.1 asks the hub how every name is spelled, folders too. Goes when `to_model_key` leaves folders alone.
    """
    huggingface._ID_CACHE[folder] = folder


def backend_for(vlm, remote: bool | str | None = None, blocking: bool = True, job_id: str | None = None) -> Any:
    """What runs a trace of this VLM: a request to NDIF, its rehearsal here (remote="local"), or None for a trace here.

    Raises:
        ModelError: for a job that nobody waits for (`blocking=False`), or one that has an id, where nothing runs on NDIF.
    """
    remote = vlm.remote if remote is None else remote
    if remote:
        nnsight.register("mechvlm")  # from now on its functions are pickled by value: a server cannot import them
    if remote is True:
        return Request(vlm.model.to_model_key(), env=vlm.model._remoteable_get_env(), blocking=blocking, job_id=job_id)
    if not blocking or job_id is not None:
        raise ModelError(
            f"blocking=False leaves a job on NDIF, and {vlm.name} runs here: load it with remote=True, or leave it out."
        )
    return Rehearsal(vlm.model) if remote == "local" else None


def together(vlm, work: Callable, *args):
    """work(vlm, *args): where the model is remote as ONE request, whatever traces are in it; only what it returns comes back.

    `work` is a plain function of tensors, numbers and `Inputs`, and gives the same.
    """
    backend = backend_for(vlm)
    if backend is None:
        return work(vlm, *args)
    with vlm.model.session(backend=backend):
        found = nnsight.save(work(vlm, *args))
    return found


class Request(Connection):
    """One request to NDIF, from the block to the values that it saved."""

    def _serialize(self, tracer) -> bytes:
        blob = dumps(tracer)
        self._log(f"payload: {len(blob):,} bytes")
        if self.compress:
            import zstandard

            blob = zstandard.ZstdCompressor(level=6).compress(blob)
        return blob


class Rehearsal(LocalSimulationBackend):
    """The block is packed as for NDIF and unpacked where mechvlm is hidden; then it runs here."""

    def __call__(self, tracer) -> None:
        blob = dumps(tracer)
        persistent = self.model._remoteable_persistent_objects()
        filename = tracer.info.frame.f_code.co_filename
        hidden = self._hide_local_modules()
        try:
            restored = RequestModel.deserialize(blob, persistent)
        finally:
            self._restore(hidden)
            inspect.linecache.cache.pop(filename, None)  # type: ignore[attr-defined]
        tracer.info.code = restored.info.code
        tracer.execute(tracer.info.code)


# -- classes: what somebody wrote of them travels, and what Python made of that is made again there (in its own bytecode) --


# -- modules: of mechvlm's only what is used, since a server has them not -----------------------------------------------
