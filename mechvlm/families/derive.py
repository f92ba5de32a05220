"""A record of a decoder, derived from the model itself: from one forward of one small input.

No knowledge of any class is used, only numbers:

1. One forward with a clock on every module remembers what goes in and out: of each layer, of all
   that lies in one layer of each build, and of what lies in no layer.
2. The decoder's layers are the list of modules that runs last before the unembedding.
3. What a layer adds: least squares says of which modules' outputs its own is the sum. The norm that
   reads the state between two of these sums is `mid_norm`.
4. The attention: the values that it is called with are the output of `v_proj`; its queries and keys
   have the norms, head by head, of the outputs of `q_proj` and `k_proj`, since a rotary embedding
   only turns them; its own output is the input of `o_proj`.
5. The end: the one module between the last state and the unembedding is the final norm. What the
   logits are of the unembedding's output gives scale and cap.

What is derived is verified by numbers again when the model is loaded (`mechvlm.vlm.verify`).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mechvlm.errors import ModelError
from mechvlm.families.attention_parts import projections_of
from mechvlm.families.record import Architecture, LayerKind, part
from mechvlm.families.recording import Call, Recording, record_calls, tensors_of

EQUAL_WITHIN = {torch.float32: 2e-4, torch.float64: 1e-6}
"""Largest difference of two tensors that are said to be equal, relative to the largest entry."""
LOOSE = 3e-2
"""The same in half precision."""
ENTRIES = 20_000
"""So many entries of the states are compared by least squares."""


def derive(model: Any, arguments: dict[str, Any], record: Architecture) -> Architecture:
    """The record with the parts of the decoder, derived from the model.

    Args:
        model: a loaded Hugging Face model.
        arguments: of its forward, for one example without padding.
        record: says how inputs are made; its decoder's parts are replaced.

    Costs one forward, and copies of its states.

    Raises:
        ModelError: for a model whose parts do not show; it says which.
    """
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    lists = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    # Of every list of layers one layer of each build is looked into.
    layers_of = {path: [_build(layer) for layer in model.get_submodule(path)] for path in lists}
    inside = tuple(
        f"{path}.{builds.index(build)}." for path, builds in layers_of.items() for build in dict.fromkeys(builds)
    )
    in_lists = tuple(f"{path}." for path in lists)

    def keep(path: str) -> bool:
        is_layer = path.rpartition(".")[0] in layers_of
        return is_layer or path.startswith(inside) or not path.startswith(in_lists)

    with torch.no_grad():
        seen = record_calls(model, arguments, keep)
        layers = _layers(model, seen, lists)
        builds, last = layers_of[layers], f"{layers}.{len(layers_of[layers]) - 1}"
        unembed = _unembedding(model, seen)
        end = _end(model, seen, last, unembed)
        kinds = {build: _kind(seen, f"{layers}.{builds.index(build)}", model) for build in dict.fromkeys(builds)}
    by_layer = tuple(kinds[build] for build in builds)
    image_token = part(model.config, record.image_token_id)
    return replace(
        record,
        embed=str(seen.path_of(model.get_input_embeddings())),
        decoder=layers.rpartition(".")[0],
        layers=layers,
        unembed=unembed,
        kinds=by_layer if len(set(by_layer)) > 1 else by_layer[:1],
        adds_between=_adds_between(seen, layers, len(builds), arguments["input_ids"] == image_token),
        derived=True,
        **end,
    )


def _layers(model: Any, seen: Recording, lists: list[str]) -> str:
    """Path of the list of modules that runs last, one after the other."""
    ended = {}
    for path in lists:
        ran = [seen.calls.get(f"{path}.{number}") for number in range(len(model.get_submodule(path)))]
        ends = [call.ended for call in ran if call is not None and call.shape is not None and len(call.shape) >= 3]
        if len(ends) == len(ran) and ends == sorted(ends):
            ended[path] = ends[-1]
    if not ended:
        raise ModelError(f"{type(model).__name__} has no list of layers that run one after the other.")
    return max(ended, key=ended.__getitem__)


def _unembedding(model: Any, seen: Recording) -> str:
    module = model.get_output_embeddings()
    path = seen.path_of(module)
    if path is None or path not in seen.calls:
        raise ModelError(f"{type(model).__name__} names no unembedding (get_output_embeddings) that its forward runs.")
    return path


def _build(layer: nn.Module) -> tuple:
    """What two layers share when one can stand for both: the classes of all their modules."""
    return tuple((path, type(module).__name__, _sizes(module)) for path, module in layer.named_modules())


def _sizes(module: nn.Module) -> tuple:
    sizes = tuple(tuple(p.shape) for p in module.parameters(recurse=False))
    window = getattr(module, "sliding_window", None)  # the same parts, and another mask
    return (*sizes, window is not None)


# -- the end ---------------------------------------------------------------------------------------


def _end(model: Any, seen: Recording, last: str, unembed: str) -> dict[str, Any]:
    """Final norm and its epsilon, and what the logits are of the unembedding's output."""
    state, chain = _one(seen.calls[last].out), []
    into = seen.calls[unembed]
    for path, call in sorted(seen.calls.items(), key=lambda item: item[1].began):
        is_leaf = path and next(model.get_submodule(path).children(), None) is None
        is_between = seen.calls[last].ended < call.began < into.began and path != unembed
        if not (is_between and is_leaf) or call.given is None or call.out is None:
            continue
        if same(call.given, state) and not same(call.out, state):  # dropout changes nothing
            chain.append(path)
            state = call.out
    if len(chain) != 1 or not same(_one(into.given), state[:, -_one(into.given).shape[1] :]):
        between = ", ".join(chain) or "nothing that its modules show"
        raise ModelError(
            f"Between the last layer of {type(model).__name__} and its unembedding stands {between}, not one final norm."
        )
    scale, cap = _logits(model, _one(into.out), seen.logits)
    return {
        "norm": chain[0],
        "norm_eps": _epsilon(model.get_submodule(chain[0])),
        "norm_centres": _centres(model.get_submodule(chain[0]), seen.calls[chain[0]]),
        "logit_scale": scale,
        "logit_cap": cap,
    }


def _logits(model: Any, out: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """(scale, cap) of the logits."""
    out = out.reshape(logits.shape) if out.numel() == logits.numel() else out
    if same(out, logits):
        return 1.0, None
    if out.shape == logits.shape:
        a, b = out.flatten().double(), logits.flatten().double()
        scale = float((a @ b) / (a @ a))
        if same(out * scale, logits):
            return scale, None
        text = model.config.get_text_config(decoder=True)
        caps = {getattr(config, "final_logit_softcapping", None) for config in (text, model.config)}
        for cap in caps:
            if cap is not None and same(torch.tanh(out / cap) * cap, logits):
                return 1.0, float(cap)
    raise ModelError(
        f"The logits of {type(model).__name__} are neither its unembedding's output, nor a multiple of it, nor capped."
    )


def _epsilon(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if isinstance(value := getattr(norm, name, None), float):
            return value
    raise ModelError(f"The final norm {type(norm).__name__} does not say its epsilon.")


def _centres(norm: nn.Module, call: Call) -> bool:
    """Whether a number added to every entry of a state changes nothing."""
    return same(norm(_one(call.given) + 3), _one(call.out))


def _adds_between(seen: Recording, layers: str, n_layers: int, image: Tensor) -> bool:
    """Whether anything is added to the states between layers, at the image's positions."""
    changed = torch.zeros(0)
    for number in range(n_layers - 1):
        left, entered = _one(seen.calls[f"{layers}.{number}"].out), _one(seen.calls[f"{layers}.{number + 1}"].given)
        left = left.reshape(entered.shape) if left.numel() == entered.numel() else left
        if left.shape != entered.shape:
            raise ModelError(f"Layer {number + 1} reads states of another shape than layer {number} returns.")
        if not same(entered, left):
            at = (entered - left).abs().amax(-1) > tolerance(left) * left.abs().max()
            changed = at if not changed.numel() else changed | at
    if not changed.numel():
        return False
    if (changed & ~image.to(changed.device)).any():
        raise ModelError("Something is added to the states between the layers, also at positions without an image.")
    return True


# -- one layer -------------------------------------------------------------------------------------


def _kind(seen: Recording, path: str, model: Any) -> LayerKind:
    """The kind of the layer at `path`."""
    layer, calls = seen.calls[path], seen.within(path)
    before, after = (_one(x).reshape(-1, _one(layer.out).shape[-1]) for x in (layer.given, layer.out))
    writes = _writes(path, before, after, calls)
    attention = next((a for a in seen.attentions if a.path is not None and a.path.startswith(f"{path}.")), None)
    fields: dict[str, Any] = {"attention": None}
    if attention is not None and attention.k.shape[2] != attention.q.shape[2]:
        raise ModelError(
            f"The attention {attention.path} reads {attention.k.shape[2]} vectors for {attention.q.shape[2]} positions: a memory "
            "beside the sequence. mechvlm reads one in MllamaForConditionalGeneration and IdeficsForVisionText2Text."
        )
    if attention is not None:
        fields = {
            "attention": str(attention.path).removeprefix(f"{path}."),
            **projections_of(attention, calls, model, same),
        }
    if len(writes) != 2 or len({round(factor, 4) for _, factor in writes}) != 1:
        written = ", ".join(f"{factor:.3g} x {name}" for name, factor in writes) or "nothing that modules show"
        raise ModelError(f"Layer {path} adds {written} to its input, not an attention's and an MLP's output alike.")
    (first, scale), (second, _) = writes
    state = before + scale * _one(calls[first].out).reshape(before.shape)
    readers = [
        name for name, call in sorted(calls.items(), key=lambda item: item[1].began)
        if call.given is not None and call.began > calls[first].ended and same(_flat(call.given, before), state)
    ]  # fmt: skip
    mid = readers[0] if readers else None
    is_flat = mid is not None and _one(calls[mid].given).ndim < _one(layer.out).ndim
    return LayerKind(
        **fields, flat=is_flat, attn_out=first, mlp_out=second, scale=round(scale, 6), mid_norm=mid,
        mid_sum="hidden_states_1" if first == fields["attention"] else "hidden_states_2",
        down_proj=_down_proj(calls, second, model.get_submodule(path)),
    )  # fmt: skip


def _writes(path: str, before: Tensor, after: Tensor, calls: dict[str, Call]) -> list[tuple[str, float]]:
    """(path, factor) of the modules whose outputs are added to the layer's input."""
    names: list[str] = []
    outs: list[Tensor] = []
    for name, call in sorted(calls.items(), key=lambda item: (item[0].count("."), item[1].ended)):
        out = None if call.out is None else _flat(call.out, before)
        # Of a module and its last child, which give the same, the outer one is named.
        if out is not None and out.shape == before.shape and not any(torch.equal(out, other) for other in outs):
            names.append(name)
            outs.append(out)
    chosen = torch.randperm(before.numel(), generator=torch.Generator().manual_seed(0))[:ENTRIES].to(before.device)
    target = (after - before).flatten()[chosen].double()
    columns = [out.flatten()[chosen].double() for out in outs]
    live = list(range(len(outs)))

    def fitted(which: list[int]) -> tuple[Tensor, bool]:
        if not which:
            return torch.zeros(0), False
        a = torch.stack([columns[i] for i in which], dim=1)
        factors = torch.linalg.lstsq(a.cpu(), target.cpu()[:, None]).solution[:, 0].to(a.device)
        return factors, float((a @ factors - target).abs().max()) <= tolerance(before) * float(target.abs().max())

    factors, fits = fitted(live)
    if not fits:
        raise ModelError(f"The output of layer {path} is no sum of its input and of outputs of its modules.")
    dropped = True
    while dropped:
        dropped = False
        for i in sorted(live, key=lambda i: (abs(float(factors[live.index(i)])) > 1e-3, -names[i].count("."))):
            fewer = [j for j in live if j != i]
            trial, fits = fitted(fewer)
            if fits:
                live, factors, dropped = fewer, trial, True
                break
    writes = sorted(zip(live, factors.tolist(), strict=True), key=lambda item: calls[names[item[0]]].ended)
    return [(names[i], factor) for i, factor in writes]


def _down_proj(calls: dict[str, Call], write: str, layer: nn.Module) -> str | None:
    """The linear module whose output the MLP's is, or what a norm after it reads."""
    target = calls[write].out
    if not isinstance(layer.get_submodule(write), nn.Linear) and len(calls[write].inside(calls)) == 0:
        target = calls[write].given  # a norm after the MLP
    linears = [
        name for name, call in calls.items()
        if isinstance(layer.get_submodule(name), nn.Linear) and call.out is not None and target is not None
        and _one(call.out).numel() == _one(target).numel() and same(_one(call.out).reshape(_one(target).shape), _one(target))
    ]  # fmt: skip
    return linears[0] if linears else None


# -- tensors ---------------------------------------------------------------------------------------


def tolerance(x: Tensor) -> float:
    return EQUAL_WITHIN.get(x.dtype, LOOSE)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    if a.shape != b.shape:
        return False
    difference = (a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6)
    return bool(difference <= tolerance(b))


def _one(x: Any) -> Tensor:
    return tensors_of(x)[0]


def _flat(x: Any, like: Tensor) -> Tensor:
    """The tensor as [row d_model], where it has as many entries as `like`."""
    x = _one(x)
    return x.reshape(like.shape) if x.numel() == like.numel() and x.shape[-1] == like.shape[-1] else x
