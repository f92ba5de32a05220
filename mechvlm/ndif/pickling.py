"""What travels to NDIF: a trace's block as source, with the objects that it names."""

import ast
import collections
import dataclasses
import functools
import inspect
import io
import textwrap
import types
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from cloudpickle import cloudpickle
from jaxtyping import AbstractArray
from nnsight.intervention.serialization import DEFAULT_PROTOCOL, CustomCloudPickler, reduce_block
from nnsight.ndif import pull_env

from mechvlm.decoder.decoder import Decoder
from mechvlm.inputs.batch import Inputs


def dumps(tracer) -> bytes:
    """A trace as it travels: how the model is called, the block's source, and what the block names."""
    pull_env()  # notebooks' and scripts' own functions travel by value too
    frame = tracer.info.frame
    source, outer, inner = reduce_block(tracer.node, frame.f_globals, dict(frame.f_locals))
    buffer = io.BytesIO()
    block = source, _without_modules(source, outer), _without_modules(source, inner)
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
        if isinstance(obj, functools.cached_property):
            return functools.cached_property, (obj.func,)  # without its lock
        if isinstance(obj, type):
            if issubclass(obj, AbstractArray):
                return getattr, (torch, "Tensor")  # a server has no jaxtyping: shapes are not checked there
            if _by_value(obj) and (dataclasses.is_dataclass(obj) or _is_probe(obj)):
                made = types.new_class, (obj.__name__, () if _is_probe(obj) else obj.__bases__)
                return *made, (_written(obj), _dataclass(obj)), None, None, fill_class
            if _by_value(obj) and issubclass(obj, tuple) and hasattr(obj, "_field_defaults"):
                defaults = tuple(obj._field_defaults.values())
                made = named_tuple, (obj.__name__, obj._fields, defaults)
                return *made, (_written(obj), None), None, None, fill_class
        return super().reducer_override(obj)

    def _dynamic_function_reduce(self, func: FunctionType):
        # jaxtyping's checks wrap a function, which nnsight would then look up in jaxtyping's own scope.
        plain = inspect.unwrap(func)
        _refuse_decorators(plain)
        made, args, scope, *rest = super()._dynamic_function_reduce(plain if isinstance(plain, FunctionType) else func)
        if isinstance(args[0], str):  # a function as its source; its annotations say nothing there
            scope = _without_modules(args[0], scope)
            args = tuple(None if value is plain.__annotations__ else value for value in args)
        return made, args, scope, *rest


def _refuse_decorators(function: Callable) -> None:
    """A function travels as its source, and is not decorated again: what a decorator did would be gone without a word."""
    if function.__module__.split(".")[0] == "nnsight":  # its own, which a server has too
        return
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, ValueError, SyntaxError):  # a lambda, or what has no source
        return
    told = [ast.unparse(one) for one in getattr(definition, "decorator_list", [])]
    lost = [one for one in told if one.split(".")[-1] not in ("property", "cached_property", "setter", "staticmethod")]
    if lost:
        raise TypeError(
            f"{function.__name__} is decorated with @{', @'.join(lost)}, which does not travel to NDIF: call a plain function in "
            "the trace, and use context managers and caches around it, here."
        )


def named_tuple(name: str, names: tuple[str, ...], defaults: tuple) -> type:
    return type(name, (collections.namedtuple(name, names, defaults=defaults),), {})


def fill_class(cls: type, state: tuple) -> None:
    """On the server: give a class what was written in it, and make it the dataclass that it was."""
    written, dataclass = state
    for name, value in written.items():
        setattr(cls, name, value)
        if hasattr(value, "__set_name__"):
            value.__set_name__(cls, name)
    if dataclass is not None:
        factories, options = dataclass
        cls.__annotations__ = {name: object for name in factories}
        for name, factory in factories.items():
            if factory is not None:
                setattr(cls, name, dataclasses.field(default_factory=factory))
        dataclasses.dataclass(**options)(cls)


def _is_probe(cls: type) -> bool:
    return all(hasattr(cls, name) for name in ("prepare", "result"))


def _dataclass(cls: type) -> tuple[dict[str, Callable | None], dict[str, bool]] | None:
    """A dataclass's fields, with what makes their defaults where something does, and its options."""
    if not dataclasses.is_dataclass(cls):
        return None
    factories = {
        f.name: None if f.default_factory is dataclasses.MISSING else f.default_factory for f in dataclasses.fields(cls)
    }
    params = cls.__dataclass_params__  # type: ignore[attr-defined]
    return factories, {name: getattr(params, name) for name in ("frozen", "eq", "order", "unsafe_hash")}


def _written(cls: type) -> dict[str, Any]:
    """The functions, properties and constants of a class; of a probe without those that run here, with its bases'."""
    found: dict[str, Any] = {}
    made_by_python = ("__", "_abc", "_is_protocol", "_field", "_make")
    for base in [base for base in reversed(cls.__mro__) if _by_value(base)] if _is_probe(cls) else [cls]:
        for name, value in vars(base).items():
            if isinstance(value, FunctionType):
                kept = _has_source(inspect.unwrap(value), base.__module__)
            else:  # slots and fields of tuples are data descriptors too
                kept = isinstance(value, property) or not inspect.isdatadescriptor(value)
                kept = kept and not name.startswith(made_by_python)
            if kept:
                found[name] = value
    return {name: value for name, value in found.items() if not (_is_probe(cls) and name in ("prepare", "result"))}


def _has_source(function: Callable, module: str) -> bool:
    """Whether somebody wrote it there: neither generated by `dataclass` nor wrapped around what was."""
    try:
        inspect.getsource(function)
    except (OSError, TypeError):
        return False
    return function.__globals__["__name__"] == module  # type: ignore[attr-defined]


def _by_value(cls: type) -> bool:
    return not cloudpickle._should_pickle_by_reference(cls)


def _without_modules(source: str, scope: dict[str, Any]) -> dict[str, Any]:
    """The scope, with namespaces in the place of mechvlm's modules that hold what the source uses of them."""
    return {name: _used(value, _chains(source, name)) if _is_ours(value) else value for name, value in scope.items()}


def _is_ours(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and value.__name__.split(".")[0] == "mechvlm"


def _chains(source: str, name: str) -> list[list[str]]:
    """What stands behind a name's dots in the source: [["ablate"], ["interventions", "steer"]]."""
    found = []
    for node in ast.walk(ast.parse(source)):
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name) and node.id == name:
            found.append(chain)
    return found


def _used(module: types.ModuleType, chains: list[list[str]]) -> types.SimpleNamespace:
    held = {}
    for first in {chain[0] for chain in chains}:
        value = getattr(module, first)
        rest = [chain[1:] for chain in chains if chain[0] == first and len(chain) > 1]
        held[first] = _used(value, rest) if _is_ours(value) else value
    return types.SimpleNamespace(**held)
