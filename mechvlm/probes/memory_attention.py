"""Norm-based attention from text to the image's memory, in models whose image is one.

Flamingo's design (Alayrac et al. 2022; Mllama, Idefics) keeps the image beside the sequence. Gated
cross-attention layers read it, and head h of such a layer writes

    tanh(gate) α_h[dest, m] f_h(x_m),    f_h(x_m) = v_hm W_O^h

of the memory's vector m to a position. The norms are taken as in `mechvlm.probes.norm_attention`.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.headings import ALONE, short_name
from mechvlm.figures.scale import clipped
from mechvlm.figures.style import color_bar, heatmap, number_ticks, text
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.selections import part_of_selection
from mechvlm.probes.norm_attention import NormAttention, NormPlan, moved_destinations
from mechvlm.probes.probe import Attended, Model, Row
from mechvlm.results import Result, long_frame, stack


@dataclass(frozen=True)
class MemoryAttention:
    """Probe: what each vector of the image's memory wrote to chosen positions, layer by layer.

    >>> (memory,) = mv.read(vlm, inputs, mv.MemoryAttention(dst="last"))
    >>> memory.norm[:, 0, 0]  # what each vector wrote to the last position, [layer memory]

    Args:
        dst: destinations, as those of `NormAttention`.

    Source: Kobayashi et al. 2020, eq. 5. Differs: the sources are the memory's vectors, and the
    layer's gate multiplies what they write.
    Tested: equals the norm of the explicitly summed vectors, with Hugging Face's own weights.

    Raises:
        ValueError: from `read`, for a model whose image is tokens, and as `NormAttention` does.
    """

    dst: Any = "last_text"

    def part_of(self, numbers: range, n_examples: int) -> "MemoryAttention":
        """The probe for some of the examples."""
        return MemoryAttention(part_of_selection(self.dst, numbers, n_examples, "dst"))

    def prepare(self, vlm: Model, inputs: Inputs) -> NormPlan:
        """Find the destinations of each example, and name them."""
        if not vlm.memory_layers:
            raise ValueError(
                f"{vlm.name} has no memory of the image: its images are tokens of the sequence. Take mv.norm_attention."
            )
        return NormAttention(self.dst).prepare(vlm, inputs)

    def at_memory(self, plan: NormPlan, attended: Attended) -> Row:
        """The destinations' norms [example dest memory] and weights [example head dest memory].

        Also ‖f_h(x_m)‖ of every head and vector, [example head memory].
        """
        row = dict(NormAttention(self.dst).at_attention(plan, attended))
        if attended.divisor is not None:
            closed = attended.divisor.gather(1, plan.dest.to(attended.divisor.device)[..., None]).isinf()
            row["weight"] = row["weight"].masked_fill(closed[:, None], 0)
        return row

    def result(self, plan: NormPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> "MemoryAttentionResult":
        """The rows of all memory layers."""
        parts: dict[str, Any] = {name: stack([row[name] for row in rows]) for name in ("norm", "weight", "value_norm")}
        return MemoryAttentionResult(
            **parts, layers=vlm.memory_layers, dest=plan.dest, names=plan.names, model=vlm.name,
            padded_length=len(inputs.token_maps[0]),
        )  # fmt: skip


@dataclass(frozen=True, repr=False)
class MemoryAttentionResult(Result):
    """What each vector of the image's memory wrote to chosen positions, and the raw weights.

    The axis `layer` runs over the memory layers alone: entry i is layer `layers[i]`. The memory's
    vectors are those of an example's images one after the other, equally many of each. Those that
    the model's mask closes, such as tiles that an image does not fill, have weight and norm 0.

    A position before its image: Idefics closes the memory to it, and all is 0. Mllama opens all of
    the memory to it, unfilled tiles included, and closes the layer's MLP instead.

    Attributes:
        norm: ‖tanh(gate) Σ_h α_h f_h(x_m)‖, the heads' vectors summed first (residual-stream
            units).
        weight: α_h, the raw attention weights (0 to 1, each row sums to 1, or to 0 where closed).
        value_norm: ‖tanh(gate) f_h(x_m)‖ per head, what it would write at weight 1
            (residual-stream units).
        layers: the memory layers, as in `vlm.memory_layers`.
        dest: the destination positions, per example.
        names: what the destinations are called.
        model: the model's name.
        padded_length: length of the padded sequences in which `dest` counts.
    """

    units: ClassVar[str] = "norm of the vector written (residual-stream units)"

    norm: Float[Tensor, "layer example dest memory"]
    weight: Float[Tensor, "layer example head dest memory"]
    value_norm: Float[Tensor, "layer example head memory"]
    layers: tuple[int, ...]
    dest: Int[Tensor, "example dest"]
    names: tuple[str, ...]
    model: str
    padded_length: int

    @property
    def seq_length(self) -> int:
        return self.padded_length

    def padded(self, length: int) -> "MemoryAttentionResult":
        """Padding stands on the left: the destinations move to the right.

        Raises:
            InputError: for destinations by number, which mean other tokens in sequences of other
                lengths.
        """
        if length == self.padded_length:
            return self
        dest, names, rows = moved_destinations(self.dest, self.names, self.padded_length, length)
        norm, weight = (torch.nn.functional.pad(x, (0, 0, rows, 0)) for x in (self.norm, self.weight))
        return replace(self, norm=norm, weight=weight, dest=dest, names=names, padded_length=length)

    @property
    def norm_head(self) -> Float[Tensor, "layer example head dest memory"]:
        """‖tanh(gate) α_h f_h(x_m)‖ per head, computed on demand, in residual-stream units."""
        return self.weight * self.value_norm[:, :, :, None]

    def to_frame(self) -> pd.DataFrame:
        """One row per measure, layer, example, destination and vector of the memory.

        The measures are "norm", and "weight", its mean over heads.
        """
        _, n_examples, _, n_memory = self.norm.shape
        labels = {"layer": self.layers, "example": range(n_examples), "dest": self.names, "memory": range(n_memory)}
        measures = {"norm": self.norm, "weight": self.weight.mean(2)}
        frames = [long_frame(values, **labels).assign(measure=measure) for measure, values in measures.items()]
        return self.with_ids(pd.concat(frames, ignore_index=True))

    @plots(lambda self, **_: (8, 1.6 + 0.22 * len(self.layers)))
    def plot(self, canvas: Canvas) -> None:
        """The first destination's vectors by memory layer, mean over examples."""
        ax, (_, n, _, n_memory) = canvas.ax, self.norm.shape
        values = self.norm[:, :, 0].mean(1).numpy()
        scale = clipped(values)
        mesh = heatmap(ax, values, list(self.layers), vmin=0, vmax=scale.most, cmap=scale.colors)
        number_ticks(ax.xaxis, range(n_memory))
        ax.set_xlabel("vector of the image's memory")
        several = ALONE if n == 1 else f"mean of {n} examples"
        canvas.head(
            f"Attention of {text(self.names[0], 24)} to the image's memory, {short_name(self.model)}",
            "\n".join(filter(None, (several, scale.sentence(self.layers, "vector {}".format)))),
        )
        color_bar(ax, mesh, "norm written (residual-stream units)", scale.extend)
