"""One forward of a model, with what went in and out of its modules and its attentions."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechvlm.errors import ModelError


class ForwardError(ModelError):
    """The model's own forward fails on what it was given."""


@dataclass
class Call:
    """One call of a module: its place in time, and copies of what went in and out.

    Attributes:
        path: of the module.
        began, ended: ticks of a clock that every call's begin and end moves on.
        shape: of the first tensor that came out.
        given, out: the first tensor that went in, and that came out; None where they are not kept.
    """

    path: str
    began: int
    ended: int = -1
    shape: tuple[int, ...] | None = None
    given: Tensor | None = None
    out: Tensor | None = None

    def inside(self, calls: Mapping[str, "Call"]) -> list[str]:
        """Names of the calls that were made within this one."""
        return [name for name, other in calls.items() if self.began < other.began and other.ended < self.ended]


@dataclass
class AttentionCall:
    """One call of an attention implementation: q [batch head dest d_head], k, v, and what came out.

    out: [batch dest head d_value].
    """

    path: str | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


@dataclass
class Recording:
    """What `record_calls` saw."""

    paths: dict[nn.Module, str]
    calls: dict[str, Call] = field(default_factory=dict)
    attentions: list[AttentionCall] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.zeros(0))

    def path_of(self, module: Any) -> str | None:
        return self.paths.get(module)

    def within(self, path: str) -> dict[str, Call]:
        """The calls within one of a module, by the paths from it."""
        outer = self.calls[path]
        return {
            name.removeprefix(f"{path}."): call
            for name, call in self.calls.items()
            if name.startswith(f"{path}.") and outer.began < call.began and call.ended < outer.ended
        }


def record_calls(model: nn.Module, arguments: dict[str, Any], keep: Callable[[str], bool]) -> Recording:
    """Run one forward; `keep` says of a path whether to copy what goes in and out there.

    Raises:
        ForwardError: when the forward fails.
    """
    paths: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        paths.setdefault(module, path)
    seen, clock, open_calls = Recording(paths), [0], []

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        clock[0] += 1
        call = Call(paths[module], clock[0])
        if keep(call.path) and (given := _floats(args) or _floats(kwargs)):
            call.given = given[0].detach().clone()
        open_calls.append(call)

    def end(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        clock[0] += 1
        call = open_calls.pop()
        call.ended = clock[0]
        if came := tensors_of(out):
            call.shape = tuple(came[0].shape)
            if keep(call.path):
                call.out = came[0].detach().clone()
        seen.calls[call.path] = call

    def telling(run: Callable) -> Callable:
        def attend(module, q, k, v, *args, **kwargs):
            out = run(module, q, k, v, *args, **kwargs)
            path = seen.path_of(module)
            if path is not None and keep(path):
                seen.attentions.append(AttentionCall(path, *(x.detach().clone() for x in (q, k, v, out[0]))))
            return out

        return attend

    hooks = []
    for module in paths:
        hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(module.register_forward_hook(end, with_kwargs=True))
    try:
        with attention_through(telling):
            seen.logits = model(**arguments).logits
    except Exception as error:  # a forward can raise anything
        raise ForwardError(f"{type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def attention_through(wrapped: Callable[[Callable], Callable]) -> Iterator[None]:
    """Has every attention implementation run as `wrapped(implementation)`, in all models."""

    def through(name: str) -> Callable:
        def attend(module, *args, **kwargs):
            run = ALL_ATTENTION_FUNCTIONS._global_mapping.get(name)
            if run is None:  # eager is a function of each class's own file
                run = sys.modules[type(module).__module__].eager_attention_forward
            return wrapped(run)(module, *args, **kwargs)

        return attend

    own = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for name in (*ALL_ATTENTION_FUNCTIONS._global_mapping, "eager"):
        ALL_ATTENTION_FUNCTIONS[name] = through(name)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(own)


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors in what a module was given or returned, in order."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Mapping):  # ModelOutput too
        return [t for value in x.values() for t in tensors_of(value)]
    if isinstance(x, list | tuple):
        return [t for value in x for t in tensors_of(value)]
    return []


def _floats(x: Any) -> list[Tensor]:
    return [t for t in tensors_of(x) if t.is_floating_point()]
