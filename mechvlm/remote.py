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
import io
from collections.abc import Callable
from types import FunctionType
from typing import Any

import nnsight
import torch
from jaxtyping import AbstractArray
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.serialization import DEFAULT_PROTOCOL, CustomCloudPickler, reduce_block
from nnsight.modeling import huggingface
from nnsight.ndif import pull_env
from nnsight.schema.request import RequestModel

from mechvlm.decoder import Decoder
from mechvlm.inputs import Inputs

nnsight.register("mechvlm")


def known_here(folder: str) -> None:
    """Let nnsight name a model by a folder: the server finds it at the same path.

    nnsight 0.8.1 asks the hub how every name is spelled, folders too. Goes when `to_model_key` leaves folders alone.
    """
    huggingface._ID_CACHE[folder] = folder


def backend_for(vlm, remote: bool | str | None = None) -> Any:
    """What runs a trace of this VLM: a request to NDIF, its rehearsal here (remote="local"), or None for a trace here."""
    remote = vlm.remote if remote is None else remote
    if not remote:
        return None
    if remote == "local":
        return Rehearsal(vlm.model)
    return Request(vlm.model.to_model_key(), env=vlm.model._remoteable_get_env())


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


class Request(RemoteBackend):
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


def dumps(tracer) -> bytes:
    """A trace as it travels: how the model is called, the block's source, and what the block names."""
    pull_env()  # notebooks' and scripts' own functions travel by value too
    frame = tracer.info.frame
    block = reduce_block(tracer.node, frame.f_globals, dict(frame.f_locals))
    buffer = io.BytesIO()
    Packer(buffer, protocol=DEFAULT_PROTOCOL).dump((tracer, block))
    return buffer.getvalue()


class Packer(CustomCloudPickler):
    """nnsight's pickler, which knows what of mechvlm travels."""

    def reducer_override(self, obj):
        if isinstance(obj, Decoder) and type(obj) is not Decoder:
            return Decoder, (obj.model, obj.record, obj.name, obj.config, obj.d_vocab)
        if isinstance(obj, Inputs):
            unseen = tuple(() for _ in obj.images)
            return Inputs, (obj.encoding, obj.token_maps, unseen, obj.prompts, obj.texts, obj.model)
        if isinstance(obj, type):
            if issubclass(obj, AbstractArray):
                return getattr, (torch, "Tensor")  # a server has no jaxtyping: shapes are not checked there
            if all(hasattr(obj, name) for name in ("reads", "prepare", "result")):
                return type, (obj.__name__, (), _within_the_forward(obj))
        return super().reducer_override(obj)

    def _dynamic_function_reduce(self, func: FunctionType):
        # jaxtyping's checks wrap a function, which nnsight would then look up in jaxtyping's own scope.
        plain = inspect.unwrap(func)
        return super()._dynamic_function_reduce(plain if isinstance(plain, FunctionType) else func)


def _within_the_forward(probe: type) -> dict[str, Any]:
    """What of a probe's class is used in the forward: its functions, without those that run here."""
    here = ("prepare", "result")
    found = {}
    for base in reversed(probe.__mro__[:-1]):
        found |= {k: v for k, v in vars(base).items() if isinstance(v, FunctionType) and k not in here}
        found |= {k: v for k, v in vars(base).items() if k == "reads" or isinstance(v, (int, float, str, tuple))}
    return {k: v for k, v in found.items() if not k.startswith("__")}
