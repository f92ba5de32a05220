"""Multimodal neurons: MLP neurons that fire on the image and write words (Schwettmann et al. 2023).

1. One backward gives the gradient of the answer's logit at every MLP neuron. Times the neuron's
   activation, summed over the image's positions, it is the neuron's attribution
   (`attribute_to_neurons`).
2. Neurons are ranked by their mean attribution. The strongest whose output decodes to words are
   chosen (`choose_neurons`, `decode_columns`, `reads_as_words`).
3. A second forward gives the activations of the chosen neurons on the image.
"""

from dataclasses import dataclass
from functools import partial

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.decoder.weights import weight_and_bias
from mechvlm.errors import InputError, ModelError, NonFiniteError
from mechvlm.experiments.multimodal_neurons_result import MultimodalNeuronsResult
from mechvlm.families.record import part
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import Answers, as_batches, by_batch
from mechvlm.inputs.tokens import image_mask
from mechvlm.measures.words import word_of
from mechvlm.ndif.requests import in_one_request
from mechvlm.tracing.memory import over_batches
from mechvlm.tracing.reading import Readable
from mechvlm.vlm.kinds import require_gradients
from mechvlm.vlm.vlm import VLM

CANDIDATES = 256
"""Neurons that are decoded at once: bounds their logits to CANDIDATES x d_vocab."""


def decode_columns(
    columns: Float[Tensor, "d_model neuron"],
    norm: Float[Tensor, " d_model"],
    w_u: Float[Tensor, "d_vocab d_model"],
    k: int,
) -> tuple[Int[Tensor, "neuron k"], Float[Tensor, "neuron k"]]:
    """The k tokens whose logits a neuron's output raises most, and by how much at activation 1.

    (norm * W_out[:, i]) · W_U[t]: the neuron's column of the MLP's output matrix, read as the logit
    lens reads a state, before the final norm's scale.
    """
    best = ((columns.float().T * norm.float()) @ w_u.float().T).topk(k, dim=-1)
    return best.indices, best.values


def reads_as_words(pieces: tuple[str, ...]) -> bool:
    """Whether at least half of the pieces are words.

    A word is two letters or more, and nothing else (`mechvlm.measures.words.word_of`).
    """
    return 2 * sum(word_of(piece) is not None for piece in pieces) >= len(pieces)


def multimodal_neurons(
    vlm: VLM, inputs: Readable, answers: Answers = None, k: int = 10, k_words: int = 5
) -> MultimodalNeuronsResult:
    """The k MLP neurons that did most for the answers on the image, of those that decode to words.

    A neuron's attribution is Σ_p a_p * d logit / d a_p over the image's positions p (logits), where
    a is what the MLP's output matrix reads and the logit is the answer's at the last position: the
    first-order effect of the neuron on the image. Neurons are ranked by its mean over examples. A
    neuron whose output does not read as words is passed over: fewer than half of the `k_words`
    tokens that its column of the output matrix, through the final norm's weight and the
    unembedding, raises most are words.

    Each batch costs a forward with its backward, and a second forward for the chosen neurons'
    activations. The backward keeps what a training step would of the decoder, without gradients of
    the parameters: make batches small for large models. On NDIF it needs a key that the server
    trusts: a sandbox has no gradients.

    >>> result = mv.multimodal_neurons(vlm, inputs, "red", k=5)
    >>> result.words[0]  # what the strongest neuron writes

    Args:
        vlm: the model.
        inputs: one batch or several. One that does not fit into memory is halved.
        answers: a word or a token id for all examples, or one per example over all batches in
            order; of several tokens the first one counts. None: the token that the model itself
            would write first (one more forward).
        k: how many neurons.
        k_words: how many tokens each one is decoded to.

    Source: Schwettmann et al. 2023, "Multimodal Neurons in Pretrained Text-Only Transformers"
    (arXiv:2308.01544). Differs: the image's positions are summed over, MLPs are gated (so a neuron
    may fire negatively, see `sign`), and the final norm's weight is applied before the unembedding.
    Tested: equals the slope of the logit as the neuron's activations are scaled.

    Raises:
        InputError: for another number of answers than examples, an answer that is no token, or a k
            that cannot be had.
        NonFiniteError: when a gradient is NaN or infinite; it names the examples, counted over all
            batches.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("multimodal_neurons needs gradients: call it outside of torch.inference_mode().")
    if vlm.has_weights:
        require_gradients(vlm.hf, vlm.record)
    batches = as_batches(inputs)
    answers_of = by_batch(batches, answers)
    if not 1 <= k_words <= vlm.d_vocab or k < 1:
        raise InputError(
            f"k={k} neurons of k_words={k_words} words were asked for: k is at least 1, k_words 1 to {vlm.d_vocab}, the size of "
            "the vocabulary."
        )
    tokens = torch.cat([vlm.answer_tokens(batch, words) for batch, words in zip(batches, answers_of, strict=True)])

    def gradients(part: Inputs, numbers: range) -> tuple[Tensor, Tensor]:
        return in_one_request(vlm, attribute_to_neurons, part, tokens[numbers.start : numbers.stop])

    sums = over_batches(vlm, batches, gradients, "neurons: gradients, batches")
    attribution, activity = (torch.cat(parts) for parts in zip(*sums, strict=True))
    _refuse_nonfinite(attribution, vlm)

    chosen = choose_neurons(vlm, attribution.mean(0), activity.mean(0), k, k_words)
    label = "neurons: activations, batches"
    read_parts = over_batches(vlm, batches, lambda part, _: (_activations(vlm, part, chosen), _grid_of(part)), label)
    maps, grids = zip(*read_parts, strict=True)
    longest, pad = max(part.shape[-1] for part in maps), torch.nn.functional.pad
    padded = [pad(part, (0, longest - part.shape[-1]), value=torch.nan) for part in maps]
    return MultimodalNeuronsResult(
        layer=chosen.layer, index=chosen.index,
        attribution=attribution[:, chosen.layer, chosen.index],
        activation=torch.cat(padded),
        sign=chosen.sign, words=chosen.words,
        answers=vlm.to_str_tokens(tokens),
        grid=grids[0] if len(set(grids)) == 1 else (), model=vlm.name, example_ids=batches.ids,
    )  # fmt: skip


@dataclass(frozen=True)
class Neurons:
    """The chosen neurons."""

    layer: Int[Tensor, " neuron"]
    index: Int[Tensor, " neuron"]
    sign: Int[Tensor, " neuron"]
    words: tuple[tuple[str, ...], ...]


def attribute_to_neurons(vlm: VLM, inputs: Inputs, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Every neuron's attribution to the logits of `tokens` [example], and its mean activation.

    Σ a * gradient, and the mean of a, over the image's positions: [example layer neuron] each, in
    float32 on the CPU.
    """
    if not vlm.has_weights:
        raise ModelError(
            "multimodal_neurons needs gradients, and NDIF runs what you send in a sandbox, which has none. Ask NDIF to trust "
            "your key, or load the model here."
        )
    image = image_mask(inputs.token_maps)
    with torch.enable_grad(), vlm.trace(inputs, logits_to_keep=1):
        # The graph begins here, so that nothing of the vision encoder is kept and no parameter
        # gets a gradient.
        start = nnsight.save(vlm.resid_pre[0].detach().requires_grad_())
        vlm.resid_pre[0] = start
        acts = nnsight.save([])
        for layer in range(vlm.n_layers):
            # As the MLP itself reads it: a view of it would get no gradient.
            acts.append(part(vlm.layers[layer], vlm.layer_parts[layer].has("down_proj")).input)
        logits = nnsight.save(vlm.logits[:, -1])

    shape = len(inputs), vlm.n_layers, acts[0].shape[-1]
    attribution, activity = torch.full((2, *shape), torch.nan, dtype=torch.float32)

    def add_up(layer: int, act: Tensor, grad: Tensor) -> None:
        act, grad = (x.reshape(*image.shape, -1) for x in (act, grad))  # OPT's are flat
        on_image = image.to(act.device)[..., None]
        attribution[:, layer] = (act * grad * on_image).sum(1, dtype=torch.float32).cpu()
        activity[:, layer] = ((act * on_image).sum(1, dtype=torch.float32) / on_image.sum(1)).cpu()

    # Each gradient is summed as it passes by, and dropped.
    for layer, act in enumerate(acts):
        act.register_hook(partial(add_up, layer, act.detach()))
    with torch.enable_grad():
        # Each example's own logit; the sum has the gradients of all.
        total = logits.gather(1, tokens[:, None].to(logits.device)).float().sum()
    torch.autograd.grad(total, start)
    return attribution, activity


def choose_neurons(
    vlm: VLM, attribution: Float[Tensor, "layer neuron"], activity: Float[Tensor, "layer neuron"], k: int, k_words: int
) -> Neurons:
    """The k neurons of highest attribution whose output decodes to words."""
    order = attribution.flatten().argsort(descending=True)
    order = order[: int((attribution > 0).sum())]
    chosen: list[tuple[int, int, int]] = []
    words: list[tuple[str, ...]] = []
    for candidates in order.split(CANDIDATES):
        layers, indices = candidates // attribution.shape[1], candidates % attribution.shape[1]
        signs = torch.where(activity[layers, indices] < 0, -1, 1)
        neurons = list(zip(layers.tolist(), indices.tolist(), signs.tolist(), strict=True))
        for neuron, row in zip(neurons, in_one_request(vlm, _decode_neurons, neurons, k_words), strict=True):
            if reads_as_words(decoded := vlm.to_str_tokens(row)):
                chosen.append(neuron)
                words.append(decoded)
        if len(chosen) >= k:
            break
    if len(chosen) < k:
        raise InputError(
            f"k={k} neurons were asked for; {len(chosen)} of {attribution.numel()} have a positive attribution and decode to "
            f"words ({len(order)} have a positive attribution): ask for no more than those."
        )
    layers, indices, signs = torch.tensor(chosen[:k]).T
    return Neurons(layers, indices, signs, tuple(words[:k]))


def _decode_neurons(vlm: VLM, neurons: list[tuple[int, int, int]], k_words: int) -> Int[Tensor, "neuron k"]:
    """The tokens that each neuron (layer, index, sign) raises most."""
    final_norm, w_u = vlm.readout()[0], weight_and_bias(part(vlm.hf, vlm.record.unembed))[0]
    columns = torch.empty(vlm.d_model, len(neurons), dtype=w_u.dtype, device=w_u.device)
    with torch.no_grad():
        for layer in {layer for layer, _, _ in neurons}:  # each layer's weight is read once
            w_out = weight_and_bias(part(vlm.layers[layer]._module, vlm.layer_parts[layer].has("down_proj")))[0]
            if (norm := vlm.mlp_norm(layer)) is not None:  # it divides all neurons' sum alike
                w_out = w_out * norm.gain.to(w_out)[:, None]
            for column, (_, index, sign) in enumerate(neurons):
                if neurons[column][0] == layer:
                    columns[:, column] = sign * w_out[:, index]  # its write at activation 1
        columns = final_norm.centred(columns.T).T
        return decode_columns(columns, final_norm.gain.to(w_u.device), w_u, k_words)[0].cpu()


def _activations(vlm: VLM, inputs: Inputs, chosen: Neurons) -> Float[Tensor, "example neuron image"]:
    """The chosen neurons' activations on the image, in float32; NaN past an example's last."""
    in_layer = {int(layer): chosen.layer == layer for layer in chosen.layer.unique()}
    with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1):
        acts = nnsight.save({})
        for layer, rows in in_layer.items():
            act = vlm.layer_parts[layer].read_neurons()
            acts[layer] = act[..., chosen.index[rows].to(act.device)]
    longest = max(len(m.image) for m in inputs.token_maps)
    activation = torch.full((len(inputs), len(chosen.index), longest), torch.nan, dtype=torch.float32)
    for layer, rows in in_layer.items():
        for example, m in enumerate(inputs.token_maps):
            on_image = acts[layer][example, m.image.to(acts[layer].device)]
            activation[example, rows, : len(m.image)] = on_image.T.float().cpu()
    return activation


def _grid_of(inputs: Inputs) -> tuple[int, ...]:
    """(rows, cols) of the patches, where every example has one image on the same grid; else ()."""
    views = [view for tokens in inputs.token_maps for of_image in tokens.views for view in of_image]
    shapes = {(view.rows, view.cols) for view in views}
    if len(shapes) != 1 or len(views) != len(inputs):
        return ()
    in_order = (torch.equal(v.positions.flatten(), m.image) for v, m in zip(views, inputs.token_maps, strict=True))
    return shapes.pop() if all(in_order) else ()


def _refuse_nonfinite(attribution: Float[Tensor, "example layer neuron"], vlm: VLM) -> None:
    finite = attribution.isfinite()
    bad = tuple((~finite.all(-1).all(-1)).nonzero().squeeze(-1).tolist())
    if bad:
        last = int((~finite.all(-1).all(0)).nonzero().max())
        raise NonFiniteError(
            f"Gradients of {vlm.name} are NaN or infinite up to layer {last} (of 0 to {vlm.n_layers - 1}), in example(s) "
            f"{list(bad)}. In float16 they overflow: load with dtype='bfloat16' or 'float32'. Else the weights or the image "
            "may hold NaN.",
            examples=bad,
        )
