"""Norm-based attention: attention weights times the norm of what is actually written (Kobayashi et al. 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.accessors import attention_rows
from mechvlm.results import Result, long_frame, stack
from mechvlm.tokens import Modality

CHUNK = 2**26
"""Numbers that the transformed values f may take up at once (256 MB in float32): sources are worked off in chunks."""


def transformed_values(
    v: Float[Tensor, "batch kv_head src d_head"], w_o: Float[Tensor, "d_model head_d_head"]
) -> Float[Tensor, "batch src head d_model"]:
    """f_h(x_j) = v_hj W_O^h: what head h would write of source j at weight 1. Float32.

    v holds W_V's bias and leaves out W_O's, which belongs to no source (Kobayashi et al. 2020, eq. 2-4). Grouped queries
    share their value.
    """
    d_head = v.shape[-1]
    heads = rearrange(w_o.float(), "d_model (head d_head) -> head d_head d_model", d_head=d_head)
    v = v.float().repeat_interleave(len(heads) // v.shape[1], dim=1)
    return torch.einsum("bhse,hed->bshd", v, heads)


def norm_attention_sum(
    alpha: Float[Tensor, "batch head dest src"], f: Float[Tensor, "batch src head d_model"]
) -> Float[Tensor, "batch dest src"]:
    """Norm of what each source token wrote to each destination, summed over heads (residual-stream units).

    ‖Σ_h α_h[dest, src] f_h[src]‖ = sqrt(αᵀ G α) with G_src[h, g] = f_h[src] · f_g[src], by the Gram matrix of f over heads:
    exact, and never [dest, src, d_model].

    Source: Kobayashi et al. 2020, eq. 5. Differs: x is the RMS-normed input of a pre-norm decoder.
    Tested: equals the norm of the explicitly summed vectors.
    """
    gram = f @ f.transpose(-1, -2)  # [batch src head head]
    a = rearrange(alpha, "batch head dest src -> batch src dest head")
    return rearrange(((a @ gram) * a).sum(-1).clamp(min=0).sqrt(), "batch src dest -> batch dest src")


@dataclass(frozen=True, repr=False)
class NormAttentionResult(Result):
    """What each source token wrote to chosen destinations, layer by layer; beside it the raw weights.

    Rows are of one batch, so source positions are those of the padded sequence (0 where there is padding, and after the
    destination). Entry l is layer l's attention, from state l - 1 to state l.

    Attributes:
        norm: ‖Σ_h α_h f_h(x_src)‖, the heads' vectors summed first (residual-stream units).
        norm_head: ‖α_h f_h(x_src)‖ = α_h ‖f_h(x_src)‖ per head.
        weight: α_h, the raw attention weights (0 to 1, each row of a token sums to 1).
        layers: 1 to n_layers.
        dest: the destination positions, per example; with all pairs, every position.
        names: what the destinations are called.
        model: the model's name.
    """

    units: ClassVar[str] = "norm of the vector written (residual-stream units)"

    norm: Float[Tensor, "layer example dest src"]
    norm_head: Float[Tensor, "layer example head dest src"]
    weight: Float[Tensor, "layer example head dest src"]
    layers: tuple[int, ...]
    dest: Int[Tensor, "example dest"]
    names: tuple[str, ...]
    model: str

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


@dataclass(frozen=True)
class NormAttention:
    """Probe: norm-based attention of chosen destinations to all their sources, at every layer.

    Args:
        dst: a destination by name ("last_text", "last_image", "last", ...), several of them, numbers (the same for every
            example), or "all pairs". A name must mean the same number of positions in every example.

    The model stays on its own attention implementation: weights are recomputed from its q and k for the rows asked for.
    """

    dst: str | int | Sequence[str | int] = ("last_text", "last_image")

    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    def prepare(self, vlm, inputs):
        length = len(inputs.token_maps[0])
        if isinstance(self.dst, str) and self.dst == "all pairs":
            real = torch.stack([m.modality != Modality.PADDING for m in inputs.token_maps])
            return torch.arange(length).expand(len(inputs), -1), tuple(str(p) for p in range(length)), real
        asked = [self.dst] if isinstance(self.dst, str | Integral) else list(self.dst)
        if not asked:
            raise ValueError("dst is empty: name at least one destination, such as 'last'.")
        asked = [d if isinstance(d, str) else int(d) for d in asked]
        found = [[m.select(d if isinstance(d, str) else [d]) for d in asked] for m in inputs.token_maps]
        sizes = {tuple(len(p) for p in rows) for rows in found}
        if len(sizes) != 1:
            raise ValueError(
                f"dst={self.dst!r} means different numbers of positions in these examples: {sorted(sizes)}."
            )
        names = [str(d) if n == 1 else f"{d} {i}" for d, n in zip(asked, sizes.pop(), strict=True) for i in range(n)]
        return torch.stack([torch.cat(rows) for rows in found]), tuple(names), None

    def at_attention(self, plan, attended):
        dest, _, real = plan
        q, k, v, mask, scale = attended.parts
        alpha = attention_rows(q, k, mask, scale, dest)
        if real is not None:  # a destination of padding attends to anything
            alpha = alpha * real.to(alpha.device)[:, None, :, None]
        per_source = len(v) * q.shape[1] * attended.w_o.shape[0]
        # Columns of the result depend on one source each, so that sources can be worked off in chunks.
        norms, heads = [], []
        step = max(1, CHUNK // per_source)
        for start in range(0, v.shape[2], step):
            src = slice(start, start + step)
            f = transformed_values(v[:, :, src], attended.w_o)
            norms.append(norm_attention_sum(alpha[..., src], f))
            size = rearrange(torch.linalg.vector_norm(f, dim=-1), "batch src head -> batch head 1 src")
            heads.append(alpha[..., src] * size)
        return {"norm": torch.cat(norms, -1), "norm_head": torch.cat(heads, -1), "weight": alpha}

    def result(self, plan, rows, vlm, inputs) -> NormAttentionResult:
        dest, names, _ = plan
        parts = {name: stack([row[name] for row in rows]) for name in ("norm", "norm_head", "weight")}
        return NormAttentionResult(
            **parts, layers=tuple(range(1, vlm.n_layers + 1)), dest=dest, names=names, model=vlm.name
        )
