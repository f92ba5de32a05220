"""Direct logit attribution: what each head and each MLP wrote toward an answer.

The last state is a sum of writes: the embedding, and every layer's heads, bias and MLP. Once the
scale of the final norm is known, the logit is linear in that state, so each write has its own share
(Elhage et al. 2021).

1. `direction`: the final norm's gain times the unembedding of the answer (less that of the other).
2. At every layer, each write is multiplied with that direction (`head_writes` for the heads).
3. The last state gives the norm's scale, by which all of them are divided in the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from torch import Tensor

from mechvlm.decoder.attention import Attention, attention_rows
from mechvlm.decoder.norms import Norm
from mechvlm.decoder.unembedding import Unembedding
from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.headings import ALONE, answer_label, short_name
from mechvlm.figures.legends import legend_above
from mechvlm.figures.panels import beneath
from mechvlm.figures.settings import marker_size, pen
from mechvlm.figures.style import LAYER, SIGNED, Line, color_bar, hue, number_ticks
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import Answers, answers_of
from mechvlm.inputs.tokens import image_mask
from mechvlm.intervals import Interval, mean_interval
from mechvlm.measures.heads import rank_heads
from mechvlm.probes.probe import Model, Row, State, Written
from mechvlm.results import Result, long_frame, stack, to_cpu

PARTS = {
    "embed": Line("embedding", "#444444", "", "D"),
    "image": Line("attention to the image", "#0072B2", "-", "o"),
    "rest": Line("attention to the rest", "#E69F00", "--", "s"),
    "mlp": Line("MLP", "#009E73", "-.", "^"),
}


def head_writes(
    z: Float[Tensor, "batch head d_head"],
    w_o: Float[Tensor, "d_model head_d_head"],
    direction: Float[Tensor, "batch d_model"],
) -> Float[Tensor, "batch head"]:
    """z_h W_O^h · direction: each head's output along a direction of the residual stream. Float32.

    The direction goes through W_O first, so that no head's vector [d_model] is ever formed.

    Tested: equals their products.
    """
    read = rearrange(direction @ w_o.float(), "batch (head d_head) -> batch head d_head", head=z.shape[1])
    return (z.float() * read).sum(-1)


def z_from(
    parts: Attention, dest: Int[Tensor, " batch"], src: Bool[Tensor, "batch src"]
) -> Float[Tensor, "batch head d_head"]:
    """The part of z at `dest` that comes from `src`: Σ α_h[dest, src] v_h[src]. Float32."""
    alpha = attention_rows(parts, dest[:, None])[:, :, 0]
    v = parts.v.float().repeat_interleave(alpha.shape[1] // parts.v.shape[1], dim=1)
    return torch.einsum("bhs,bhse->bhe", alpha * src.to(alpha)[:, None], v)


class AttributionPlan(NamedTuple):
    """The measured tokens, the position where they are measured, and the positions of the image.

    toward: token ids of the answers, [example].
    away: token ids of the answers that are subtracted, [example], or None.
    answers, versus: their texts.
    last: each example's last position, [example].
    image: which positions hold the image, [example pos].
    n_layers: the number of the last state.
    """

    toward: Tensor
    away: Tensor | None
    answers: tuple[str, ...]
    versus: tuple[str, ...]
    last: Tensor
    image: Tensor
    n_layers: int

    def difference(self, of: Callable[[Tensor], Tensor]) -> Float[Tensor, "example *rest"]:
        """of(answers' ids) less of(subtracted ids), or the former alone. Float32."""
        return of(self.toward).float() if self.away is None else of(self.toward).float() - of(self.away).float()

    def direction(self, final_norm: Norm, unembed: Unembedding) -> Float[Tensor, "example d_model"]:
        """g * (W_U[a] - W_U[b]): what a write is multiplied with, apart from the norm's scale.

        A norm that subtracts a state's mean from it is the same as a direction without its mean.
        """
        w_u = unembed.weight
        direction = self.difference(lambda ids: w_u[ids.to(w_u.device)]) * final_norm.gain.to(w_u.device).float()
        return final_norm.centred(direction) * unembed.scale

    def at_last(self, x: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch *rest"]:
        """x at each example's last position."""
        return x[torch.arange(len(x), device=x.device), self.last.to(x.device)]


@dataclass(frozen=True)
class LogitAttribution:
    """Probe: what each layer, head and MLP wrote toward an answer's logit, at the last position.

    The final norm divides the last state x = Σ writes by its root mean square r, a number once x is
    known, and multiplies by its weight g. So every write w is worth (w / r * g) · (W_U[a] - W_U[b])
    logits, and these sum to logit(a) - logit(b).

    >>> (parts,) = mv.read(vlm, inputs, mv.LogitAttribution("red", versus="blue"))
    >>> parts.heads  # [layer example head], in logits

    Args:
        answers: a word or a token id for all examples, or one per example; of several tokens the
            first one counts. None: the token that the model itself would write first (costs a
            forward of its own).
        versus: the same, for the answer whose logit is subtracted; None subtracts nothing.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Differs: the
    norm is an RMSNorm, and its weight is kept apart from W_U.
    Tested: the sum equals Hugging Face's logits.

    Raises:
        InputError: from `read`, for another number of answers than examples, or an answer that is
            no token.
        ValueError: from `read`, when an answer is its own `versus`.
    """

    answers: Answers = None
    versus: Answers = None

    def part_of(self, numbers: range, n_examples: int) -> "LogitAttribution":
        """The probe for some of the examples."""
        return LogitAttribution(*(answers_of(answers, numbers, n_examples) for answers in (self.answers, self.versus)))

    def prepare(self, vlm: Model, inputs: Inputs) -> AttributionPlan:
        """Find the answers' tokens, each example's last position and its image."""
        toward = vlm.answer_tokens(inputs, self.answers)
        away = None if self.versus is None else vlm.answer_tokens(inputs, self.versus)
        answers, versus = vlm.to_str_tokens(toward), () if away is None else vlm.to_str_tokens(away)
        if same := [] if away is None else [(int(i), answers[i]) for i in (toward == away).nonzero()[:, 0]]:
            raise ValueError(
                f"`answers` and `versus` begin with the same token in these examples, {same}: there is no difference to "
                "attribute. Give answers whose first tokens differ."
            )
        if vlm.memory_layers:  # no position holds the image
            image = torch.zeros(len(inputs), len(inputs.token_maps[0]), dtype=torch.bool)
        else:
            image = image_mask(inputs.token_maps)
        last = torch.tensor([tokens.last for tokens in inputs.token_maps])
        return AttributionPlan(toward, away, answers, versus, last, image, vlm.n_layers)

    def at_state(self, plan: AttributionPlan, state: State) -> Row | None:
        """At state 0 the embedding's part; at the last state the logits and the norm's scale."""
        if state.number not in (0, plan.n_layers):
            return None
        resid = plan.at_last(state.resid)
        if state.number == 0:
            return {"embed": (resid.float() * plan.direction(state.final_norm, state.unembed).to(resid.device)).sum(-1)}
        logits = state.unembed.uncapped(state.final_norm(resid))
        w_u, bias = state.unembed.weight, state.unembed.bias
        bias = torch.zeros_like(logits[0]) if bias is None else bias
        if state.final_norm.bias.any():
            bias = bias + w_u @ state.final_norm.bias.to(w_u)
        bias = bias * state.unembed.scale
        return {
            "scale": state.final_norm.rms(resid)[:, 0],
            "logit": plan.difference(lambda ids: logits.gather(1, ids[:, None].to(logits.device))[:, 0]),
            "bias": plan.difference(lambda ids: bias[ids.to(bias.device)]),
        }

    def at_writes(self, plan: AttributionPlan, written: Written) -> Row:
        """The parts of the layer's heads, their bias and its MLP, not yet divided by the scale."""
        z, w_o, mlp_out = plan.at_last(written.z), written.w_o, plan.at_last(written.mlp_out)
        direction = plan.direction(written.final_norm, written.unembed).to(z.device)
        # A memory layer attends to the image alone.
        on_image = torch.ones_like(plan.image[:, :1]) if written.memory else plan.image
        z_image = z_from(written.parts, plan.last.to(z.device), on_image.to(z.device))
        # [batch 1]: a norm after the attention divides what all heads write together
        divisor = 1.0 if written.divisor is None else plan.at_last(written.divisor)
        bias = torch.zeros_like(direction[:, :1]) if written.b_o is None else direction @ written.b_o.float()[:, None]
        return {
            "heads": head_writes(z, w_o, direction) / divisor,
            "from_image": head_writes(z_image, w_o, direction) / divisor,
            "attn_bias": (bias / divisor)[:, 0],
            "mlps": (mlp_out.float() * direction.to(mlp_out.device)).sum(-1),
        }

    def result(self, plan: AttributionPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> "LogitAttributionResult":
        """All parts, each divided by the norm's scale."""
        first, *layers, end = rows
        scale = to_cpu(end["scale"])  # known at the end only
        return LogitAttributionResult(
            embed=to_cpu(first["embed"]) / scale,
            heads=stack([row["heads"] for row in layers]) / scale[:, None],
            from_image=stack([row["from_image"] for row in layers]) / scale[:, None],
            attn_bias=stack([row["attn_bias"] for row in layers]) / scale,
            mlps=stack([row["mlps"] for row in layers]) / scale,
            bias=to_cpu(end["bias"]),
            logit=to_cpu(end["logit"]),
            answers=plan.answers,
            versus=plan.versus,
            model=vlm.name,
        )


@dataclass(frozen=True, repr=False)
class LogitAttributionResult(Result):
    """What was written toward an answer's logit, or a difference of two, at the last position.

    Everything is in logits. The parts `embed`, `heads`, `attn_bias`, `mlps` and `bias` sum to the
    model's logit. Entry l of an axis `layer` is layer l, which turns state l into state l + 1.

    Attributes:
        embed: the part of what entered the decoder at the last position.
        heads: the parts of the heads' outputs, z_h W_O^h.
        from_image: the share of `heads` that came from the image: from its positions, or from its
            memory in the layers that read one. `from_rest` is the other share.
        attn_bias: the part of W_O's bias, which belongs to no head (0 where there is none).
        mlps: the parts of the MLPs' outputs.
        bias: the part of the unembedding's bias (0 where there is none).
        logit: the model's own logit (difference), in its own dtype's precision.
        answers, versus: the texts of the measured tokens; `versus` is empty where
            nothing was subtracted.
        model: the model's name.
    """

    units: ClassVar[str] = "logit"
    texts: ClassVar[tuple[str, ...]] = ("answers", "versus")
    per_example: ClassVar[tuple[str, ...]] = ("answers", "versus")

    embed: Float[Tensor, " example"]
    heads: Float[Tensor, "layer example head"]
    from_image: Float[Tensor, "layer example head"]
    attn_bias: Float[Tensor, "layer example"]
    mlps: Float[Tensor, "layer example"]
    bias: Float[Tensor, " example"]
    logit: Float[Tensor, " example"]
    answers: tuple[str, ...]
    versus: tuple[str, ...]
    model: str

    @property
    def layer_totals(self) -> Float[Tensor, "layer example"]:
        """The sum of all that each layer wrote: heads, attention bias and MLP."""
        return self.heads.sum(-1) + self.attn_bias + self.mlps

    @property
    def from_rest(self) -> Float[Tensor, "layer example head"]:
        """The share of `heads` that came from all other positions, the last one among them."""
        return self.heads - self.from_image

    @property
    def total(self) -> Float[Tensor, " example"]:
        """The sum of all parts. It equals `logit` up to the rounding of the model's dtype."""
        return self.embed + self.layer_totals.sum(0) + self.bias

    def interval(self, part: str) -> Interval:
        """The mean of one part over examples with its 95 % bootstrap interval.

        [layer head], [layer] or a single number.

        Raises:
            ValueError: for a name that is no part; the message lists the parts.
        """
        by_layer = ("heads", "from_image", "from_rest", "attn_bias", "mlps", "layer_totals")
        if part not in (*by_layer, "embed", "bias", "logit", "total"):
            known = ", ".join((*by_layer, "embed", "bias", "logit", "total"))
            raise ValueError(f"There is no part {part!r}. Parts: {known}.")
        values = getattr(self, part)
        return mean_interval(values.transpose(0, 1) if part in by_layer else values)

    def top_heads(self, top: int = 10, part: str = "from_image") -> pd.DataFrame:
        """The heads that wrote most toward the answer, by default out of the image's positions.

        Heads of one contribution follow each other by layer, then by head.

        Args:
            top: how many.
            part: "from_image", "from_rest" or "heads", the sum of both.

        Returns:
            One row a head: layer, head, logits (the mean over examples), and low and high, its 95 %
            bootstrap interval (the draws have seed 0).

        Raises:
            ValueError: for less than one head, or another part.
        """
        if part not in ("from_image", "from_rest", "heads"):
            raise ValueError(f"There is no part {part!r} of heads: they have 'from_image', 'from_rest' and 'heads'.")
        return rank_heads(getattr(self, part).transpose(0, 1), top, "logits")

    def to_frame(self) -> pd.DataFrame:
        """One row per part, layer, head and example.

        Columns: part ("embed", "head", "attn_bias", "mlp", "bias"), layer (from 0; -1 for embed,
        n_layers for the unembedding's bias), head (-1 for parts without heads), example, value, and
        from_image (NaN for parts without heads).
        """
        n_layers, n_examples, n_heads = self.heads.shape
        examples, layers = range(n_examples), range(n_layers)
        labels = {"layer": layers, "example": examples, "head": range(n_heads)}
        heads = long_frame(self.heads, **labels).assign(
            part="head", from_image=long_frame(self.from_image, **labels)["value"]
        )
        rest = {
            "embed": long_frame(self.embed[None], layer=[-1], example=examples),
            "attn_bias": long_frame(self.attn_bias, layer=layers, example=examples),
            "mlp": long_frame(self.mlps, layer=layers, example=examples),
            "bias": long_frame(self.bias[None], layer=[n_layers], example=examples),
        }
        frames = [heads, *(frame.assign(part=part, head=-1) for part, frame in rest.items())]
        columns = ["part", "layer", "head", "example", "value", "from_image"]
        return self.with_ids(pd.concat(frames, ignore_index=True)[columns])

    @plots(lambda self, **_: (6.6, 3.2 + self._height_of_heads), stacked=True)
    def plot(self, canvas: Canvas) -> None:
        """The parts of each layer, and below them each head; means over examples with intervals.

        The intervals are the 95 % bootstrap ones. W_O's bias, where there is one, is drawn with the
        attention to the rest.
        """
        below = beneath(canvas.ax, self._height_of_heads / 3)
        self._draw_parts(canvas.ax)
        self._draw_heads(below)
        n = len(self.logit)
        canvas.head(
            f"Logit attribution: {answer_label(self.answers, self.versus)}, {short_name(self.model)}",
            f"mean of {n} examples with 95 % intervals; a dot where it leaves out 0" if n > 1 else ALONE,
        )

    @property
    def _height_of_heads(self) -> float:
        """Of the map of heads, in inches."""
        return min(0.9 + 0.14 * self.heads.shape[2], 3.5)

    def _draw_parts(self, ax: Axes) -> None:
        """The embedding, and each layer's attention to the image, to the rest, and MLP."""
        n_layers, n_examples, _ = self.heads.shape
        values = {
            "embed": self.embed[:, None],
            "image": self.from_image.sum(-1).T,
            "rest": (self.from_rest.sum(-1) + self.attn_bias).T,
            "mlp": self.mlps.T,
        }
        ax.axhline(0, color=pen("#888888"), linewidth=0.8)
        for number, (part, by_example) in enumerate(values.items()):
            mean, low, high = (x.numpy() for x in mean_interval(by_example))
            layers = -np.ones(1) if part == "embed" else np.arange(n_layers) + (number - 2) * 0.12
            line = PARTS[part]
            ax.errorbar(
                layers, mean, yerr=None if n_examples < 2 else np.clip([mean - low, high - mean], 0, None), color=hue(line.color),
                linestyle=line.dash, marker=line.marker, label=line.label, linewidth=1.3, elinewidth=1, capsize=2,
                markersize=marker_size(),
            )  # fmt: skip
        ax.tick_params(labelbottom=False)
        # The embedding stands before the first layer.
        ax.set_xlim(-1.25, n_layers - 0.5)
        ax.set_ylabel("written toward it (logits)")
        legend_above(ax)

    def _draw_heads(self, ax: Axes) -> None:
        """A map [head layer] of the heads' means, with a dot where the interval leaves out 0."""
        n_layers, _, n_heads = self.heads.shape
        heads = self.interval("heads")
        mesh = ax.pcolormesh(
            np.arange(n_layers + 1) - 0.5, np.arange(n_heads + 1) - 0.5, heads.mean.T.numpy(), cmap=SIGNED,
            norm=CenteredNorm(), rasterized=True,
        )  # fmt: skip
        sure = ((heads.low > 0) | (heads.high < 0)).nonzero().numpy()
        size = 9 if n_layers * n_heads < 400 else 2
        ax.scatter(sure[:, 0], sure[:, 1], s=size, color="#222222", edgecolors="white", linewidths=0.4)
        number_ticks(ax.xaxis, range(n_layers))
        number_ticks(ax.yaxis, range(n_heads))
        ax.set_xlabel(LAYER)
        ax.set_ylabel("head")
        ax.grid(False)
        color_bar(ax, mesh, "logits")
