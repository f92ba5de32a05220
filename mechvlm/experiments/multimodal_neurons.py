"""Multimodal neurons: MLP neurons that fire on the image and write words (Schwettmann et al. 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import nnsight
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.decoder.norms import gain
from mechvlm.errors import InputError, ModelError, NonFiniteError
from mechvlm.families.record import part
from mechvlm.figures.headings import toward
from mechvlm.figures.panels import beside
from mechvlm.figures.style import SIGNED, axes, style, text
from mechvlm.inputs.batch import Answers, Inputs, as_batches, by_batch
from mechvlm.inputs.tokens import Modality
from mechvlm.intervals import Interval, mean_interval
from mechvlm.measures.words import word_of
from mechvlm.ndif.requests import together
from mechvlm.progress import track
from mechvlm.results import Result
from mechvlm.vlm.vlm import VLM

CANDIDATES = 256
"""Neurons that are decoded at once: bounds their logits to CANDIDATES x d_vocab."""


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

    def plot(self, ax: Axes | None = None) -> Axes:
        """Each neuron's attribution with its words, and where on the image it fires in the example where it did most."""
        with style():
            n_examples, n_neurons = self.attribution.shape
            ax = axes(ax, width=7.5, height=1.1 + 0.52 * n_neurons)
            side = beside(ax, 0.3)
            mean, low, high = (x.numpy() for x in self.interval)
            rows = np.arange(n_neurons)
            ax.barh(rows, mean, height=0.5, color="#009E73", alpha=0.8)
            if n_examples > 1:
                ax.errorbar(
                    mean,
                    rows,
                    xerr=np.clip([mean - low, high - mean], 0, None),
                    fmt="none",
                    color="#222222",
                    capsize=2,
                    linewidth=1,
                )
            names = zip(self.layer.tolist(), self.index.tolist(), self.words, strict=True)
            words = [f"layer {layer}, {i}\n" + " ".join(text(w, 10) for w in piece[:5]) for layer, i, piece in names]
            ax.set_yticks(rows, words, fontsize=7)
            ax.set_ylim(n_neurons - 0.5, -0.5)
            ax.grid(axis="y", visible=False)
            ax.set_ylabel("MLP neuron, and the words it writes")
            ax.set_xlabel("attribution on the image (logits)" + (", 95 % intervals" if n_examples > 1 else ""))
            ax.set_title(f"Multimodal neurons for {toward(self.answers)}, {self.model}", fontsize=8.5)

            # As many small maps as there are neurons, each to its own maximum: how strongly each fires is not compared.
            best = self.attribution.argmax(0)
            shown = self.maps if self.grid else self.activation[:, :, None]
            for row, example in enumerate(best.tolist()):
                one = shown[example, row].numpy()
                most = np.nanmax(np.abs(one)) or 1.0
                half = 0.44 if self.grid else 0.2
                extent = (0.0, 1.0, row + half, row - half)
                side.imshow(
                    one, extent=extent, cmap=SIGNED, vmin=-most, vmax=most, aspect="auto", interpolation="nearest"
                )
                side.text(1.05, row, f"±{most:.2g}\nexample {example}", fontsize=6, va="center")
            side.set_xlim(0, 1.5)
            side.set_ylim(n_neurons - 0.5, -0.5)
            side.set_xticks([])
            side.tick_params(labelleft=False, left=False)
            side.grid(False)
            side.set_frame_on(False)
            side.set_xlabel("activation" if self.grid else "activation, by query", fontsize=8)
        return ax


def multimodal_neurons(
    vlm: VLM, inputs: Inputs | Sequence[Inputs], answers: Answers = None, k: int = 10, k_words: int = 5
) -> MultimodalNeuronsResult:
    """The k MLP neurons whose firing on the image did most for the answers, among those whose output decodes to words.

    A neuron's attribution is Σ_p a_p * d logit / d a_p over the image's positions p (logits), where a is what the MLP's output
    matrix reads and the logit is the answer's at the last position: the first-order effect of the neuron on the image.
    Neurons are ranked by its mean over examples; one whose output does not read as words is passed over: fewer than half of
    the `k_words` tokens that its column of the output matrix, through the final norm's weight and the unembedding, raises
    most are words.

    Each batch costs a forward with its backward, and a second forward for the chosen neurons' activations. The backward keeps
    what a training step would of the decoder, without gradients of the parameters: make batches small for large models. On
    NDIF it needs a key that the server trusts: a sandbox has no gradients.

    Args:
        vlm: the model.
        inputs: a batch, or a list of batches.
        answers: a word or a token id for all examples, or one per example over all batches in order; of several tokens the
            first one counts. None: the token that the model itself would write first (one more forward).
        k: how many neurons.
        k_words: how many tokens each one is decoded to.

    Source: Schwettmann et al. 2023, "Multimodal Neurons in Pretrained Text-Only Transformers" (arXiv:2308.01544). Differs: the
    image's positions are summed over, MLPs are gated (so a neuron may fire negatively, see `sign`), and the final norm's
    weight is applied before the unembedding. Tested: equals the slope of the logit as the neuron's activations are scaled.

    Raises:
        InputError: for another number of answers than examples, an answer that is no token, or a k that cannot be had.
        NonFiniteError: when a gradient is NaN or infinite; it names the examples, counted over all batches.
    """
    batches = as_batches(inputs)
    asked = by_batch(batches, answers)
    if not 1 <= k_words <= vlm.d_vocab or k < 1:
        raise InputError(
            f"k={k} neurons of k_words={k_words} words were asked for: k is at least 1, k_words 1 to {vlm.d_vocab}, the size of "
            "the vocabulary."
        )
    tokens = [vlm.answer_tokens(one, some) for one, some in zip(batches, asked, strict=True)]
    pairs = list(zip(batches, tokens, strict=True))
    found = [together(vlm, _sums, *pair) for pair in track(pairs, "neurons: gradients, batches")]
    attribution, activity = (torch.cat(parts) for parts in zip(*found, strict=True))
    _refuse_nonfinite(attribution, vlm)

    chosen = _choose(vlm, attribution.mean(0), activity.mean(0), k, k_words)
    maps = [_activations(vlm, one, chosen) for one in track(batches, "neurons: activations, batches")]
    longest = max(one.shape[-1] for one in maps)
    maps = [torch.nn.functional.pad(one, (0, longest - one.shape[-1]), value=torch.nan) for one in maps]
    return MultimodalNeuronsResult(
        layer=chosen.layer + 1,
        index=chosen.index,
        attribution=attribution[:, chosen.layer, chosen.index],
        activation=torch.cat(maps),
        sign=chosen.sign,
        words=chosen.words,
        answers=vlm.to_str_tokens(torch.cat(tokens)),
        grid=_grid(batches),
        model=vlm.name,
    )


@dataclass(frozen=True)
class _Neurons:
    layer: Int[Tensor, " neuron"]  # from 0
    index: Int[Tensor, " neuron"]
    sign: Int[Tensor, " neuron"]
    words: tuple[tuple[str, ...], ...]


def _down_proj(vlm: VLM, layer):
    return getattr(getattr(layer, vlm.record.mlp), vlm.record.down_proj)


def _sums(vlm: VLM, inputs: Inputs, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Per example, layer and neuron, over the image's positions: Σ a * gradient, and the mean of a. Float32, on the CPU."""
    if not vlm.has_weights:
        raise ModelError(
            "multimodal_neurons needs gradients, and NDIF runs what you send in a sandbox, which has none. Ask NDIF to trust "
            "your key, or load the model here."
        )
    image = torch.stack([m.modality == Modality.IMAGE for m in inputs.token_maps])
    layers = vlm.layers
    with torch.enable_grad(), vlm.trace(inputs, logits_to_keep=1):
        # The graph begins here: nothing is kept of the vision encoder, and no parameter gets a gradient.
        start = nnsight.save(vlm.resid_pre[0].detach().requires_grad_())
        vlm.resid_pre[0] = start
        acts = nnsight.save([])
        for layer in range(vlm.n_layers):
            acts.append(_down_proj(vlm, layers[layer]).input)
        logits = nnsight.save(vlm.logits[:, -1])

    shape = len(inputs), vlm.n_layers, acts[0].shape[-1]
    attribution, activity = torch.empty(shape), torch.empty(shape)

    def keep(layer: int, act: Tensor, grad: Tensor) -> None:
        where = image.to(act.device)[..., None]
        attribution[:, layer] = (act * grad * where).sum(1, dtype=torch.float32).cpu()
        activity[:, layer] = ((act * where).sum(1, dtype=torch.float32) / where.sum(1)).cpu()

    # Each gradient is summed as it passes by, and dropped.
    for layer, act in enumerate(acts):
        act.register_hook(partial(keep, layer, act.detach()))
    with torch.enable_grad():
        total = logits.gather(1, tokens[:, None].to(logits.device)).float().sum()  # each example's own logit
    torch.autograd.grad(total, start)
    return attribution, activity


def _choose(
    vlm: VLM, attribution: Float[Tensor, "layer neuron"], activity: Float[Tensor, "layer neuron"], k: int, k_words: int
) -> _Neurons:
    """The k neurons of highest attribution whose output decodes to words."""
    order = attribution.flatten().argsort(descending=True)
    order = order[: int((attribution > 0).sum())]
    chosen: list[tuple[int, int, int]] = []
    words: list[tuple[str, ...]] = []
    for some in order.split(CANDIDATES):
        layers, indices = some // attribution.shape[1], some % attribution.shape[1]
        signs = torch.where(activity[layers, indices] < 0, -1, 1)
        neurons = list(zip(layers.tolist(), indices.tolist(), signs.tolist(), strict=True))
        for neuron, row in zip(neurons, together(vlm, _decoded, neurons, k_words), strict=True):
            if reads_as_words(decoded := vlm.to_str_tokens(row)):
                chosen.append(neuron)
                words.append(decoded)
        if len(chosen) >= k:
            break
    if len(chosen) < k:
        raise InputError(
            f"k={k} neurons were asked for; {len(chosen)} of {attribution.numel()} have a positive attribution and decode to "
            f"words ({len(order)} have the former)."
        )
    layers, indices, signs = torch.tensor(chosen[:k]).T
    return _Neurons(layers, indices, signs, tuple(words[:k]))


def _decoded(vlm: VLM, neurons: list[tuple[int, int, int]], k_words: int) -> Int[Tensor, "neuron k"]:
    """The tokens that each (layer, index, sign) raises most."""
    norm, w_u = gain(part(vlm.hf, vlm.record.norm)), part(vlm.hf, vlm.record.unembed).weight
    with torch.no_grad():
        columns = torch.stack([sign * _column(vlm, layer, i).to(w_u.device) for layer, i, sign in neurons], dim=1)
        return decode_columns(columns, norm.to(w_u.device), w_u, k_words)[0].cpu()


def _column(vlm: VLM, layer: int, index: int) -> Tensor:
    return _down_proj(vlm, part(vlm.hf, vlm.record.layers)[layer]).weight[:, index]


def _activations(vlm: VLM, inputs: Inputs, chosen: _Neurons) -> Float[Tensor, "example neuron image"]:
    """The chosen neurons' activations at the image's positions, NaN past an example's last. Float32."""
    layers, by_layer = vlm.layers, {int(layer): chosen.layer == layer for layer in chosen.layer.unique()}
    with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1):
        acts = nnsight.save({})
        for layer, mine in by_layer.items():
            act = _down_proj(vlm, layers[layer]).input
            acts[layer] = act[..., chosen.index[mine].to(act.device)]
    longest = max(len(m.image) for m in inputs.token_maps)
    found = torch.full((len(inputs), len(chosen.index), longest), torch.nan)
    for layer, mine in by_layer.items():
        for row, m in enumerate(inputs.token_maps):
            found[row, mine, : len(m.image)] = acts[layer][row, m.image.to(acts[layer].device)].T.float().cpu()
    return found


def _grid(batches: list[Inputs]) -> tuple[int, ...]:
    maps = [m for one in batches for m in one.token_maps]
    grids = {(g.rows, g.cols) for m in maps for g in m.grids}
    return grids.pop() if len(grids) == 1 and all(m.patches and len(m.grids) == 1 for m in maps) else ()


def _refuse_nonfinite(attribution: Float[Tensor, "example layer neuron"], vlm: VLM) -> None:
    finite = attribution.isfinite()
    bad = tuple((~finite.all(-1).all(-1)).nonzero().squeeze(-1).tolist())
    if bad:
        last = int((~finite.all(-1).all(0)).nonzero().max()) + 1
        raise NonFiniteError(
            f"Gradients of {vlm.name} are NaN or infinite up to layer {last} of {vlm.n_layers}, in example(s) {list(bad)}. In "
            "float16 they overflow: load with dtype='bfloat16' or 'float32'. Else the weights or the image may hold NaN.",
            examples=bad,
        )


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
    """Whether at least half of the pieces are words (`mechvlm.measures.words.word_of`: two letters or more, and nothing else)."""
    return 2 * sum(word_of(piece) is not None for piece in pieces) >= len(pieces)
