"""Winoground: does a model tell two captions of the same words apart, and where does it show?

1. Each of a pair's two captions is written after each of its two images, as the model's answer.
2. One forward of such an input gives the caption's likelihood, and every other measure.
3. Likelihoods give the text, image and group score; the other measures are compared between the
   caption that is true of an image and the other one (`WinogroundResult`).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.datasets import Pair
from mechvlm.errors import InputError, NonFiniteError
from mechvlm.experiments.winoground_result import PAIR_MEASURES, WinogroundResult
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.images import ImageLike
from mechvlm.measures.words import lens_precision_recall
from mechvlm.probes.contextualization import ContextualizationPlan, mean_unit
from mechvlm.probes.likelihood import Likelihood
from mechvlm.probes.logit_lens import LogitLens
from mechvlm.probes.norm_attention import NormAttention
from mechvlm.probes.probe import Model, Row, State
from mechvlm.progress import track
from mechvlm.results import stack
from mechvlm.tracing.memory import Failed, in_halves
from mechvlm.tracing.reading import read, read_batch
from mechvlm.vlm.vlm import VLM

PROMPT = "Describe the scene."


def caption_logprob(
    vlm: VLM, images: Sequence[ImageLike], captions: Sequence[str], prompt: str = PROMPT, batch_size: int = 16
) -> Float[Tensor, " example"]:
    """log p(caption | image, prompt) in nats: the sum over the caption's tokens.

    Each token is given all before it. The caption stands after the prompt in the family's template,
    where the model would answer; the end of the sequence is no part of it. Not divided by the
    length: Winoground's two captions have the same words. One forward per batch, and logits of the
    captions' positions alone.

    >>> mv.caption_logprob(vlm, [image, image], ["a dog on a mat", "a mat on a dog"])  # [2]

    Source: as VisualGPTScore, Lin et al. 2024 (arXiv:2306.01879).
    Tested: equals one forward of the Hugging Face model for each caption.

    Raises:
        InputError: for an image that cannot be read, other numbers of images than captions, or a
            caption that leaves no room.
    """
    if len(images) != len(captions) or not len(images):
        raise InputError(f"{len(images)} images and {len(captions)} captions were given: give one caption for each.")
    totals = []
    for start in track(range(0, len(images), batch_size), "captions, batches"):
        batch = slice(start, start + batch_size)
        inputs = vlm.inputs(list(images[batch]), prompt).answered(list(captions[batch]))
        totals.append(read(vlm, inputs, Likelihood())[0].total)
    return torch.cat(totals)


def winoground(vlm: VLM, pairs: Sequence[Pair], prompt: str = PROMPT, batch_size: int = 16) -> WinogroundResult:
    """The text, image and group score of pairs, and every measure under true and false captions.

    Each of a pair's two captions is written after each of its two images and the prompt, where the
    model would answer, and everything is read in that one forward:

    - the likelihood of the caption (as `caption_logprob`);
    - precision and recall of the words that the image's tokens decode to, against the caption;
    - the mean cosine of image and caption tokens (eq. (1) of Wei et al. 2024 over the caption
      alone);
    - how much the caption's last token reads from the image (norm-based attention, the sum over the
      image's tokens).

    Where visual tokens stand before the text they cannot see it. A lens then reads the same words
    off them under both captions, and a pair's captions hold the same words: precision and recall
    differ by inflections alone, which makes them a control.

    >>> result = mv.winoground(vlm, mechvlm.datasets.pairs_of(data.examples))
    >>> result.scores.to_frame()  # percent of pairs, intervals and chance

    Args:
        vlm: the model.
        pairs: what `mechvlm.datasets.pairs_of` gives of Winoground's examples, or pairs of your
            own.
        prompt: what the captions answer; the family's template is put around it.
        batch_size: forwards together, of whole pairs (four each): it changes speed and memory, not
            results.

    A pair with an image that cannot be read, whose activations are not finite, or which does not
    fit into memory alone, is set aside with the reason.

    Source: Thrush et al. 2022 (arXiv:2204.03162).

    Raises:
        InputError: for no pair, or where none can be used.
    """
    if not len(pairs):
        raise InputError("There is no pair. mechvlm.datasets.pairs_of(examples) gives those of a data set.")
    step = max(1, batch_size // 4)
    used: list[Pair] = []
    values: list[Tensor] = []
    set_aside: list[tuple[str, str]] = []
    for start in track(range(0, len(pairs), step), "winoground, batches"):
        batch = range(start, min(start + step, len(pairs)))
        parts = in_halves(
            batch, lambda part: read_pairs(vlm, [pairs[i] for i in part], prompt), (InputError, NonFiniteError)
        )
        for part, outcome in parts:
            if not isinstance(outcome, Failed):
                used += [pairs[i] for i in part]
                values.append(outcome)
            elif len(part) == 1:
                set_aside.append((pairs[part[0]].id, outcome.reason))
    if not used:
        first, reason = set_aside[0]
        raise InputError(f"None of the {len(pairs)} pairs could be read. The first, {first}: {reason}")
    return WinogroundResult(
        values=torch.cat(values, 2), pairs=tuple(pair.id for pair in used), set_aside=tuple(set_aside), prompt=prompt,
        model=vlm.name,
    )  # fmt: skip


def read_pairs(vlm: VLM, pairs: Sequence[Pair], prompt: str) -> Float[Tensor, "measure layer pair caption image"]:
    """The values of these pairs, as `WinogroundResult.values` holds them, in one forward.

    The forward holds four examples per pair, caption by caption and image by image.

    Raises:
        InputError: for an image that cannot be read, or a caption that leaves no room.
        NonFiniteError: where activations are not finite.
    """
    combinations = [(pair, caption, image) for pair in pairs for caption in (0, 1) for image in (0, 1)]
    captions = [pair.captions[caption] for pair, caption, _ in combinations]
    inputs = vlm.inputs([pair.images[image] for pair, _, image in combinations], prompt)
    inputs = inputs.answered(captions)
    probes = Likelihood(), LogitLens(k=1), _CaptionCosine(), NormAttention(dst="last")
    likelihood, lens, cosine, norms = read_batch(vlm, inputs, *probes)
    values = torch.full((len(PAIR_MEASURES), vlm.n_layers + 1, len(combinations)), torch.nan, dtype=torch.float32)
    for i, (caption, tokens) in enumerate(zip(captions, inputs.token_maps, strict=True)):
        words = lens_precision_recall(lens.of(i).pieces(), caption)
        for measure in ("precision", "recall"):
            by_layer = words[words["measure"] == measure]["value"].to_numpy(dtype="float32")
            values[PAIR_MEASURES.index(measure), :, i] = torch.from_numpy(by_layer)
        values[PAIR_MEASURES.index("norm attention"), :-1, i] = norms.norm[:, i, 0, tokens.image].sum(-1)
    values[PAIR_MEASURES.index("contextualization")] = cosine
    values[PAIR_MEASURES.index("log-likelihood"), -1] = likelihood.total
    return values.unflatten(-1, (len(pairs), 2, 2))


class _CaptionCosine:
    """Probe: the mean cosine of an example's image tokens and its answer's, [state example]."""

    def prepare(self, vlm: Model, inputs: Inputs) -> ContextualizationPlan:
        """Find the positions of image and caption."""
        image, caption = (torch.zeros(inputs.encoding["input_ids"].shape, dtype=torch.bool) for _ in range(2))
        for row, tokens in enumerate(inputs.token_maps):
            image[row, tokens.image], caption[row, tokens.answer] = True, True
        return ContextualizationPlan(image, caption)

    def at_state(self, plan: ContextualizationPlan, state: State) -> Row:
        """The mean cosine of every example."""
        image, caption = (mean_unit(state.resid, mask.to(state.resid.device)) for mask in plan)
        return {"cosine": (image * caption).sum(-1)}

    def result(
        self, plan: ContextualizationPlan, rows: list[Row], vlm: Model, inputs: Inputs
    ) -> Float[Tensor, "state example"]:
        """The mean cosines of all states."""
        return stack([row["cosine"] for row in rows])
