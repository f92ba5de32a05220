"""Is a contextualization curve the image's, or the decoder's own? The same without an image.

1. One forward reads the curve of the images: s(l) between image and text tokens, state by state.
2. The same forward runs again with other things at the image's positions, as they enter layer 0:
   noise, random words, running text. Prompt, positions and masks stay.
3. The phases of the images' curve are fitted, and each is compared with what the controls do
   nearby (`ContextualizationControlsResult.excess`).

What the controls do too is no phase of an image: it is how this decoder treats any token there.
"""

from collections.abc import Sequence

import nnsight
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechvlm.errors import InputError, ModelError
from mechvlm.experiments.contextualization_controls_result import CONTROL_KINDS, ContextualizationControlsResult
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import as_batches
from mechvlm.inputs.tokens import Modality, image_mask
from mechvlm.probes.contextualization import Contextualization, ContextualizationResult
from mechvlm.probes.probe import State
from mechvlm.results import concat
from mechvlm.tracing.memory import over_batches
from mechvlm.tracing.reading import Readable, read_batch
from mechvlm.vlm.vlm import VLM

PASSAGE = (
    "In the morning a small boat left the harbour. The water was blue and the air was cold, and two men stood on the left "
    "side of the deck. One of them held a red box in his hands; the other looked at a large white bird above the house near "
    "the shore. There is no wind today, he said, but the light is good. They went on slowly, past the green hill and the old "
    "church, until the town behind them was a thin gray line. Nobody spoke for a long time. Then the sun came out, and "
    "everything around them, the sea and the sky and the black stones below the boat, began to shine."
)
"""Running English text; words that a tokenizer does not know are left out."""
FEWEST_WORDS = 20
"""Tokens of running text that a tokenizer must know."""
SCALE_ERROR = 0.02
"""How far text states may lie from scaled embeddings, as a share of their norm: half precision."""


def contextualization_controls(
    vlm: VLM, inputs: Readable, kinds: Sequence[str] = CONTROL_KINDS, *, text: str = PASSAGE, seed: int = 0
) -> ContextualizationControlsResult:
    """The contextualization curve of the images beside those of other things in their place.

    >>> controls = mv.contextualization_controls(vlm, inputs)
    >>> print(controls.verdict)
    >>> controls.excess           # each phase's change less that of each control, with intervals
    >>> controls.plot()

    Args:
        vlm: the model.
        inputs: one batch or several. Each costs one forward, and one for each of `kinds`.
        kinds: what stands at the image's positions, where it enters layer 0:
            "noise": Gaussian, with the mean and the covariance of the batch's visual tokens there;
            "words": embeddings of random tokens of the vocabulary, without special ones;
            "text": embeddings of running text, from another place of it for each example.
        text: the running text; it is repeated where images have more tokens.
        seed: of noise, words and places.

    Embeddings are scaled as the decoder scales those of its own text (Gemma). A decoder that adds
    positions to its embeddings (OPT) takes noise alone.

    Source: the curve is eq. (1) of Wei et al. 2024; controls of inputs are those of probing (Hewitt
    and Liang 2019). Tested: noise against its covariance, words against a forward of these words.

    Raises:
        InputError: for an unknown kind, or text of which the tokenizer knows fewer than 20 tokens.
        ModelError: where words cannot be made to look like the decoder's own, or where image
            features enter later layers too (deepstack), so that the image cannot be taken away.
        ValueError: for an example without image or text tokens.
    """
    choices = control_tokens(vlm, kinds, text)
    probe = Contextualization()

    def read_part(part: Inputs, numbers: range) -> tuple:
        (own,) = read_batch(vlm, part, probe, first=numbers.start)
        return own, *control_curves(vlm, part, choices, seed + numbers.start)

    parts = over_batches(vlm, as_batches(inputs), read_part, "contextualization controls, batches")
    own, *controls = (concat(list(results)) for results in zip(*parts, strict=True))
    return ContextualizationControlsResult(
        inter=own.inter, controls=torch.stack([control.inter for control in controls]), baseline=own.baseline[0],
        kinds=tuple(kinds), seed=seed, model=vlm.name, example_ids=own.example_ids,
    )  # fmt: skip


def control_tokens(vlm: VLM, kinds: Sequence[str], text: str = PASSAGE) -> dict[str, Int[Tensor, " token"] | None]:
    """By kind, the tokens that a control is drawn from; None for noise.

    Raises:
        InputError, ModelError: as `contextualization_controls`.
    """
    unknown = [kind for kind in kinds if kind not in CONTROL_KINDS]
    if unknown or not kinds:
        raise InputError(f"There is no control {unknown or 'given'}. Known: {', '.join(CONTROL_KINDS)}.")
    if vlm.record.adds_between:
        raise ModelError(
            f"{vlm.name} adds image features to its first layers too (deepstack), so other embeddings at the image's "
            "positions do not take the image away. There are no controls of its contextualization."
        )
    choices = {"noise": lambda: None, "words": lambda: _vocabulary(vlm), "text": lambda: _text_ids(vlm, text)}
    return {kind: choices[kind]() for kind in kinds}


def control_curves(
    vlm: VLM, inputs: Inputs, choices: dict[str, Int[Tensor, " token"] | None], seed: int
) -> list[ContextualizationResult]:
    """The curves of one batch with each control (`control_tokens`) at its image's positions.

    Raises:
        ModelError: where words cannot be made to look like the decoder's own.
    """
    return [_control(vlm, inputs, Contextualization(), kind, own, seed) for kind, own in choices.items()]


def _control(vlm: VLM, inputs: Inputs, probe: Contextualization, kind: str, choices, seed: int):
    """The curves of one batch with something else at its image's positions."""
    plan = probe.prepare(vlm, inputs)
    image = image_mask(inputs.token_maps)
    text = torch.stack([tokens.modality == Modality.TEXT for tokens in inputs.token_maps])
    ids = torch.stack([tokens.ids for tokens in inputs.token_maps])
    chosen = None if kind == "noise" else _chosen(kind, choices, image, seed)
    with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1):
        rows, errors = nnsight.save([]), nnsight.save([])
        norm, unembed = vlm.readout()
        old = vlm.resid_pre[0]
        if chosen is None:
            vlm.resid_pre[0] = with_noise(old, image, seed)
        else:
            new, error = with_words(old, vlm.W_E, ids, text, image, chosen)
            errors.append(error)
            vlm.resid_pre[0] = new
        for layer in range(vlm.n_layers):
            rows.append(probe.at_state(plan, State(layer, vlm.resid_pre[layer], norm, unembed)))
        rows.append(probe.at_state(plan, State(vlm.n_layers, vlm.resid_post[vlm.n_layers - 1], norm, unembed)))
    if any(float(error) > SCALE_ERROR for error in errors):
        raise ModelError(
            f"What enters the first layer of {vlm.name} is not its scaled embeddings of tokens (positions are added, say), so "
            "words cannot be put at the image's positions. kinds=['noise'] needs none."
        )
    return probe.result(plan, rows, vlm, inputs)


def with_noise(
    states: Float[Tensor, "batch pos d_model"], image: Bool[Tensor, "batch pos"], seed: int
) -> Float[Tensor, "batch pos d_model"]:
    """The states with Gaussian noise at the image's positions.

    Noise is μ + 1/√(N-1) Σ_j g_j (x_j - μ) with standard normal g_j, over the batch's N visual
    tokens x_j: it has their mean μ and their covariance, which is never formed.
    """
    x = states[image.to(states.device)].float()
    mean = x.mean(0)
    generator = torch.Generator().manual_seed(seed)
    # Example by example: all weights at once would be [N N].
    noise = [
        mean
        + torch.randn(int(n), len(x), generator=generator, dtype=torch.float32).to(x) @ (x - mean) / (len(x) - 1) ** 0.5
        for n in image.sum(-1)
    ]
    new = states.clone()
    new[image.to(states.device)] = torch.cat(noise).to(new)
    return new


def with_words(
    states: Float[Tensor, "batch pos d_model"],
    embedding: Float[Tensor, "d_vocab d_model"],
    ids: Int[Tensor, "batch pos"],
    text: Bool[Tensor, "batch pos"],
    image: Bool[Tensor, "batch pos"],
    chosen: Int[Tensor, " n"],
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, ""]]:
    """The states with embeddings of other tokens at the image's positions, scaled as the text's.

    Returns:
        (states, error): the error is how far the text's states lie from their scaled embeddings, as
        a share of their norm.
    """
    device = states.device
    own = embedding[ids[text].to(embedding.device)].to(device).float()
    there = states[text.to(device)].float()
    scale = (own * there).sum() / (own * own).sum()
    error = torch.linalg.vector_norm(there - scale * own) / torch.linalg.vector_norm(there)
    new = states.clone()
    new[image.to(device)] = (scale * embedding[chosen.to(embedding.device)].to(device).float()).to(new)
    return new, error


def _chosen(
    kind: str, choices: Int[Tensor, " token"], image: Bool[Tensor, "batch pos"], seed: int
) -> Int[Tensor, " n"]:
    """The ids at all image positions of a batch: random ones, or the text from random places."""
    generator = torch.Generator().manual_seed(seed)
    counts = image.sum(-1).tolist()
    if kind == "words":
        return choices[torch.randint(len(choices), (sum(counts),), generator=generator)]
    starts = torch.randint(len(choices), (len(counts),), generator=generator).tolist()
    return torch.cat(
        [choices[(start + torch.arange(n)) % len(choices)] for start, n in zip(starts, counts, strict=True)]
    )


def _vocabulary(vlm: VLM) -> Int[Tensor, " token"]:
    """All tokens but special ones."""
    special = {*vlm.tokenizer.all_special_ids, *vlm.tokenizer.added_tokens_decoder}
    return torch.tensor([i for i in range(min(len(vlm.tokenizer), vlm.d_vocab)) if i not in special])


def _text_ids(vlm: VLM, text: str) -> Int[Tensor, " token"]:
    """The tokens of a text, without those that stand for unknown words."""
    special = set(vlm.tokenizer.all_special_ids)
    ids = [i for i in vlm.tokenizer(text, add_special_tokens=False)["input_ids"] if i not in special]
    if len(ids) < FEWEST_WORDS:
        raise InputError(
            f"The tokenizer of {vlm.name} knows {len(ids)} tokens of the running text, and {FEWEST_WORDS} are needed. Give text= "
            "in its words."
        )
    return torch.tensor(ids)
