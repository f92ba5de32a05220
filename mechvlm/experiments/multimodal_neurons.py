"""Multimodal neurons: MLP neurons that fire on the image and write words (Schwettmann et al. 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.architectures import part
from mechvlm.batches import Answers, as_batches, by_batch, measured_tokens, pieces
from mechvlm.errors import InputError, ModelError, NonFiniteError
from mechvlm.inputs import Inputs
from mechvlm.probes.neurons import MultimodalNeuronsResult, decode_columns, reads_as_words
from mechvlm.progress import track
from mechvlm.remote import together
from mechvlm.tokens import Modality
from mechvlm.vlm import VLM

CANDIDATES = 256
"""Neurons that are decoded at once: bounds their logits to CANDIDATES x d_vocab."""


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
    tokens = [measured_tokens(vlm, one, some) for one, some in zip(batches, asked, strict=True)]
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
        answers=pieces(vlm, torch.cat(tokens)),
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
    if vlm.apart:
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
            if reads_as_words(decoded := pieces(vlm, row)):
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
    norm, w_u = part(vlm.hf, vlm.record.norm).weight, part(vlm.hf, vlm.record.unembed).weight
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
