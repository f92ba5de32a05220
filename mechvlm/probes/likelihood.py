"""How likely the model finds a text that stands at the end of its input (teacher forcing).

The state at a position predicts the next token. So the text's log-probabilities are read off the
last state, at the position before each of its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import NO_ANSWER
from mechvlm.probes.probe import Model, Row, State
from mechvlm.results import Result, to_cpu


class LikelihoodPlan(NamedTuple):
    """The number of the last state, and the last tokens of each example.

    They are as many as the longest text has.
    """

    n_layers: int
    ids: Int[Tensor, "batch token"]


@dataclass(frozen=True)
class Likelihood:
    """Probe: log-probabilities of each example's last tokens, each given all before it.

    Logits are formed at these positions alone, in float32 whatever dtype the model runs in.
    Tested: in bfloat16 equal to the float32 readout of the model's own last states.

    >>> (likelihood,) = mv.read(vlm, inputs.answered("a red circle"), mv.Likelihood())
    >>> likelihood.total  # log p(text | image, prompt), [example], in nats

    Args:
        n_tokens: how many tokens are measured, per example; None for the answer that was written.

    Raises:
        ValueError: from `read`, for inputs without an answer, other numbers of `n_tokens` than
            examples, or more tokens than an example has.
    """

    n_tokens: Sequence[int] | None = None

    def part_of(self, numbers: range, n_examples: int) -> "Likelihood":
        """The probe for some of the examples."""
        if self.n_tokens is None:
            return self
        if len(self.n_tokens) != n_examples:
            raise ValueError(f"n_tokens holds {len(self.n_tokens)} numbers for {n_examples} examples.")
        return Likelihood(list(self.n_tokens)[numbers.start : numbers.stop])

    def prepare(self, vlm: Model, inputs: Inputs) -> LikelihoodPlan:
        """Find the measured tokens."""
        n_tokens = self._measured(inputs)
        if len(n_tokens) != len(inputs):
            raise ValueError(f"n_tokens holds {len(n_tokens)} numbers for {len(inputs)} examples.")
        ids = inputs.encoding["input_ids"]
        for number, (n, tokens) in enumerate(zip(n_tokens, inputs.token_maps, strict=True)):
            if not 0 < n < len(tokens.all):
                raise ValueError(
                    f"{n} tokens were asked for of example {number}, which has {len(tokens.all)}: choose 1 to "
                    f"{len(tokens.all) - 1}, since nothing predicts the first."
                )
        # Padding is on the left: the last positions of all examples are tokens.
        longest = max(n_tokens)
        return LikelihoodPlan(vlm.n_layers, ids[:, -longest:])

    def _measured(self, inputs: Inputs) -> list[int]:
        if self.n_tokens is not None:
            return list(self.n_tokens)
        n_tokens = [tokens.n_answer for tokens in inputs.token_maps]
        if not all(n_tokens):
            raise ValueError(NO_ANSWER)
        return n_tokens

    def at_state(self, plan: LikelihoodPlan, state: State) -> Row | None:
        """At the last state, the log-probability of each token [example token]."""
        if state.number < plan.n_layers:
            return None
        # The state at a position predicts the next token.
        before = state.resid[:, -plan.ids.shape[1] - 1 : -1]
        # In bfloat16 each logit is rounded to 1/128 of its size, and a caption adds up dozens.
        logits = state.unembed.in_float32(state.final_norm.in_float32(before))
        chosen = logits.gather(-1, plan.ids.to(logits.device)[..., None]).squeeze(-1)
        return {"logprob": chosen - logits.logsumexp(-1)}

    def result(self, plan: LikelihoodPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> "LikelihoodResult":
        """The log-probabilities, NaN before each example's first measured token."""
        logprob = to_cpu(rows[0]["logprob"])
        longest = logprob.shape[1]
        measured = torch.arange(longest) >= longest - torch.tensor(self._measured(inputs))[:, None]
        return LikelihoodResult(logprob.where(measured, torch.nan), vlm.name)


@dataclass(frozen=True, repr=False)
class LikelihoodResult(Result):
    """Log-probabilities of the tokens at the end of each example, each given all before it.

    Attributes:
        logprob: in nats, aligned at their ends; NaN before an example's first measured token.
        model: the model's name.
    """

    units: ClassVar[str] = "log-probability (nats)"

    logprob: Float[Tensor, "example token"]
    model: str

    @property
    def seq_length(self) -> int:
        return self.logprob.shape[1]

    def padded(self, length: int) -> "LikelihoodResult":
        shift = length - self.logprob.shape[1]
        return replace(self, logprob=torch.nn.functional.pad(self.logprob, (shift, 0), value=torch.nan))

    @property
    def total(self) -> Float[Tensor, " example"]:
        """The sum over an example's tokens: the log-likelihood of its text, in nats."""
        return self.logprob.nansum(-1)
