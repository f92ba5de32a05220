"""`Answer`: what a model wrote, as a text that knows its tokens and the inputs that read it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.inputs.batch import Inputs


class Answer(str):
    """A written answer: the text itself, a `str`, and its tokens.

    >>> answer = vlm.generate(inputs)[0]
    >>> print(answer)
    a red circle
    >>> answer.strings, answer.logprobs.exp()
    >>> mv.norm_attention(vlm, answer.inputs, dst="wrote:red")

    Attributes:
        strings: each token's text, with the space that it begins with. The token that ended the
            answer is left out, since the model read nothing after it.
        ids: their ids, [token].
        logprobs: log-probability of each when it was written, [token], in nats: the model's own,
            before a temperature or any other option of sampling.
        ended: True where the model ended the answer itself, False where max_new_tokens did.
        inputs: the prompt and the answer, as the model read them while it wrote: one example.
    """

    strings: tuple[str, ...]
    ids: Int[Tensor, " token"]
    logprobs: Float[Tensor, " token"]
    ended: bool
    _prompts: Inputs
    _row: int

    @classmethod
    def written(
        cls, text: str, strings: tuple[str, ...], ids: Tensor, logprobs: Tensor, ended: bool, prompts: Inputs, row: int
    ) -> "Answer":
        """The answer to example `row` of a batch."""
        answer = cls(text)
        answer.strings, answer.ids, answer.logprobs, answer.ended = strings, ids, logprobs, ended
        # Cut out when it is asked for: a copy of every example's pixels would double the batch.
        answer._prompts, answer._row = prompts, row
        return answer

    @cached_property
    def inputs(self) -> Inputs:
        return self._prompts[self._row]._written([self.ids.tolist()])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prompts": self._prompts[self._row], "_row": 0}


class AnswerList(list[Answer]):
    """The answers of a batch, or of several: a list that prints as its texts.

    >>> answers = vlm.generate(inputs)
    >>> print(answers)
    >>> mv.norm_attention(vlm, answers.inputs, dst="last_prompt")

    Attributes:
        inputs: the prompts with their answers: `Inputs`, or a list of them for several batches.
    """

    def __init__(self, answers: Sequence[Answer], prompts: Sequence[Inputs]):
        super().__init__(answers)
        self._prompts = tuple(prompts)

    def __str__(self) -> str:
        return "\n".join(self)

    @cached_property
    def inputs(self) -> Any:
        ids, parts = iter(self), []
        for prompts in self._prompts:
            parts.append(prompts._written([next(ids).ids.tolist() for _ in range(len(prompts))]))
        return parts[0] if len(parts) == 1 else parts
