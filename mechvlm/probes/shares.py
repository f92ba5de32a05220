"""How each head divides its attention among image, text, control tokens and the position itself."""

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.head_map import head_map, head_map_size
from mechvlm.figures.headings import ALONE, n_examples, short_name
from mechvlm.figures.style import text
from mechvlm.inputs.tokens import Modality
from mechvlm.measures.heads import rank_heads
from mechvlm.results import Result, long_frame

SHARED = ("image", "text", "special", "self")
"""What a row is divided among; `self` is the destination, which no other group holds then."""
OF = {"weight": "attention weights", "norm": "norms of what was written"}


def group_shares(
    rows: Float[Tensor, "batch head dest src"], modality: Int[Tensor, "batch src"], dest: Int[Tensor, "batch dest"]
) -> Float[Tensor, "batch head dest 4"]:
    """The sum of each row over the sources of each group, in the order of `SHARED`.

    Tested: equals sums over the positions that a `TokenMap` gives.
    """
    modality, dest = modality.to(rows.device), dest.to(rows.device)
    kinds = Modality.IMAGE, Modality.TEXT, Modality.SPECIAL
    groups = torch.stack([modality == kind for kind in kinds], -1).to(rows)  # [batch src 3]
    sums = torch.einsum("bhds,bsg->bhdg", rows, groups)
    own = rows.gather(3, dest[:, None, :, None].expand(-1, rows.shape[1], -1, 1))
    of_dest = groups.gather(1, dest[..., None].expand(-1, -1, 3))
    return torch.cat([sums - own * of_dest[:, None], own], -1)


def value_norms(
    v: Float[Tensor, "batch kv_head src d_head"], w_o: Float[Tensor, "d_model head_d_head"]
) -> Float[Tensor, "batch head src"]:
    """‖v_h W_O^h‖ of every source, in residual-stream units, without the vectors: v (W Wᵀ) vᵀ."""
    d_head = v.shape[-1]
    heads = rearrange(w_o.float(), "d_model (head d_head) -> head d_head d_model", d_head=d_head)
    v = v.float().repeat_interleave(len(heads) // v.shape[1], dim=1)
    squares = torch.einsum("bhsd,hde,bhse->bhs", v, heads @ heads.transpose(-1, -2), v)
    return squares.clamp(min=0).sqrt()


@dataclass(frozen=True, repr=False)
class AttentionShareResult(Result):
    """How each head divides its attention: image, text, control tokens, the position itself.

    Attributes:
        share: by group, in the order of `SHARED`. Of weights they sum to 1, or to less where an
            attention sink without a value has the rest; of norms they sum to 1. The attention of
            layer l reads state l.
        box: the share of the patches in each example's box, a part of the image's; None without.
        of: "weight" or "norm".
        names: what the destinations are called.
        model: the model's name.
    """

    units: ClassVar[str] = "share of a head's attention (0 to 1)"

    share: Float[Tensor, "layer example head dest group"]
    box: Float[Tensor, "layer example head dest"] | None
    of: str
    names: tuple[str, ...]
    model: str

    @property
    def image(self) -> Float[Tensor, "layer example head dest"]:
        """The share of all visual tokens."""
        return self.group("image")

    def group(self, name: str) -> Float[Tensor, "layer example head dest"]:
        """The share of a group: "image", "text", "special", "self", or "box" where there is one.

        Raises:
            ValueError: for another name, or "box" where no boxes were given.
        """
        if name == "box" and self.box is not None:
            return self.box
        if name not in SHARED:
            known = ", ".join(SHARED if self.box is None else (*SHARED, "box"))
            raise ValueError(f"There is no group {name!r}. Groups: {known}. A box is measured where `boxes` are given.")
        return self.share[..., SHARED.index(name)]

    def heads(self, top: int = 10, by: str = "image") -> pd.DataFrame:
        """The heads with the largest share of a group, mean over destinations and examples.

        Heads of one share follow each other by layer, then by head.

        Args:
            top: how many.
            by: the group, as in `group`.

        Returns:
            One row a head: layer, head, share, and low and high, its 95 % bootstrap interval over
            examples (the draws have seed 0).

        Raises:
            ValueError: for less than one head, or an unknown group.
        """
        return rank_heads(self.group(by).mean(-1).transpose(0, 1), top, "share")

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, example, head, destination and group, with its share."""
        names = SHARED if self.box is None else (*SHARED, "box")
        values = torch.stack([self.group(name) for name in names], -1)
        n_layers, n, n_heads, _ = self.image.shape
        labels = {"layer": range(n_layers), "example": range(n), "head": range(n_heads), "dest": self.names}
        return self.with_ids(long_frame(values, **labels, group=names).rename(columns={"value": "share"}))

    @plots(lambda self, **_: head_map_size(len(self.share), self.share.shape[2]))
    def plot(self, canvas: Canvas, by: str = "image") -> None:
        """A map of all heads' mean share of a group, over destinations and examples."""
        values = self.group(by)
        n_layers, n, _, n_dest = values.shape
        head_map(canvas.ax, values.mean((1, 3)), range(n_layers), f"share of the {by}", vmin=0)
        where = text(self.names[0], 24) if n_dest == 1 else f"{n_dest} destinations, means"
        several = f"{n_examples(values.mean((2, 3)))}, means" if n > 1 else ALONE
        canvas.head(f"Attention to the {by}, {short_name(self.model)}", f"{OF[self.of]} of {where}; {several}")
