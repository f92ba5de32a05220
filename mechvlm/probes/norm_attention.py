"""Norm-based attention: attention weights times the norm of what is actually written (Kobayashi et al. 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.decoder.attention import attention_rows
from mechvlm.figures.style import axes, heatmap, position_ticks, style
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import Modality
from mechvlm.probes.probe import Attended, Model, Row
from mechvlm.results import Result, long_frame, stack

NUMBERS_IN_CACHE, NUMBERS_IN_MEMORY = 2**21, 2**26
"""Numbers of an intermediate that exist at once: on the CPU as many as its cache holds (8 MB), elsewhere enough for full kernels
(256 MB)."""


def value_gram(
    v: Float[Tensor, "batch kv_head src d_head"], w_o: Float[Tensor, "d_model head_d_head"]
) -> Float[Tensor, "batch src head head"]:
    """G_src[h, g] = f_h(x_src) · f_g(x_src), where f_h(x_j) = v_hj W_O^h is what head h would write of source j at weight 1.

    v holds W_V's bias and leaves out W_O's, which belongs to no source (Kobayashi et al. 2020, eq. 2-4). Grouped queries
    share their value. The sum over d_model is taken in pieces, so that f [batch src head d_model] never exists as a whole.
    Tested: equals f @ fᵀ, with f formed whole.
    """
    if len(v) > 1 and v.device.type == "cpu":
        # An example at a time: pieces of all of them would be too narrow for the matrix product.
        return torch.cat([value_gram(example[None], w_o) for example in v])
    batch, kv_heads, n_src, d_head = v.shape
    n_heads = w_o.shape[1] // d_head
    v = v.float().repeat_interleave(n_heads // kv_heads, dim=1)
    v = rearrange(v, "batch head src d_head -> head (batch src) d_head")
    heads = rearrange(w_o, "d_model (head d_head) -> head d_head d_model", d_head=d_head)
    gram = v.new_zeros(batch * n_src, n_heads, n_heads)
    pieces = heads.split(_at_once(batch * n_src * n_heads, v.device), dim=-1)
    # Written again for each piece, where no gradient needs it: new memory would cost as much as the product of f with itself.
    held = None if torch.is_grad_enabled() else v.new_empty(n_heads, batch * n_src, pieces[0].shape[-1])
    for piece in pieces:
        f = torch.bmm(v, piece.float(), out=None if held is None else held[..., : piece.shape[-1]])
        f = rearrange(f, "head point d -> point head d")
        gram.baddbmm_(f, f.transpose(-1, -2))
    return rearrange(gram, "(batch src) h g -> batch src h g", batch=batch)


def norm_attention_sum(
    alpha: Float[Tensor, "batch head dest src"], gram: Float[Tensor, "batch src head head"]
) -> Float[Tensor, "batch dest src"]:
    """Norm of what each source token wrote to each destination, summed over heads (residual-stream units).

    ‖Σ_h α_h[dest, src] f_h[src]‖ = sqrt(αᵀ G α), with G_src[h, g] = f_h[src] · f_g[src] (`value_gram`): exact, and never
    [dest, src, d_model].

    Source: Kobayashi et al. 2020, eq. 5. Differs: x is the RMS-normed input of a pre-norm decoder.
    Tested: equals the norm of the explicitly summed vectors.
    """
    # Laid out by source once: both products then run over memory as it lies.
    a = rearrange(alpha, "batch head dest src -> batch src head dest").contiguous()
    return rearrange((gram @ a).mul_(a).sum(2).clamp_(min=0).sqrt_(), "batch src dest -> batch dest src")


def _at_once(size: int, device: torch.device) -> int:
    """How many things of `size` numbers are made at once; never fewer than 32, since products need some width."""
    return max(32, (NUMBERS_IN_CACHE if device.type == "cpu" else NUMBERS_IN_MEMORY) // size)


@dataclass(frozen=True, repr=False)
class NormAttentionResult(Result):
    """What each source token wrote to chosen destinations, layer by layer; beside it the raw weights.

    Rows are of one batch, so source positions are those of the padded sequence (0 where there is padding, and after the
    destination). Entry l is layer l's attention, from state l - 1 to state l.

    Attributes:
        norm: ‖Σ_h α_h f_h(x_src)‖, the heads' vectors summed first (residual-stream units).
        weight: α_h, the raw attention weights (0 to 1, each row of a token sums to 1).
        value_norm: ‖f_h(x_src)‖ per head, what it would write at weight 1 (residual-stream units).
        layers: 1 to n_layers.
        dest: the destination positions, per example; with all pairs, every position.
        names: what the destinations are called.
        model: the model's name.
    """

    units: ClassVar[str] = "norm of the vector written (residual-stream units)"

    norm: Float[Tensor, "layer example dest src"]
    weight: Float[Tensor, "layer example head dest src"]
    value_norm: Float[Tensor, "layer example head src"]
    layers: tuple[int, ...]
    dest: Int[Tensor, "example dest"]
    names: tuple[str, ...]
    model: str

    @property
    def norm_head(self) -> Float[Tensor, "layer example head dest src"]:
        """‖α_h f_h(x_src)‖ = α_h ‖f_h(x_src)‖ per head (residual-stream units); computed when it is asked for."""
        return self.weight * self.value_norm[:, :, :, None]

    def to_frame(self) -> pd.DataFrame:
        """One row per measure ("norm", "weight": its mean over heads), layer, example, destination and source."""
        _, n_examples, _, n_src = self.norm.shape
        axes = {"layer": self.layers, "example": range(n_examples), "dest": self.names, "src": range(n_src)}
        return pd.concat(
            [
                long_frame(self.norm, **axes).assign(measure="norm"),
                long_frame(self.weight.mean(2), **axes).assign(measure="weight"),
            ],
            ignore_index=True,
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The first destination's sources by layer, mean over examples."""
        with style():
            n_layers, _, _, n_src = self.norm.shape
            ax = axes(ax, width=8, height=1.6 + 0.22 * n_layers)
            mesh = heatmap(ax, self.norm[:, :, 0].mean(1).numpy(), list(self.layers))
            position_ticks(ax, list(range(n_src)))
            ax.set_xlabel("source position")
            ax.set_title(f"Norm-based attention of {self.names[0]}, {self.model}")
            ax.figure.colorbar(mesh, ax=ax, label="norm written (residual-stream units)", pad=0.01)
        return ax


class NormPlan(NamedTuple):
    """The destinations, their names, and of all pairs which destinations are padding."""

    dest: Int[Tensor, "batch dest"]
    names: tuple[str, ...]
    padding: Bool[Tensor, "batch pos"] | None


@dataclass(frozen=True)
class NormAttention:
    """Probe: norm-based attention of chosen destinations to all their sources, at every layer.

    Args:
        dst: a destination by name ("last_text", "last_image", "last", ...), several of them, numbers (the same for every
            example), or "all pairs". A name must mean the same number of positions in every example.

    The model stays on its own attention implementation: weights are recomputed from its q and k for the rows asked for.
    """

    dst: str | int | Sequence[str | int] = ("last_text", "last_image")

    def prepare(self, vlm: Model, inputs: Inputs) -> NormPlan:
        """The destinations of each example, and what they are called."""
        length = len(inputs.token_maps[0])
        if isinstance(self.dst, str) and self.dst == "all pairs":
            padding = torch.stack([m.modality == Modality.PADDING for m in inputs.token_maps])
            return NormPlan(torch.arange(length).expand(len(inputs), -1), tuple(map(str, range(length))), padding)
        dst: Any = self.dst
        given: list[Any] = [dst] if isinstance(dst, str | Integral) else list(dst)
        if not given:
            raise ValueError("dst is empty: name at least one destination, such as 'last'.")
        given = [d if isinstance(d, str) else int(d) for d in given]
        by_example = [[m.select(d if isinstance(d, str) else [d]) for d in given] for m in inputs.token_maps]
        sizes = {tuple(len(p) for p in rows) for rows in by_example}
        if len(sizes) != 1:
            raise ValueError(
                f"dst={self.dst!r} means different numbers of positions in these examples: {sorted(sizes)}."
            )
        names = [str(d) if n == 1 else f"{d} {i}" for d, n in zip(given, sizes.pop(), strict=True) for i in range(n)]
        return NormPlan(torch.stack([torch.cat(rows) for rows in by_example]), tuple(names), None)

    def at_attention(self, plan: NormPlan, attended: Attended) -> Row:
        """Norms and weights of the destinations' rows, and what each head would write of each source."""
        dest, _, padding = plan
        q, k, v, mask, scale = attended.parts
        gram = value_gram(v, attended.w_o)
        batch, n_heads, n_src, n_dest = len(q), q.shape[1], k.shape[2], dest.shape[1]
        weight = gram.new_zeros(batch, n_heads, n_dest, n_src)
        norm = gram.new_zeros(batch, n_dest, n_src)
        # Some destinations at a time: what is made of them stays in the cache.
        size = _at_once(batch * n_heads * n_src, q.device)
        for rows, weights, norms in zip(dest.split(size, 1), weight.split(size, 2), norm.split(size, 1), strict=True):
            seen = slice(int(rows.max()) + 1 if mask is None else n_src)  # no mask is the causal one
            alpha = attention_rows(q[:, :, seen], k[:, :, seen], mask, scale, rows)
            if padding is not None:  # a destination of padding attends to anything
                alpha.masked_fill_(padding.gather(1, rows).to(alpha.device)[:, None, :, None], 0)
            weights[..., seen] = alpha
            norms[..., seen] = norm_attention_sum(alpha, gram[:, seen])
        value_norm = rearrange(gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt(), "batch src head -> batch head src")
        return {"norm": norm, "weight": weight, "value_norm": value_norm}

    def result(self, plan: NormPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> NormAttentionResult:
        """The rows of all layers."""
        parts = {name: stack([row[name] for row in rows]) for name in ("norm", "weight", "value_norm")}
        return NormAttentionResult(
            **parts, layers=tuple(range(1, vlm.n_layers + 1)), dest=plan.dest, names=plan.names, model=vlm.name
        )
