"""How each head divides its attention: among image, text, control tokens and the position itself.

Two rulers. The weights α themselves; and what was written with them, ‖α_h f_h(x_src)‖, in which a
source with a large weight and a small value counts little (Kobayashi et al. 2020).

The rows are summed inside the forward. So what is kept of an example is a few numbers a head,
whatever the length of its image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechvlm.decoder.attention import attention_rows
from mechvlm.errors import InputError
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import image_mask
from mechvlm.probes.norm_attention import NormAttention, NormPlan
from mechvlm.probes.probe import Attended, Model, Row
from mechvlm.probes.shares import OF, AttentionShareResult, group_shares, value_norms
from mechvlm.results import stack


class SharePlan(NamedTuple):
    """The destinations; what each position holds, [example pos]; and which lie in the box."""

    norms: NormPlan
    modality: Int[Tensor, "example pos"]
    in_box: Bool[Tensor, "example pos"] | None


@dataclass(frozen=True)
class AttentionShare:
    """Probe: the share of each head's attention that goes to image, text, control tokens and self.

    >>> (shares,) = mv.read(vlm, answers.inputs, mv.AttentionShare(dst="writing"))
    >>> shares.image    # [layer example head dest], 0 to 1
    >>> shares.heads(top=10)    # the heads that look most at the image

    Args:
        dst: destinations, as `mv.NormAttention` takes them.
        of: "weight", shares of the attention weights; or "norm", of ‖α_h f_h(x_src)‖.
        boxes: (left, top, right, bottom) on each example's image, in pixels of the original: the
            share of the patches that lie in it is measured too (`TokenMap.pos_in_box`).

    The image's share of the weights is the simplest ranking of heads that look at the image; it is
    the "image mass" beside which Kang et al. 2025 (arXiv 2503.03321 and 2503.06287) and Gandikota
    and Bau 2026 (arXiv 2606.14703) set theirs.
    Tested: equals sums of Hugging Face's eager attention, and of NormAttention's norms.

    Raises:
        InputError: from `read`, for another number of boxes than examples, a box that holds no
            patch, or a model whose image is a memory that stands at no position.
        ValueError: from `read`, for an unknown `of`, and as `mv.NormAttention`.
    """

    dst: Any = "last"
    of: str = "weight"
    boxes: Sequence[Any] | None = None

    def part_of(self, numbers: range, n_examples: int) -> "AttentionShare":
        """The probe for some of the examples."""
        if self.boxes is not None:
            _check_boxes(self.boxes, n_examples)
        boxes = None if self.boxes is None else list(self.boxes)[numbers.start : numbers.stop]
        return AttentionShare(NormAttention(self.dst).part_of(numbers, n_examples).dst, self.of, boxes)

    def prepare(self, vlm: Model, inputs: Inputs) -> SharePlan:
        """Find the destinations, what each position holds, and the boxes' patches."""
        if self.of not in OF:
            raise ValueError(f"of={self.of!r} was asked for: shares are of {' or '.join(map(repr, OF))}.")
        image_mask(inputs.token_maps)  # refuses an image that stands at no position
        modality = torch.stack([tokens.modality for tokens in inputs.token_maps])
        in_box = None
        if self.boxes is not None:
            _check_boxes(self.boxes, len(inputs))
            in_box = torch.zeros_like(modality, dtype=torch.bool)
            for row, (tokens, box) in enumerate(zip(inputs.token_maps, self.boxes, strict=True)):
                positions = tokens.pos_in_box(box)
                if not len(positions):
                    raise InputError(f"The box {tuple(box)} of example {row} holds no patch: none lies in it by half.")
                in_box[row, positions] = True
        return SharePlan(NormAttention(self.dst).prepare(vlm, inputs), modality, in_box)

    def at_attention(self, plan: SharePlan, attended: Attended) -> Row:
        """The destinations' shares [example head dest group], and the box's [example head dest]."""
        dest, padding = plan.norms.dest, plan.norms.padding
        rows = attention_rows(attended.parts, dest)
        if padding is not None:  # a destination on padding attends to arbitrary sources
            rows.masked_fill_(padding.gather(1, dest).to(rows.device)[:, None, :, None], 0)
        if self.of == "norm":
            rows = rows * value_norms(attended.parts.v, attended.w_o)[:, :, None]
            rows = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        shares = {"share": group_shares(rows, plan.modality, dest)}
        if plan.in_box is not None:
            shares["box"] = torch.einsum("bhds,bs->bhd", rows, plan.in_box.to(rows.device, rows.dtype))
        return shares

    def result(self, plan: SharePlan, rows: list[Row], vlm: Model, inputs: Inputs) -> "AttentionShareResult":
        """The shares of all layers."""
        return AttentionShareResult(
            share=stack([row["share"] for row in rows]),
            box=None if plan.in_box is None else stack([row["box"] for row in rows]),
            of=self.of,
            names=plan.norms.names,
            model=vlm.name,
        )


def _check_boxes(boxes: Sequence[Any], n_examples: int) -> None:
    if len(boxes) != n_examples:
        raise InputError(f"{len(boxes)} boxes were given for {n_examples} examples: give one each.")
