"""An answer as it was written: what each of its tokens was read from, and when it was decided.

A token is written at the position before it. There, layer by layer, attention reads the image, and
state by state the lens gives the token that comes next a probability. `AnswerReading` measures both
in the forward of prompt and answer, and keeps one number a layer and token.

`OnPrompt` runs any other probe on the prompt alone in the same forward. An answer is written
causally and changes no state before it, so these are the numbers of a forward of the prompt.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import NO_ANSWER, Modality, TokenMap
from mechvlm.probes.likeliest import chances
from mechvlm.probes.norm_attention import NormAttention, NormPlan, plan_of
from mechvlm.probes.probe import READS, Attended, Model, Row, State
from mechvlm.results import Result, stack


def prompts_of(inputs: Inputs) -> Inputs:
    """The same batch with maps of the prompts alone: the answers' positions count as padding.

    Positions stay those of the sequences with their answers.
    """
    return replace(inputs, token_maps=tuple(map(_prompt_of, inputs.token_maps)))


def _prompt_of(tokens: TokenMap) -> TokenMap:
    modality = tokens.modality.clone()
    modality[tokens.answer] = Modality.PADDING
    return replace(tokens, modality=modality, n_answer=0)


class OnPrompt:
    """Probe: another probe on the prompts alone, in a forward of prompts and answers.

    >>> mv.read(vlm, answers.inputs, OnPrompt(mv.Contextualization()), AnswerReading())

    Args:
        probe: whose settings hold nothing for single examples.
    """

    def __init__(self, probe: Any):
        self.probe = probe

    def prepare(self, vlm: Model, inputs: Inputs) -> Any:
        """The plan for the prompts."""
        return self.probe.prepare(vlm, prompts_of(inputs))

    def result(self, plan: Any, rows: list[Row], vlm: Model, inputs: Inputs) -> Any:
        """The probe's own result."""
        return self.probe.result(plan, rows, vlm, prompts_of(inputs))

    def __getattr__(self, name: str) -> Any:
        # Only what the probe reads itself: `read` asks for no more than these of its methods.
        if name not in READS:
            raise AttributeError(f"{type(self).__name__} has no {name}.")
        return getattr(self.probe, name)


class AnswerPlan(NamedTuple):
    """The positions that wrote each token, as rows of attention and as points of the lens.

    norms: the rows by example, padded with its last position.
    example, position, ids: of each token that was written.
    image: which positions hold visual tokens.
    """

    norms: NormPlan
    example: Int[Tensor, " point"]
    position: Int[Tensor, " point"]
    ids: Int[Tensor, " point"]
    image: Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class AnswerReading:
    """Probe: the image's share of what wrote each token of an answer, and its probability by state.

    >>> (reading,) = mv.read(vlm, vlm.generate(inputs).inputs, AnswerReading())
    >>> reading.norm_share[:, 0]  # of the first example, [layer token]

    Raises:
        ValueError: from `read`, where no example has an answer.
    """

    def prepare(self, vlm: Model, inputs: Inputs) -> AnswerPlan:
        """Find the positions that wrote the answers."""
        maps = inputs.token_maps
        longest = max(tokens.n_answer for tokens in maps)
        if not longest:
            raise ValueError(NO_ANSWER)
        dest = torch.tensor([[*tokens.writing.tolist(), *[tokens.last] * longest][:longest] for tokens in maps])
        example = torch.cat([torch.full_like(tokens.writing, row) for row, tokens in enumerate(maps)])
        position, ids = (
            torch.cat(parts)
            for parts in zip(*((tokens.writing, tokens.ids[tokens.answer]) for tokens in maps), strict=True)
        )
        image = torch.stack([tokens.modality == Modality.IMAGE for tokens in maps])
        return AnswerPlan(plan_of(dest), example, position, ids, image)

    def at_attention(self, plan: AnswerPlan, attended: Attended) -> Row:
        """The image's share of norms and of weights (mean over heads), [example token] each."""
        row = NormAttention().at_attention(plan.norms, attended)
        image = plan.image.to(row["norm"].device)[:, None]
        parts = {"norm": row["norm"], "weight": row["weight"].mean(1)}
        return {name: (values * image).sum(-1) / values.sum(-1) for name, values in parts.items()}

    def at_state(self, plan: AnswerPlan, state: State) -> Row:
        """Probability and rank of each token that was then written, [point]."""
        device = state.resid.device
        points = state.resid[plan.example.to(device), plan.position.to(device)]
        probability, rank = chances(state.final_norm(points), state.unembed, plan.ids)
        return {"probability": probability, "rank": rank}

    def result(self, plan: AnswerPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> "AnswerReadingResult":
        """All layers and states, NaN after each answer's end."""
        n_answer = torch.tensor([tokens.n_answer for tokens in inputs.token_maps])
        longest = plan.norms.dest.shape[1]
        written = torch.arange(longest) < n_answer[:, None]
        shares = {
            name: stack([row[name] for row in rows if name in row]).where(written, torch.nan)
            for name in ("norm", "weight")
        }
        lens = {}
        for name in ("probability", "rank"):
            points = stack([row[name] for row in rows if name in row]).float()
            lens[name] = points.new_full((len(points), len(n_answer), longest), torch.nan)
            lens[name][:, written] = points
        return AnswerReadingResult(shares["norm"], shares["weight"], lens["probability"], lens["rank"], vlm.name)


@dataclass(frozen=True, repr=False)
class AnswerReadingResult(Result):
    """What each token of an answer was read from, and when it was decided; NaN after its end.

    Tokens count from the answer's first.

    Attributes:
        norm_share: the image tokens' share (0 to 1) of the sum over all sources of ‖Σ_h α_h f_h‖ at
            the position that wrote the token (`NormAttention`).
        weight_share: the same share of the raw weights, mean over heads.
        probability: of the token that was then written, by the lens at that position (0 to 1).
        rank: of that token there, 1 for the likeliest.
        model: the model's name.
    """

    units: ClassVar[str] = "share; probability"

    norm_share: Float[Tensor, "layer example token"]
    weight_share: Float[Tensor, "layer example token"]
    probability: Float[Tensor, "state example token"]
    rank: Float[Tensor, "state example token"]
    model: str

    @property
    def seq_length(self) -> int:
        return self.norm_share.shape[-1]

    def padded(self, length: int) -> "AnswerReadingResult":
        """Answers begin together: shorter ones are filled up behind their end."""
        names, pad = ("norm_share", "weight_share", "probability", "rank"), (0, length - self.seq_length)
        longer: dict[str, Any] = {
            name: torch.nn.functional.pad(getattr(self, name), pad, value=torch.nan) for name in names
        }
        return replace(self, **longer)
