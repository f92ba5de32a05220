"""Every method on a tiny model of a family, each held to something independent.

The other side is Hugging Face's own model with eager attention (`Case.twin`), read and changed by
plain hooks, or a naive formula. `METHODS` are the rows of the table of models: each takes a `Case`
and raises AssertionError where a number is wrong. What mechvlm refuses raises its own errors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import nnsight
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import mechvlm as mv
from helpers import families
from mechvlm.families.record import layer_paths, part

SIZES = ((60, 44), (44, 60), (100, 30))
WORDS = ("what is this", "hi", "the cup and")
ANSWER = 77
"""A token whose logit is looked at."""
METHODS: dict[str, Callable[["Case"], None]] = {}


def method(function: Callable[["Case"], None]) -> Callable[["Case"], None]:
    METHODS[function.__name__.replace("_", " ")] = function
    return function


def close(got: Tensor, want: Tensor, within: float = 2e-4) -> None:
    """Equal up to a share of the largest entry."""
    assert got.shape == want.shape, (got.shape, want.shape)
    difference = (got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-6)
    assert difference <= within, f"off by {float(difference):.2g}"


class Case:
    """A family's tiny model as a VLM, and a batch of three examples of other sizes and lengths."""

    def __init__(self, name: str):
        self.name = name
        hf, self.processor = families.build(name)
        self.vlm = mv.load(hf, self.processor)
        # Some classes read images of one size, or examples of one length, together only.
        record = self.vlm.record
        self.sizes = SIZES[:1] * 3 if record.equal_sizes or record.equal_lengths else SIZES
        words = WORDS[:1] * 3 if record.equal_lengths else WORDS
        images = [families.picture(*size, seed=i) for i, size in enumerate(self.sizes)]
        self.inputs = self.vlm.inputs(images, list(words))
        self.real = self.inputs.encoding["attention_mask"].bool()

    @cached_property
    def twin(self):
        return families.build(self.name, attention="eager")[0]

    @cached_property
    def encoding(self) -> dict[str, Tensor]:
        return self.vlm.encoding(self.inputs)

    def layer(self, number: int) -> torch.nn.Module:
        return part(self.twin, layer_paths(self.vlm.record, self.twin)[number])

    def attention_of(self, number: int) -> torch.nn.Module:
        return part(self.layer(number), self.vlm.layer_parts[number].has("attention"))

    @property
    def memory(self) -> tuple[int, ...]:
        """The layers that read an image's memory."""
        return self.vlm.memory_layers

    def accessor(self, name: str, layer: int) -> Any:
        """The accessor of a name; where a memory is read, that of the memory's."""
        return getattr(
            self.vlm, f"memory_{name}" if name in ("pattern", "attention") and layer in self.memory else name
        )

    @torch.no_grad()
    def run(self, **hooks: Any):
        return self.twin(**self.encoding, **hooks)

    @cached_property
    def seen(self) -> dict[str, Any]:
        """What Hugging Face's own forward has: states 0 to n_layers, attentions, logits."""
        states: list[Tensor] = []
        n = self.vlm.n_layers
        handles = [self.layer(i).register_forward_pre_hook(before(states), with_kwargs=True) for i in range(n)]
        handles.append(self.layer(n - 1).register_forward_hook(lambda m, a, out: states.append(first(out).clone())))
        weights: list[Tensor] = []
        if self.memory:  # Hugging Face collects those of self-attention alone
            keep = [
                self.attention_of(i).register_forward_hook(lambda m, a, out: weights.append(out[1])) for i in range(n)
            ]
            handles += keep
        out = self.run(output_attentions=True)
        for handle in handles:
            handle.remove()
        inner = out if getattr(out, "attentions", None) is not None else out.get("language_model_outputs")
        return {"states": states, "attentions": weights or inner["attentions"], "logits": out.logits}

    def read(self, *names: str) -> dict[str, list[Tensor]]:
        """Accessors at every layer, in one trace."""
        with torch.no_grad(), self.vlm.trace(self.inputs):
            got = nnsight.save({name: [] for name in names})
            for layer in range(self.vlm.n_layers):
                for name in names:
                    got[name].append(self.accessor(name, layer)[layer].clone())
        return got

    def last(self, x: Tensor) -> Tensor:
        """The last position of each example, which is the last of the batch."""
        return x[:, -1]


def before(states: list[Tensor]) -> Callable:
    def keep(module, args, kwargs):
        states.append((args[0] if args else kwargs["hidden_states"]).clone())

    return keep


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple | list) else out


@contextmanager
def changed(module: torch.nn.Module, work: Callable[[Tensor], Tensor], entering: bool = False) -> Iterator[None]:
    """`work` on what enters or leaves a module, by a plain hook."""

    def leave(_, args, out):
        new = work(first(out).clone())
        return (new, *out[1:]) if isinstance(out, tuple | list) else new

    def enter(_, args, kwargs):
        if args:
            return (work(args[0].clone()), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else "input"
        return args, {**kwargs, name: work(kwargs[name].clone())}

    handle = (
        module.register_forward_pre_hook(enter, with_kwargs=True) if entering else module.register_forward_hook(leave)
    )
    try:
        yield
    finally:
        handle.remove()


# -- what is read ----------------------------------------------------------------------------------


@method
def states(case: Case) -> None:
    got = case.read("resid_pre", "resid_post")
    for layer in range(case.vlm.n_layers):
        close(got["resid_pre"][layer][case.real], case.seen["states"][layer][case.real])
    close(got["resid_post"][-1][case.real], case.seen["states"][-1][case.real])


@method
def attention_rows(case: Case) -> None:
    got = case.read("pattern")["pattern"]
    for layer, weights in enumerate(case.seen["attentions"]):
        for row, real in enumerate(case.real):
            mine, theirs = (x[row][:, real] for x in (got[layer], weights))
            if layer not in case.memory:
                mine, theirs = (x[..., : len(real)][..., real] for x in (mine, theirs))
            close(mine, theirs, 1e-4)


@method
def queries_keys_values(case: Case) -> None:
    """The projections of what enters the attention, by the weights by head."""
    vlm, given, memories = case.vlm, [], []

    def keep_memory(module, args, kwargs):
        memory = next((kwargs[name] for name in ("cross_attention_states", "key_value_states") if name in kwargs), None)
        memories.append(None if memory is None else memory.reshape(len(case.real), -1, memory.shape[-1]))

    handles = [
        case.attention_of(i).register_forward_pre_hook(hook, with_kwargs=True)
        for i in range(vlm.n_layers)
        for hook in (before(given), keep_memory)
    ]
    case.run()
    for handle in handles:
        handle.remove()
    got = case.read("q", "k", "v")
    for name, weights in (("q", vlm.W_Q), ("k", vlm.W_K), ("v", vlm.W_V)):
        for layer in range(vlm.n_layers):
            source, real = given[layer], case.real
            if layer in case.memory and name != "q":
                source, real = memories[layer], slice(None)
            heads = torch.einsum("bpd,hde->bphe", source, weights[layer])
            mine = got[name][layer]
            heads = heads[:, :, :: heads.shape[2] // mine.shape[2]]  # grouped heads are repeated
            bias = (mine - heads)[real].reshape(-1, *mine.shape[2:])  # the same at every position
            close(mine[real], heads[real] + bias.mean(0))


@method
def head_outputs(case: Case) -> None:
    """z enters the output projection of the twin."""
    vlm, given = case.vlm, []
    handles = []
    for layer in range(vlm.n_layers):
        kind = vlm.record.kind(layer)
        module = part(case.layer(layer), f"{vlm.layer_parts[layer].has('attention')}.{kind.o_proj}")
        handles.append(module.register_forward_pre_hook(lambda m, args: given.append(args[0].clone())))
    case.run()
    for handle in handles:
        handle.remove()
    for mine, theirs in zip(case.read("z")["z"], given, strict=True):
        close(mine.flatten(2)[case.real], theirs[case.real])


@method
def writes(case: Case) -> None:
    """Attention and MLP add up to the twin's states, layer by layer."""
    got = case.read("attn_out", "mlp_out")
    before_, after = case.seen["states"][:-1], case.read("resid_post")["resid_post"]
    for layer in range(case.vlm.n_layers):
        total = before_[layer] + got["attn_out"][layer] + got["mlp_out"][layer]
        close(total[case.real], after[layer][case.real])


@method
def middle_state(case: Case) -> None:
    got = case.read("attn_out", "resid_mid")
    for layer in range(case.vlm.n_layers):
        close(
            got["resid_mid"][layer][case.real],
            (case.seen["states"][layer] + got["attn_out"][layer])[case.real],
        )


@method
def assignment(case: Case) -> None:
    """What is assigned is what the layer goes on with."""
    vlm, at = case.vlm, 1
    with torch.no_grad(), vlm.trace(case.inputs):
        pre = nnsight.save(vlm.resid_pre[at].clone())
        vlm.z[at] = 0.5 * vlm.z[at]
        attn_out = nnsight.save(0.5 * vlm.attn_out[at])
        vlm.attn_out[at] = attn_out
        mlp_out = nnsight.save(0.5 * vlm.mlp_out[at])
        vlm.mlp_out[at] = mlp_out
        post = nnsight.save(vlm.resid_post[at].clone())
        vlm.resid_post[at] = 2 * vlm.resid_post[at]
        twice = nnsight.save(vlm.resid_pre[at + 1].clone())
        logits = nnsight.save(vlm.logits)
    close(post[case.real], (pre + attn_out + mlp_out)[case.real])
    text = case.real & (case.inputs.encoding["input_ids"] != families.parts.IMAGE)
    close(twice[text], 2 * post[text])
    assert (logits - case.seen["logits"]).abs().max() > 1e-3
    with torch.no_grad(), vlm.trace(case.inputs):
        pattern = case.accessor("pattern", at)[at].flip(1)
        values = nnsight.save(case.accessor("attention", at)[at].v)
        case.accessor("pattern", at)[at] = pattern
        z = nnsight.save(vlm.z[at])
        used = nnsight.save(pattern)
    values = values.repeat_interleave(used.shape[1] // values.shape[1], 1)
    close(z, (used @ values).transpose(1, 2))
    with torch.no_grad(), vlm.trace(case.inputs):
        for heads in (vlm.q, vlm.k, vlm.v):
            new = heads[at].clone()
            new[:, :, 0] = 0
            heads[at] = new
        parts = nnsight.save(case.accessor("attention", at)[at])
    for heads in (parts.q, parts.k, parts.v):
        assert heads[:, 0].abs().max() < 1e-5
        assert heads[:, -1].abs().max() > 0 or heads.shape[1] == 1


@method
def cache(case: Case) -> None:
    """All hooks that the layers have; the norms' divisors by torch's own statistics."""
    vlm = case.vlm
    logits, got = vlm.run_with_cache(case.inputs)
    close(logits[case.real], case.seen["logits"][case.real])
    for layer in sorted({1, *case.memory}):
        kind = "cross_attn" if layer in case.memory else "attn"
        mine, theirs = got[f"blocks.{layer}.{kind}.hook_pattern"], case.seen["attentions"][layer]
        real = case.real[0]
        seen = slice(None) if layer in case.memory else real
        close(*(x[0][:, real][..., : mine.shape[-1]][..., seen] for x in (mine, theirs)))
    close(got["resid_pre", 2][case.real], case.seen["states"][2][case.real])
    norm = part(case.twin, vlm.record.norm)
    with torch.no_grad():
        centres = torch.allclose(norm(case.seen["states"][-1]), norm(case.seen["states"][-1] + 1), atol=1e-3)
    for name, state in (
        ("ln_final.hook_scale", case.seen["states"][-1]),
        ("blocks.1.ln1.hook_scale", case.seen["states"][1]),
    ):
        if name in got:
            spread = state.var(-1, unbiased=False) if centres else state.pow(2).mean(-1)
            close(got[name][case.real][:, 0], (spread[case.real] + vlm.norm_eps).sqrt())


# -- probes ----------------------------------------------------------------------------------------


@method
def logit_lens(case: Case) -> None:
    """A state as the twin's last state: Hugging Face's own readout of it."""
    n = case.vlm.n_layers
    lens = mv.logit_lens(case.vlm, case.inputs, k=4, positions="last", states=[1, n])
    for number, state in enumerate((1, n)):
        with changed(case.layer(n - 1), lambda x, state=state: case.seen["states"][state]):
            logits = case.run().logits[:, -1]
        top = logits.softmax(-1).topk(4)
        close(lens.probs[number], top.values, 1e-3)
        assert torch.equal(lens.ids[number].sort().values, top.indices.sort().values)


@method
def contextualization(case: Case) -> None:
    cosines = mv.contextualization(case.vlm, case.inputs)
    for state in (0, 2):
        for example, tokens in enumerate(case.inputs.token_maps):
            v, w = (case.seen["states"][state][example, where] for where in (tokens.image, tokens.text))
            naive = cosine_similarity(v[:, None], w[None], dim=-1).mean()
            assert abs(float(cosines.inter[state, example] - naive)) < 1e-4


@method
def norm_attention(case: Case) -> None:
    """The vectors that each source writes, one by one, through whatever stands after W_O."""
    vlm = case.vlm
    norms = mv.norm_attention(vlm, case.inputs, dst="last")
    values = []
    with torch.no_grad(), vlm.trace(case.inputs):
        got = nnsight.save(values)
        for layer in range(vlm.n_layers):
            got.append(case.accessor("attention", layer)[layer].v)
    of_memory = mv.memory_attention(vlm, case.inputs, dst="last") if case.memory else None
    for layer in range(vlm.n_layers):
        kind = vlm.record.kind(layer)
        o_proj = part(case.layer(layer), f"{kind.attention}.{kind.o_proj}")
        alpha = case.seen["attentions"][layer][:, :, -1, : got[layer].shape[2]]
        v = got[layer].repeat_interleave(alpha.shape[1] // got[layer].shape[1], 1)
        weighted = (alpha[..., None] * v).transpose(1, 2).flatten(2)  # [example src head * d_head]
        with torch.no_grad():
            vectors = weighted @ o_proj.weight.T
            if kind.attn_out != kind.attention:  # a norm, linear once its divisor is known
                total = o_proj(weighted.sum(1))
                vectors = vectors * (part(case.layer(layer), kind.attn_out)(total) / total)[:, None]
        lengths = kind.scale * vectors.norm(dim=-1)
        if of_memory is not None and layer in case.memory:
            at = of_memory.layers.index(layer)
            gate = getattr(case.layer(layer), kind.attn_gate).detach().tanh()
            close(of_memory.norm[at, :, 0], (gate * vectors).norm(dim=-1), 1e-3)
            close(of_memory.weight[at, :, :, 0], alpha)
            assert not norms.norm[layer].any()
            continue
        close(norms.norm[layer, :, 0][case.real], lengths[case.real], 1e-3)
        by_head = _by_head(weighted, o_proj, alpha.shape[1])
        if kind.attn_out != kind.attention:
            by_head = by_head * (part(case.layer(layer), kind.attn_out)(total) / total)[:, None, None]
        lengths = kind.scale * by_head.norm(dim=-1).transpose(1, 2)  # [example head src]
        real = case.real[:, None].expand_as(lengths)
        close(norms.norm_head[layer, :, :, 0][real], lengths[real].detach(), 1e-3)
        assert norms.weight[layer, :, 0].sum(-1).max() <= 1 + 1e-5


def _by_head(weighted: Tensor, o_proj: torch.nn.Module, n_heads: int) -> Tensor:
    """What each head writes of each source, [example src head d_model]."""
    heads, weight = weighted.unflatten(2, (n_heads, -1)), o_proj.weight.unflatten(1, (n_heads, -1))
    return torch.einsum("eshd,mhd->eshm", heads, weight)


@method
def logit_attribution(case: Case) -> None:
    vlm = case.vlm
    parts = mv.logit_attribution(vlm, case.inputs, ANSWER)
    logits = case.seen["logits"][:, -1, ANSWER]
    cap = vlm.unembed.cap
    close(parts.total, logits if cap is None else torch.atanh(logits / cap) * cap, 1e-3)
    close(parts.from_image + parts.from_rest, parts.heads)
    for layer in range(vlm.n_layers) if case.memory else ():
        share = parts.heads[layer] if layer in case.memory else torch.zeros_like(parts.heads[layer])
        close(parts.from_image[layer] + 1, share + 1)


# -- the table -------------------------------------------------------------------------------------

REFUSALS = (mv.ModelError, mv.InputError, mv.ViewError, ValueError)


def outcome(work: Callable[[Case], None], case: Case) -> str:
    """ "" where a method works on a family; else why it is refused. Wrong numbers raise."""
    try:
        work(case)
    except REFUSALS as error:
        return " ".join(str(error).split())
    return ""
