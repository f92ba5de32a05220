"""Norm-based attention: the norm of what attention writes, instead of its weights alone.

A source with a large weight may still write next to nothing (Kobayashi et al. 2020). Head h writes
α_h[dest, src] f_h(x_src) of a source to a destination, with f_h(x_j) = v_hj W_O^h.

1. `value_gram` gives the dot products of the f_h of every source, [src head head].
2. `norm_attention_sum` makes the norm of Σ_h α_h f_h out of them and the weights.

So the vectors themselves, [dest src d_model], are never formed.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.decoder.attention import attention_rows
from mechvlm.errors import InputError
from mechvlm.figures.style import axes, heatmap, position_ticks, style
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.selections import part_of_selection, parts_of
from mechvlm.inputs.tokens import Modality
from mechvlm.probes.probe import Attended, Model, Row
from mechvlm.results import Result, long_frame, stack

NUMBERS_IN_CACHE, NUMBERS_IN_MEMORY = 2**21, 2**26
"""Numbers of an intermediate that exist at once.

On the CPU as many as its cache holds (8 MB), elsewhere enough for full kernels (256 MB).
"""


def value_gram(
    v: Float[Tensor, "batch kv_head src d_head"], w_o: Float[Tensor, "d_model head_d_head"]
) -> Float[Tensor, "batch src head head"]:
    """G_src[h, g] = f_h(x_src) · f_g(x_src), the dot products of what the heads would write.

    f_h(x_j) = v_hj W_O^h is what head h would write of source j at weight 1. v includes W_V's bias;
    W_O's bias is left out, since it belongs to no source (Kobayashi et al. 2020, eq. 2-4). Grouped
    queries share their value. The sum over d_model is taken in chunks, so that f
    [batch src head d_model] never exists as a whole.

    Tested: equals f @ fᵀ, with f formed whole.
    """
    if len(v) > 1 and v.device.type == "cpu":
        # One example at a time: chunks of all of them would be too narrow for the matrix product.
        return torch.cat([value_gram(example[None], w_o) for example in v])
    batch, kv_heads, n_src, d_head = v.shape
    n_heads = w_o.shape[1] // d_head
    v = v.float().repeat_interleave(n_heads // kv_heads, dim=1)
    v = rearrange(v, "batch head src d_head -> head (batch src) d_head")
    heads = rearrange(w_o, "d_model (head d_head) -> head d_head d_model", d_head=d_head)
    gram = v.new_zeros(batch * n_src, n_heads, n_heads)
    chunks = heads.split(items_per_chunk(batch * n_src * n_heads, v.device), dim=-1)
    # Where no gradient needs f, every chunk is written into the same memory: new memory would cost
    # as much as the product of f with itself.
    buffer = None if torch.is_grad_enabled() else v.new_empty(n_heads, batch * n_src, chunks[0].shape[-1])
    for chunk in chunks:
        f = torch.bmm(v, chunk.float(), out=None if buffer is None else buffer[..., : chunk.shape[-1]])
        f = rearrange(f, "head point d -> point head d")
        gram.baddbmm_(f, f.transpose(-1, -2))
    return rearrange(gram, "(batch src) h g -> batch src h g", batch=batch)


def norm_attention_sum(
    alpha: Float[Tensor, "batch head dest src"], gram: Float[Tensor, "batch src head head"]
) -> Float[Tensor, "batch dest src"]:
    """Norm of what each source wrote to each destination, summed over heads.

    ‖Σ_h α_h[dest, src] f_h[src]‖ = sqrt(αᵀ G α), with G_src[h, g] = f_h[src] · f_g[src]
    (`value_gram`), in residual-stream units: exact, and without a tensor of [dest, src, d_model].

    Source: Kobayashi et al. 2020, eq. 5. Differs: x is the RMS-normed input of a pre-norm decoder.
    Tested: equals the norm of the explicitly summed vectors.
    """
    # Laid out by source once: both products then run over memory as it lies.
    a = rearrange(alpha, "batch head dest src -> batch src head dest").contiguous()
    return rearrange((gram @ a).mul_(a).sum(2).clamp_(min=0).sqrt_(), "batch src dest -> batch dest src")


def items_per_chunk(size: int, device: torch.device) -> int:
    """How many items of `size` numbers are worked on at once.

    At least 32, because matrix products need some width.
    """
    return max(32, (NUMBERS_IN_CACHE if device.type == "cpu" else NUMBERS_IN_MEMORY) // size)


class NormPlan(NamedTuple):
    """The destinations and their names; for all pairs also which positions are padding."""

    dest: Int[Tensor, "batch dest"]
    names: tuple[str, ...]
    padding: Bool[Tensor, "batch pos"] | None


@dataclass(frozen=True)
class NormAttention:
    """Probe: norm-based attention of chosen destinations to all their sources, at every layer.

    >>> (norms,) = mv.read(vlm, inputs, mv.NormAttention(dst="last"))
    >>> norms.norm[:, 0, 0]  # what each source wrote to the last position, [layer src]

    Args:
        dst: destinations: a name ("last_text", "last_image", "last", ...), a word of the text, a
            number, several of them, or a list with one of these lists per example
            (`mechvlm.inputs.selections`); or "all pairs". They must be as many positions in every
            example.

    The model keeps its own attention implementation: the weights of these rows are recomputed from
    its q and k.

    Raises:
        ValueError: from `read`, for no destination, one that is not there, or a name that means
            different numbers of positions.
    """

    dst: Any = ("last_text", "last_image")

    def part_of(self, numbers: range, n_examples: int) -> "NormAttention":
        """The probe for some of the examples."""
        return NormAttention(part_of_selection(self.dst, numbers, n_examples, "dst"))

    def prepare(self, vlm: Model, inputs: Inputs) -> NormPlan:
        """Find the destinations of each example, and name them."""
        length = len(inputs.token_maps[0])
        if isinstance(self.dst, str) and self.dst == "all pairs":
            padding = torch.stack([tokens.modality == Modality.PADDING for tokens in inputs.token_maps])
            return NormPlan(torch.arange(length).expand(len(inputs), -1), tuple(map(str, range(length))), padding)
        by_example = parts_of(self.dst, inputs, "dst")
        sizes = {tuple(len(positions) for _, positions in parts) for parts in by_example}
        if len(sizes) != 1:
            raise ValueError(
                f"dst={self.dst!r} means different numbers of positions in these examples: {sorted(sizes)}. Give names "
                "that mean as many positions in each, such as 'last'."
            )
        names: list[str] = []
        for number, parts in enumerate(zip(*by_example, strict=True)):
            own = {name for name, _ in parts}  # one name, or several where each example has its own
            name, n = own.pop() if len(own) == 1 else f"destination {number}", len(parts[0][1])
            names += [name] if n == 1 else [f"{name} {i}" for i in range(n)]
        dest = torch.stack([torch.cat([positions for _, positions in parts]) for parts in by_example])
        return NormPlan(dest, tuple(names), None)

    def at_attention(self, plan: NormPlan, attended: Attended) -> Row:
        """The destinations' norms [example dest src] and weights [example head dest src].

        Also ‖f_h(x_src)‖ of every head and source, [example head src].
        """
        dest, _, padding = plan
        q, k, v, mask, scale = attended.parts
        gram = value_gram(v, attended.w_o)
        batch, n_heads, n_src, n_dest = len(q), q.shape[1], k.shape[2], dest.shape[1]
        weight = gram.new_zeros(batch, n_heads, n_dest, n_src)
        norm = gram.new_zeros(batch, n_dest, n_src)
        # A few destinations at a time, so that their intermediates stay in the cache.
        size = items_per_chunk(batch * n_heads * n_src, q.device)
        for rows, weights, norms in zip(dest.split(size, 1), weight.split(size, 2), norm.split(size, 1), strict=True):
            # No mask is the causal one: no row sees a source after the last of these destinations.
            visible = slice(int(rows.max()) + 1 if mask is None else n_src)
            alpha = attention_rows(q[:, :, visible], k[:, :, visible], mask, scale, rows)
            if padding is not None:  # a destination on padding attends to arbitrary sources
                alpha.masked_fill_(padding.gather(1, rows).to(alpha.device)[:, None, :, None], 0)
            weights[..., visible] = alpha
            norms[..., visible] = norm_attention_sum(alpha, gram[:, visible])
        value_norm = rearrange(gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt(), "batch src head -> batch head src")
        return {"norm": norm, "weight": weight, "value_norm": value_norm}

    def result(self, plan: NormPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> "NormAttentionResult":
        """The rows of all layers."""
        parts: dict[str, Any] = {name: stack([row[name] for row in rows]) for name in ("norm", "weight", "value_norm")}
        padding = torch.stack([tokens.modality == Modality.PADDING for tokens in inputs.token_maps])
        parts["value_norm"].masked_fill_(padding[:, None], 0)
        return NormAttentionResult(
            **parts, layers=tuple(range(vlm.n_layers)), dest=plan.dest, names=plan.names, model=vlm.name
        )


@dataclass(frozen=True, repr=False)
class NormAttentionResult(Result):
    """What each source wrote to chosen destinations, layer by layer, and the raw weights beside it.

    All examples are of one batch, so source positions are those of the padded sequence (0 on
    padding, and after the destination). The attention of layer l reads state l.

    Attributes:
        norm: ‖Σ_h α_h f_h(x_src)‖, the heads' vectors summed first (residual-stream units).
        weight: α_h, the raw attention weights (0 to 1, each row of a token sums to 1).
        value_norm: ‖f_h(x_src)‖ per head, what it would write at weight 1 (residual-stream units).
        layers: 0 to n_layers - 1, as in `vlm.pattern[layer]` and `mv.ablate(..., layers=layer)`.
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

    @classmethod
    def counted_from_0(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file of format 1, with their layers counted from 0."""
        return values | {"layers": tuple(layer - 1 for layer in values["layers"])}

    @property
    def seq_length(self) -> int:
        return self.norm.shape[-1]

    @property
    def all_pairs(self) -> bool:
        """Whether every position is a destination."""
        return self.names == tuple(map(str, range(self.seq_length)))

    def padded(self, length: int) -> "NormAttentionResult":
        """Padding stands on the left: positions move to the right, over sources of norm 0.

        Raises:
            InputError: for destinations by number, which mean other tokens in sequences of other
                lengths.
        """
        shift, pad = length - self.seq_length, torch.nn.functional.pad
        if not shift:
            return self
        numbers = [name for name in self.names if name.isdigit()]
        if numbers and not self.all_pairs:
            raise InputError(
                f"dst={', '.join(numbers)} are positions by number, in batches that are padded to {self.seq_length} and to "
                f"{length} positions: they mean other tokens. Give dst by name, or all examples as one batch."
            )
        dest, names, rows = self.dest + shift, self.names, 0
        if self.all_pairs:
            dest, names, rows = torch.arange(length).expand(len(dest), -1), tuple(map(str, range(length))), shift
        norm, weight = (pad(x, (shift, 0, rows, 0)) for x in (self.norm, self.weight))
        value_norm = pad(self.value_norm, (shift, 0))
        return replace(self, norm=norm, weight=weight, value_norm=value_norm, dest=dest, names=names)

    @property
    def norm_head(self) -> Float[Tensor, "layer example head dest src"]:
        """‖α_h f_h(x_src)‖ = α_h ‖f_h(x_src)‖ per head, computed on demand.

        In residual-stream units.
        """
        return self.weight * self.value_norm[:, :, :, None]

    def to_frame(self) -> pd.DataFrame:
        """One row per measure, layer, example, destination and source.

        The measures are "norm", and "weight", its mean over heads.
        """
        _, n_examples, _, n_src = self.norm.shape
        labels = {"layer": self.layers, "example": range(n_examples), "dest": self.names, "src": range(n_src)}
        frame = pd.concat(
            [
                long_frame(self.norm, **labels).assign(measure="norm"),
                long_frame(self.weight.mean(2), **labels).assign(measure="weight"),
            ],
            ignore_index=True,
        )
        return self.with_ids(frame)

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
