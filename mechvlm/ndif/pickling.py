"""Pickling for NDIF: what travels to a server that holds the weights.

A server has torch, transformers, einops and nnsight, but not mechvlm. A trace's block travels as
source, together with the objects that it names. mechvlm's functions and classes travel by value.
Some objects are cut down first:

- a `VLM` travels as its `Decoder`: accessors and weights, without processor and tokenizer;
- a probe travels as its settings and its `at_` methods: `RUN_HERE` names those that stay;
- `Inputs` travel without the original images;
- a function's file is named by its place in its package, not by its folder on this machine;
- a module of mechvlm travels as a namespace of the parts that the block uses;
- a class travels as the functions, properties and constants written in it. The methods that Python
  generates for a dataclass or a named tuple are generated again on the server, in its own bytecode.

Code that runs on a server must be plain: functions, dataclasses and closures, with imports at the
top of the file. Decorators, context managers, `super()` without arguments and references to
modules of one's own do not travel. What a block changes outside of itself is lost: its results are
what it saves.
"""

import ast
import collections
import dataclasses
import functools
import inspect
import io
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from cloudpickle import cloudpickle
from jaxtyping import AbstractArray
from nnsight.intervention.serialization import DEFAULT_PROTOCOL, CustomCloudPickler, reduce_block
from nnsight.ndif import pull_env
from nnsight.tracing.util import SerializedFrame

from mechvlm.decoder.decoder import Decoder
from mechvlm.inputs.batch import Inputs
from mechvlm.ndif.unsaved import Unsaved

RUN_HERE = ("part_of", "prepare", "result", "join")
"""A probe's methods that run on this machine, and stay here with all that they name."""


def dumps(tracer) -> bytes:
    """A trace as bytes: how the model is called, the block's source, and the objects it names."""
    pull_env()  # makes functions of notebooks and scripts travel by value too
    frame = tracer.info.frame
    source, outer, inner = reduce_block(tracer.node, frame.f_globals, dict(frame.f_locals))
    outer, inner = ({k: v for k, v in scope.items() if not isinstance(v, Unsaved)} for scope in (outer, inner))
    buffer = io.BytesIO()
    block = source, _without_modules(source, outer), _without_modules(source, inner)
    Packer(buffer, protocol=DEFAULT_PROTOCOL).dump((tracer, block))
    return buffer.getvalue()


class Packer(CustomCloudPickler):
    """nnsight's pickler, with mechvlm's classes cut down to what a server needs."""

    def reducer_override(self, obj):
        if isinstance(obj, Decoder) and type(obj) is not Decoder:
            return Decoder, (obj.model, obj.record, obj.name, obj.config, obj.d_vocab)
        if isinstance(obj, Inputs):
            no_images = tuple(() for _ in obj.images)
            fields = (obj.encoding, obj.token_maps, no_images, obj.prompts, obj.texts, obj.model, obj.ids, obj.parts)
            return Inputs, fields
        if isinstance(obj, SerializedFrame):  # where the block stands, for tracebacks
            code = obj.f_code
            return SerializedFrame, (shown_path(code.co_filename), code.co_firstlineno, code.co_name)
        if isinstance(obj, functools.cached_property):
            return functools.cached_property, (obj.func,)  # its lock cannot be pickled
        if isinstance(obj, type):
            if issubclass(obj, AbstractArray):
                return getattr, (torch, "Tensor")  # a server has no jaxtyping, and checks no shapes
            if _by_value(obj) and (dataclasses.is_dataclass(obj) or _is_probe(obj)):
                constructor = types.new_class, (obj.__name__, () if _is_probe(obj) else obj.__bases__)
                return *constructor, (_written_in(obj), _dataclass_spec(obj)), None, None, fill_class
            if _by_value(obj) and issubclass(obj, tuple) and hasattr(obj, "_field_defaults"):
                defaults = tuple(obj._field_defaults.values())
                constructor = named_tuple, (obj.__name__, obj._fields, defaults)
                return *constructor, (_written_in(obj), None), None, None, fill_class
        return super().reducer_override(obj)

    def _dynamic_function_reduce(self, func: FunctionType):
        # jaxtyping wraps functions in checks; nnsight would look a wrapper up in jaxtyping's scope.
        plain = inspect.unwrap(func)
        _refuse_decorators(plain)
        constructor, args, scope, *rest = super()._dynamic_function_reduce(
            plain if isinstance(plain, FunctionType) else func
        )
        if isinstance(args[0], str):  # travels as source, where annotations mean nothing
            scope = _without_modules(args[0], scope)
            args = tuple(None if value is plain.__annotations__ else value for value in args)
            args = tuple(shown_path(value) if value == plain.__code__.co_filename else value for value in args)
        return constructor, args, scope, *rest


def shown_path(filename: str) -> str:
    """A file's place in its package, as tracebacks show it: nobody needs to know the folders here.

    >>> shown_path("/home/me/venv/lib/python3.11/site-packages/mechvlm/tracing/reading.py")
    'mechvlm/tracing/reading.py'

    Packages are told by their `__init__.py`. A file outside of packages is shown by its name.
    """
    path = Path(filename)
    top = path.parent
    while (top / "__init__.py").is_file() and top != top.parent:
        top = top.parent
    return path.relative_to(top).as_posix()


def _refuse_decorators(function: Callable) -> None:
    """Raises TypeError for a decorated function: its source travels, and its decorator is lost."""
    if function.__module__.split(".")[0] == "nnsight":  # a server has nnsight's own functions
        return
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, ValueError, SyntaxError):  # a lambda, or a function without source
        return
    decorators = [ast.unparse(node) for node in getattr(definition, "decorator_list", [])]
    survive = ("property", "cached_property", "setter", "staticmethod")
    lost = [decorator for decorator in decorators if decorator.split(".")[-1] not in survive]
    if lost:
        raise TypeError(
            f"{function.__name__} is decorated with @{', @'.join(lost)}, which does not travel to NDIF: call a plain "
            "function in the trace, and use context managers and caches outside of the trace, on this machine."
        )


def named_tuple(name: str, fields: tuple[str, ...], defaults: tuple) -> type:
    """On the server: a class derived from a named tuple, to be filled by `fill_class`."""
    return type(name, (collections.namedtuple(name, fields, defaults=defaults),), {})


def fill_class(cls: type, state: tuple) -> None:
    """On the server: put the written attributes into a class, and make it a dataclass again."""
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


def _dataclass_spec(cls: type) -> tuple[dict[str, Callable | None], dict[str, bool]] | None:
    """A dataclass's fields with their default factories (None without one), and its options."""
    if not dataclasses.is_dataclass(cls):
        return None
    factories = {
        f.name: None if f.default_factory is dataclasses.MISSING else f.default_factory for f in dataclasses.fields(cls)
    }
    params = cls.__dataclass_params__  # type: ignore[attr-defined]
    return factories, {name: getattr(params, name) for name in ("frozen", "eq", "order", "unsafe_hash")}


def _written_in(cls: type) -> dict[str, Any]:
    """The functions, properties and constants written in a class.

    A probe loses its bases on the way, so theirs are included. Its methods that
    run here are left out.
    """
    written: dict[str, Any] = {}
    made_by_python = ("__", "_abc", "_is_protocol", "_field", "_make")
    for base in [base for base in reversed(cls.__mro__) if _by_value(base)] if _is_probe(cls) else [cls]:
        for name, value in vars(base).items():
            if isinstance(value, FunctionType):
                keep = _has_source(inspect.unwrap(value), base.__module__)
            else:  # slots and named tuples' fields are data descriptors too, as properties are
                keep = isinstance(value, property) or not inspect.isdatadescriptor(value)
                keep = keep and not name.startswith(made_by_python)
            if keep:
                written[name] = value
    return {name: value for name, value in written.items() if not (_is_probe(cls) and name in RUN_HERE)}


def _has_source(function: Callable, module: str) -> bool:
    """Whether a function was written in this module: not by `dataclass`, and no wrapper."""
    try:
        inspect.getsource(function)
    except (OSError, TypeError):
        return False
    return function.__globals__["__name__"] == module  # type: ignore[attr-defined]


def _by_value(cls: type) -> bool:
    return not cloudpickle._should_pickle_by_reference(cls)


def _without_modules(source: str, scope: dict[str, Any]) -> dict[str, Any]:
    """The scope, with mechvlm's modules replaced by namespaces of what the source uses of them."""
    return {
        name: _namespace(value, _attribute_chains(source, name)) if _is_our_module(value) else value
        for name, value in scope.items()
    }


def _is_our_module(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and value.__name__.split(".")[0] == "mechvlm"


def _attribute_chains(source: str, name: str) -> list[list[str]]:
    """A name's attributes in the source, such as [["ablate"], ["interventions", "steer"]]."""
    chains = []
    for node in ast.walk(ast.parse(source)):
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name) and node.id == name:
            chains.append(chain)
    return chains


def _namespace(module: types.ModuleType, chains: list[list[str]]) -> types.SimpleNamespace:
    """The attributes of a module that these chains begin with, modules within modules likewise."""
    attributes = {}
    for first in {chain[0] for chain in chains}:
        value = getattr(module, first)
        rest = [chain[1:] for chain in chains if chain[0] == first and len(chain) > 1]
        attributes[first] = _namespace(value, rest) if _is_our_module(value) else value
    return types.SimpleNamespace(**attributes)
