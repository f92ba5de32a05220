"""Norm-based attention: the norm of what attention writes, instead of its weights alone.

A source with a large weight may still write next to nothing (Kobayashi et al. 2020). Head h writes
α_h[dest, src] f_h(x_src) of a source to a destination, with f_h(x_j) = v_hj W_O^h.

The vectors themselves, [dest src d_model], are never formed: `mechvlm.probes.value_gram` has the
formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechvlm.decoder.attention import attention_rows
from mechvlm.errors import InputError
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.selections import part_of_selection, parts_of
from mechvlm.inputs.tokens import Modality
from mechvlm.inputs.views import MEMORY
from mechvlm.probes.norm_picture import NormPicture
from mechvlm.probes.probe import Attended, Model, Row
from mechvlm.probes.shares import OF, AttentionShareResult, group_shares
from mechvlm.probes.value_gram import items_per_chunk, norm_attention_sum, shared_gram
from mechvlm.results import Result, long_frame, stack


class NormPlan(NamedTuple):
    """The destinations and their names; for all pairs also which positions are padding.

    dest: the positions of each example's destinations.
    furthest: of each destination, its last position in any example.
    """

    dest: Int[Tensor, "batch dest"]
    furthest: tuple[int, ...]
    names: tuple[str, ...] = ()
    padding: Bool[Tensor, "batch pos"] | None = None


def plan_of(
    dest: Int[Tensor, "batch dest"], names: tuple[str, ...] = (), padding: Bool[Tensor, "batch pos"] | None = None
) -> NormPlan:
    """The plan for these destinations."""
    return NormPlan(dest, tuple(dest.amax(0).tolist()), names, padding)


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
        return replace(self, dst=part_of_selection(self.dst, numbers, n_examples, "dst"))

    def prepare(self, vlm: Model, inputs: Inputs) -> NormPlan:
        """Find the destinations of each example, and name them."""
        length = len(inputs.token_maps[0])
        if isinstance(self.dst, str) and self.dst == "all pairs":
            padding = torch.stack([tokens.modality == Modality.PADDING for tokens in inputs.token_maps])
            return plan_of(torch.arange(length).expand(len(inputs), -1), tuple(map(str, range(length))), padding)
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
        return plan_of(dest, tuple(names))

    def at_attention(self, plan: NormPlan, attended: Attended) -> Row:
        """The destinations' norms [example dest src] and weights [example head dest src].

        Also ‖f_h(x_src)‖ of every head and source, [example head src].
        """
        dest, padding, parts = plan.dest, plan.padding, attended.parts
        q, k = parts.q, parts.k
        gram = shared_gram(attended)
        batch, n_heads, n_src, n_dest = len(q), q.shape[1], k.shape[2], dest.shape[1]
        weight = gram.new_zeros(batch, n_heads, n_dest, n_src)
        norm = gram.new_zeros(batch, n_dest, n_src)
        # A few destinations at a time, so that their intermediates stay in the cache.
        size = items_per_chunk(batch * n_heads * n_src, q.device)
        for start in range(0, n_dest, size):
            here = slice(start, start + size)
            rows = dest[:, here]
            # No mask is the causal one: no row sees a source after the last of these destinations.
            visible = slice(max(plan.furthest[here]) + 1 if parts.mask is None and parts.causal else None)
            alpha = attention_rows(parts._replace(q=q[:, :, visible], k=k[:, :, visible]), rows)
            if padding is not None:  # a destination on padding attends to arbitrary sources
                alpha.masked_fill_(padding.gather(1, rows).to(alpha.device)[:, None, :, None], 0)
            weight[:, :, here, visible] = alpha
            norm[:, here, visible] = norm_attention_sum(alpha, gram[:, visible])
        divisor = norm.new_ones(batch, n_dest)
        if attended.divisor is not None:
            divisor = attended.divisor.float().to(norm.device).gather(1, dest.to(norm.device)[..., None])[..., 0]
            norm /= divisor[..., None]
        value_norm = rearrange(gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt(), "batch src head -> batch head src")
        return {"norm": norm, "weight": weight, "value_norm": value_norm, "divisor": divisor}

    def result(self, plan: NormPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> "NormAttentionResult":
        """The rows of all layers; zeros for those that read no position."""
        none = {name: torch.zeros_like(value) for name, value in rows[0].items()}
        none["divisor"] = torch.ones_like(rows[0]["norm"][..., 0])
        own = iter(rows)
        rows = [none if layer in vlm.memory_layers else next(own) for layer in range(vlm.n_layers)]
        parts: dict[str, Any] = {name: stack([row[name] for row in rows]) for name in ("norm", "weight", "value_norm")}
        # A job that an earlier version left has none.
        divisor = stack([row["divisor"] for row in rows]) if all("divisor" in row for row in rows) else None
        padding = torch.stack([tokens.modality == Modality.PADDING for tokens in inputs.token_maps])
        parts["value_norm"].masked_fill_(padding[:, None], 0)
        modality = torch.stack([tokens.modality for tokens in inputs.token_maps])
        ids = torch.stack([tokens.ids for tokens in inputs.token_maps]).masked_fill(padding, -1)
        distinct = ids[ids >= 0].unique()
        return NormAttentionResult(
            **parts, layers=tuple(range(vlm.n_layers)), dest=plan.dest, names=plan.names, model=vlm.name,
            modality=modality, divisor=divisor, ids=ids,
            vocabulary=tuple(zip(distinct.tolist(), vlm.to_str_tokens(distinct), strict=True)),
            cells=torch.stack([tokens.whole_cells for tokens in inputs.token_maps]),
        )  # fmt: skip


def moved_destinations(
    dest: Int[Tensor, "example dest"], names: tuple[str, ...], old: int, length: int
) -> tuple[Int[Tensor, "example _"], tuple[str, ...], int]:
    """Destinations in sequences padded on the left from `old` to `length` positions.

    Returns:
        (dest, names, n): also how many destinations come before them: with all pairs, the padding.

    Raises:
        InputError: for destinations by number, which mean other tokens then.
    """
    if names == tuple(map(str, range(old))):
        return torch.arange(length).expand(len(dest), -1), tuple(map(str, range(length))), length - old
    if numbers := [name for name in names if name.isdigit()]:
        raise InputError(
            f"dst={', '.join(numbers)} are positions by number, in batches that are padded to {old} and to {length} positions: "
            "they mean other tokens. Give dst by name, or all examples as one batch."
        )
    return dest + length - old, names, 0


@dataclass(frozen=True, repr=False)
class NormAttentionResult(NormPicture, Result):
    """What each source wrote to chosen destinations, layer by layer, and the raw weights beside it.

    All examples are of one batch, so source positions are those of the padded sequence (0 on
    padding, and after the destination). The attention of layer l reads state l. A layer that reads
    an image's memory reads no position, and is 0 here (`mechvlm.memory_attention` has it).

    Attributes:
        norm: ‖Σ_h α_h f_h(x_src)‖, the heads' vectors summed first (residual-stream units).
        weight: α_h, the raw attention weights (0 to 1, each row of a token sums to 1).
        value_norm: ‖f_h(x_src)‖ per head, what it would write at weight 1 (residual-stream units).
        layers: 0 to n_layers - 1, as in `vlm.pattern[layer]` and `mv.ablate(..., layers=layer)`.
        dest: the destination positions, per example; with all pairs, every position.
        names: what the destinations are called.
        model: the model's name.
        modality: what each source position holds, a `Modality`; None in files of earlier versions.
        divisor: what a norm after the attention divides each destination's sum by, in `norm`
            already; 1 where there is none, and None in files of earlier versions.
        ids: token ids of the sources, -1 on padding; None in files of earlier versions.
        vocabulary: the text of every id in `ids`, as (id, text) pairs.
        cells: (image, row, col) of each source's patch, -1 where it is none; None in files of
            earlier versions.
    """

    computed: ClassVar[tuple[str, ...]] = ("vocabulary",)
    units: ClassVar[str] = "norm of the vector written (residual-stream units)"

    norm: Float[Tensor, "layer example dest src"]
    weight: Float[Tensor, "layer example head dest src"]
    value_norm: Float[Tensor, "layer example head src"]
    layers: tuple[int, ...]
    dest: Int[Tensor, "example dest"]
    names: tuple[str, ...]
    model: str
    modality: Int[Tensor, "example src"] | None = None
    divisor: Float[Tensor, "layer example dest"] | None = None
    ids: Int[Tensor, "example src"] | None = None
    vocabulary: tuple[tuple[int, str], ...] = ()
    cells: Int[Tensor, "example src 3"] | None = None

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
        dest, names, rows = moved_destinations(self.dest, self.names, self.seq_length, length)
        norm, weight = (pad(x, (shift, 0, rows, 0)) for x in (self.norm, self.weight))
        value_norm = pad(self.value_norm, (shift, 0))
        modality = None if self.modality is None else pad(self.modality, (shift, 0), value=int(Modality.PADDING))
        divisor = None if self.divisor is None else pad(self.divisor, (rows, 0), value=1)
        ids = None if self.ids is None else pad(self.ids, (shift, 0), value=-1)
        cells = None if self.cells is None else pad(self.cells, (0, 0, shift, 0), value=-1)
        return replace(
            self, norm=norm, weight=weight, value_norm=value_norm, dest=dest, names=names, modality=modality,
            divisor=divisor, ids=ids, cells=cells,
        )  # fmt: skip

    @classmethod
    def joined(cls, results: Sequence["NormAttentionResult"]) -> dict[str, Any]:
        """The texts of all ids."""
        return {"vocabulary": tuple(sorted({pair for result in results for pair in result.vocabulary}))}

    @property
    def norm_head(self) -> Float[Tensor, "layer example head dest src"]:
        """‖α_h f_h(x_src)‖ = α_h ‖f_h(x_src)‖ per head, computed on demand.

        In residual-stream units: divided as `norm` is, where a norm follows the attention.
        """
        return torch.stack([self.heads_of(example) for example in range(self.norm.shape[1])], 1)

    def heads_of(self, example: int, rows: Sequence[int] | None = None) -> Float[Tensor, "layer head dest src"]:
        """`norm_head` of one example, and of its destinations number `rows`; by default of all."""
        chosen = slice(None) if rows is None else list(rows)
        written = self.weight[:, example][:, :, chosen] * self.value_norm[:, example, :, None]
        return written if self.divisor is None else written / self.divisor[:, example, chosen][:, None, :, None]

    @property
    def sink_share(self) -> Float[Tensor, "layer example head dest"]:
        """What each row's weights lack of 1: the share of an attention sink without a value.

        GPT-OSS has such sinks, one number a head. Without them it is 0, up to rounding; of
        destinations on padding, and in layers that read an image's memory, it is 1.
        """
        return (1 - self.weight.sum(-1)).clamp(min=0)

    def image_share(self, of: str = "norm") -> AttentionShareResult:
        """The share of each head that goes to image, text, control tokens and the position itself.

        >>> norms.image_share().image    # [layer example head dest], 0 to 1
        >>> norms.image_share().heads(top=10)

        Args:
            of: "norm", of ‖α_h f_h(x_src)‖; or "weight", of the attention weights. Where only
                shares are wanted, the probe `mv.AttentionShare` keeps no rows.

        Raises:
            ValueError: for another `of`, or a result that an earlier version saved, which does not
                say what its positions hold.
            InputError: for a model whose image is a memory that stands at no position.
        """
        if of not in OF:
            raise ValueError(f"of={of!r} was asked for: shares are of {' or '.join(map(repr, OF))}.")
        if self.modality is None:
            raise ValueError("This result was saved without what its positions hold: read it again for shares.")
        if not (self.modality == Modality.IMAGE).any():
            raise InputError(MEMORY)
        rows = self.weight if of == "weight" else self.norm_head
        if of == "norm":
            rows = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        share = torch.stack([group_shares(layer, self.modality, self.dest) for layer in rows])
        return AttentionShareResult(share, None, of, self.names, self.model, example_ids=self.example_ids)

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
