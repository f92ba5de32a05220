"""Which projections an attention's queries, keys, values and output come from, by their numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mechvlm.errors import ModelError
from mechvlm.families.recording import AttentionCall, Call

Same = Callable[[Tensor, Tensor], bool]
"""Whether two tensors are equal up to rounding."""


def projections_of(attention: AttentionCall, calls: dict[str, Call], model: Any, same: Same) -> dict[str, Any]:
    """The fields of a `LayerKind` that say where an attention has its projections.

    Args:
        attention: a call of the attention.
        calls: what ran in the layer, by the paths from it.
        model: the model.
        same: whether two tensors are equal up to rounding.

    Raises:
        ModelError: for an attention whose heads' outputs go through no linear module.
    """
    assert attention.path is not None
    prefix = _within(attention.path, calls)
    inside = {name: call for name, call in calls.items() if f"{name}.".startswith(prefix)}
    linears = {
        name.removeprefix(prefix): call for name, call in inside.items()
        if name != prefix[:-1] and _is_linear(model, attention.path, name.removeprefix(prefix))
    }  # fmt: skip
    z = attention.out.flatten(2).flatten(0, 1)
    out = [
        name for name, call in linears.items()
        if call.given is not None and same(call.given.reshape(-1, call.given.shape[-1]), z)
    ]  # fmt: skip
    if not out:
        raise ModelError(
            f"The output of the attention {attention.path} goes through no linear module as it is: something stands in between."
        )
    before = {name: call for name, call in linears.items() if name != out[0]}
    heads = {"q": attention.q, "k": attention.k, "v": attention.v}
    places = {name: _place(x, before, inside, same, exact=name == "v") for name, x in heads.items()}
    fields: dict[str, Any] = {f"{name}_proj": None if place is None else place[0] for name, place in places.items()}
    fused = [place for place in places.values() if place is not None and place[1] is not None]
    if fused and len(fused) == 3:
        fields["columns"] = tuple(places[name][1] for name in "qkv")  # type: ignore[index]
        fields["n_heads"] = tuple(x.shape[1] for x in (attention.q, attention.k, attention.v))
    elif fused:
        fields |= dict.fromkeys(("q_proj", "k_proj", "v_proj"))
    width = attention.v.shape[-1]
    text = model.config.get_text_config(decoder=True)
    usual = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {**fields, "o_proj": out[0], "d_head": None if width == usual else width}


def _within(path: str, calls: dict[str, Call]) -> str:
    """The attention's path from its layer, and a dot."""
    for start in range(path.count(".") + 1):
        name = path.split(".", start)[-1]
        if name in calls:
            return f"{name}."
    raise ModelError(f"The attention {path} is no module of its layer.")


def _is_linear(model: Any, attention: str, name: str) -> bool:
    weight = getattr(model.get_submodule(f"{attention}.{name}"), "weight", None)
    return weight is not None and weight.ndim == 2


def _place(
    heads: Tensor, linears: dict[str, Call], inside: dict[str, Call], same: Same, exact: bool
) -> tuple[str, tuple[int, int] | None] | None:
    """(projection, columns) from which heads [batch head pos d_head] come.

    Values are compared as they are (`exact`). Of queries and keys the norm of each head at each
    position is compared, which a rotary embedding leaves as it is, up to one factor for all.
    """
    rows = heads.transpose(1, 2).flatten(0, 1)  # [pos head d_head]

    def alike(mine: Tensor) -> bool:
        if exact:
            return same(mine, rows)
        a, b = mine.float().norm(dim=-1), rows.float().norm(dim=-1)
        return same(a * ((a * b).sum() / (a * a).sum()).to(a), b)

    for name, call in linears.items():
        out = None if call.out is None else call.out.reshape(-1, call.out.shape[-1])
        if out is None or len(out) != len(rows):
            continue
        if out.shape[1] == rows[0].numel():
            if any(alike(mine) for mine in (out.reshape(rows.shape), *_normed(out, rows, inside, same))):
                return name, None
        elif out.shape[1] > rows[0].numel() and (columns := _columns(out, rows, same, exact)) is not None:
            return name, columns
    return None


def _normed(out: Tensor, rows: Tensor, inside: dict[str, Call], same: Same) -> Iterator[Tensor]:
    """What other modules of the attention made of a projection's output: its queries, normed."""
    n_pos, n_heads, _ = rows.shape
    for call in inside.values():
        if call.given is None or call.out is None or call.out.numel() != rows.numel():
            continue
        given, made = (
            x.transpose(1, 2) if x.ndim == 4 and x.shape[1] == n_heads != n_pos else x for x in (call.given, call.out)
        )
        if given.numel() == out.numel() and same(given.reshape(out.shape), out):
            yield made.reshape(rows.shape)


def _columns(out: Tensor, rows: Tensor, same: Same, exact: bool) -> tuple[int, int] | None:
    """(start, step) of the heads in the columns of a fused matrix's output."""
    _, n_heads, d_head = rows.shape
    # The squared norm of every window of d_head columns, as a difference of running sums.
    sums = torch.nn.functional.pad(out.double().pow(2).cumsum(1), (1, 0))
    windows = (sums[:, d_head:] - sums[:, :-d_head]).clamp(min=0).sqrt()  # [pos start]
    norms = rows.double().norm(dim=-1)  # [pos head]

    def start_of(head: int) -> int | None:
        off = (windows - norms[:, head : head + 1]).abs().amax(0)
        start = int(off.argmin())
        return start if same(windows[:, start], norms[:, head]) else None

    starts = [start_of(head) for head in range(n_heads)]
    first, step = starts[0], d_head if n_heads == 1 else None
    if first is None or None in starts:
        return None
    step = step if step is not None else starts[1] - first  # type: ignore[operator]
    if starts != [first + head * step for head in range(n_heads)]:
        return None
    if exact and not all(same(out[:, start : start + d_head], rows[:, h]) for h, start in enumerate(starts)):  # type: ignore[operator]
        return None
    return first, step
