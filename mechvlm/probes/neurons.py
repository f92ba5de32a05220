"""MLP neurons that turn what is seen into words: how they decode, and the result of `multimodal_neurons`."""

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.intervals import Interval, mean_interval
from mechvlm.results import Result
from mechvlm.words import word_of


def decode_columns(
    columns: Float[Tensor, "d_model neuron"],
    norm: Float[Tensor, " d_model"],
    w_u: Float[Tensor, "d_vocab d_model"],
    k: int,
) -> tuple[Int[Tensor, "neuron k"], Float[Tensor, "neuron k"]]:
    """The k tokens whose logits a neuron's output raises most, and by how much at activation 1 before the final norm's scale.

    (norm * W_out[:, i]) · W_U[t]: the neuron's column of the MLP's output matrix, read as the logit lens reads a state.
    """
    best = ((columns.float().T * norm.float()) @ w_u.float().T).topk(k, dim=-1)
    return best.indices, best.values


def reads_as_words(pieces: tuple[str, ...]) -> bool:
    """Whether at least half of the pieces are words (`mechvlm.words.word_of`: two letters or more, and nothing else)."""
    return 2 * sum(word_of(piece) is not None for piece in pieces) >= len(pieces)


@dataclass(frozen=True, repr=False)
class MultimodalNeuronsResult(Result):
    """The MLP neurons that did most, at the image's positions, for an answer; the strongest first.

    Attributes:
        layer: 1 to n_layers, the layer whose MLP holds the neuron; index: its number there.
        attribution: Σ activation * d logit / d activation over the image's positions (logits): what the logit would lose, to
            first order, were the neuron silent on the image.
        activation: of the neuron at each image token, in the order of the image's positions; NaN past an example's last.
        sign: of the neuron's mean activation on the image, 1 or -1. Gated neurons fire either way, and one that fires
            negatively writes the reverse of its column.
        words: the pieces whose logits the neuron's column times `sign` raises most, for each neuron.
        answers: the tokenizer's pieces of the tokens whose logits were measured.
        grid: (rows, cols) of the patches; empty where visual tokens are queries, or an example has several images.
        model: the model's name.
    """

    units: ClassVar[str] = "logit"

    layer: Int[Tensor, " neuron"]
    index: Int[Tensor, " neuron"]
    attribution: Float[Tensor, "example neuron"]
    activation: Float[Tensor, "example neuron image"]
    sign: Int[Tensor, " neuron"]
    words: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    grid: tuple[int, ...]
    model: str

    @property
    def interval(self) -> Interval:
        """The mean attribution of each neuron over examples, with its 95 % bootstrap interval.

        The neurons were chosen by this mean: on examples other than those, expect a little less.
        """
        return mean_interval(self.attribution)

    @property
    def maps(self) -> Float[Tensor, "example neuron row col"]:
        """The activations on the patches.

        Raises:
            ValueError: where there is no grid.
        """
        if not self.grid:
            raise ValueError(
                "These visual tokens have no one grid: they are queries, which read the whole image (mechvlm.query_reading says "
                "where), or of several images. `activation` holds the neurons' activations on them in order."
            )
        return self.activation.unflatten(-1, self.grid)

    def to_frame(self) -> pd.DataFrame:
        """One row per neuron and example: rank, layer, index, words, sign, answer, attribution, mean_activation."""
        n_examples, n_neurons = self.attribution.shape
        return pd.DataFrame(
            {
                "rank": [r + 1 for r in range(n_neurons) for _ in range(n_examples)],
                "layer": self.layer.repeat_interleave(n_examples).numpy(),
                "index": self.index.repeat_interleave(n_examples).numpy(),
                "words": [" ".join(words) for words in self.words for _ in range(n_examples)],
                "sign": self.sign.repeat_interleave(n_examples).numpy(),
                "example": list(range(n_examples)) * n_neurons,
                "answer": list(self.answers) * n_neurons,
                "attribution": self.attribution.T.reshape(-1).numpy(),
                "mean_activation": self.activation.nanmean(-1).T.reshape(-1).numpy(),
            }
        )
