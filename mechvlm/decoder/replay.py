"""The decoder's own call, made again: with more rows, from a later position, with other states.

A vision-language model calls its decoder with more than embeddings: positions of two dimensions
(M-RoPE), masks in which an image sees all of itself, features that enter later layers (deepstack).
A forward that starts mid-way must give all of it again. So one call is recorded, and repeated.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Call = dict[str, Any]
"""Arguments of the decoder's forward, by name, of one example."""

FOLLOW_POSITIONS = ("inputs_embeds", "attention_mask", "position_ids", "cache_position")
"""Arguments that can be cut to the positions from one on."""


def recorded(decoder: Any, args: tuple, kwargs: Mapping[str, Any]) -> Call:
    """A call of a module by the names of its parameters, without the cache that it was given."""
    bound = inspect.signature(type(decoder).forward).bind(decoder, *args, **kwargs)
    call: Call = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        call |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    # A cache was filled by the call itself.
    return {
        name: value for name, value in call.items() if name not in ("self", "past_key_values") and value is not None
    }


def can_start_late(call: Call) -> bool:
    """Whether nothing of a call but what `repeated` cuts can depend on positions."""
    return all(
        name in FOLLOW_POSITIONS or not any(isinstance(leaf, Tensor) for leaf in _leaves(value))
        for name, value in call.items()
    )


def repeated(call: Call, rows: int, pos: int = 0) -> Call:
    """A call of one example for `rows` copies of it, from a position on.

    Rows are repeated along the axis of the batch: the first one, but for the positions of M-RoPE
    [axis batch pos]. What belongs to the images of a batch, one after the other, is repeated along
    its first axis too.
    """

    def work(name: str, x: Any) -> Any:
        if isinstance(x, Mapping):
            return {key: work(name, value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return type(x)(work(name, value) for value in x)
        if not isinstance(x, Tensor):
            return x
        if pos and name == "inputs_embeds":
            x = x[:, pos:]
        if pos and name in ("position_ids", "cache_position"):
            x = x[..., pos:]
        if pos and name == "attention_mask" and x.ndim == 4:
            x = x[:, :, pos:]
        if name == "cache_position" or x.ndim == 0:
            return x
        axis = 1 if name == "position_ids" and x.ndim == 3 else 0
        return torch.cat([x] * rows, dim=axis)

    return {name: work(name, value) for name, value in call.items()}


def _leaves(value: Any) -> list:
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list | tuple) else [value]
