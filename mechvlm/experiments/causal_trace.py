"""Causal tracing: corrupt the image or the words, restore a few clean states, and see how much of the answer comes back."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mechvlm.batches import Answers, pieces
from mechvlm.errors import InputError
from mechvlm.experiments.examples import Example, Examples, each, positions
from mechvlm.experiments.rerun import Edit, run, sweep, windows
from mechvlm.experiments.results import CausalTraceResult
from mechvlm.inputs import Inputs
from mechvlm.interventions import patch
from mechvlm.tokens import Modality
from mechvlm.vlm import VLM

CORRUPTIONS = ("noise", "image", "blank", "words")
SITES = ("resid_pre", "attn_out", "mlp_out")
GROUPS = ("image", "question", "last")
NOISE = 3.0
"""Standard deviations of the embeddings, as in Meng et al. 2022."""


def causal_trace(
    vlm: VLM,
    inputs: Inputs | Sequence[Inputs],
    answers: Answers = None,
    corrupt: str = "noise",
    window: int = 1,
    at: str = "resid_pre",
    groups: Sequence[str] | Sequence[Mapping[str, Sequence[int] | Tensor]] = GROUPS,
    seed: int = 0,
) -> CausalTraceResult:
    """The answer's probability in a corrupted forward in which a group's states are restored, layer by layer.

    p_restored - p_corrupt, the indirect effect (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"; for
    vision-language models Basu et al. 2024, "Understanding Information Storage and Transfer in Multi-modal LLMs").

    Args:
        vlm: the model.
        inputs: any number of examples, as one batch or several. Each is run alone, its windows batched; on NDIF
            those of one batch are one request.
        answers: a word or token id for all examples, or one each; by default the model's own first token.
        corrupt: "noise" on the visual tokens' embeddings and "words" the same on the text tokens' (Gaussian, 3 standard
            deviations of those embeddings); "blank" a grey image; "image" that of the next example with another one.
        window: how many layers around each layer are restored together.
        at: what is restored: "resid_pre" (the residual stream where it enters the layer), "attn_out" or "mlp_out".
        groups: names of `TokenMap.select` ("question + last" joins two), or for each example a mapping from the groups' names
            to positions of that example alone, without padding; the names are the same for all.
        seed: of the noise.

    InstructBLIP's queries read the words in the Q-Former too; "words" corrupts them in the decoder alone.

    Raises:
        InputError: for answers or groups that do not fit the examples, another image that gives another number of tokens,
            or a corruption that changes nothing.
        ValueError: for an unknown corruption, site or group.
    """
    for value, known, what in ((corrupt, CORRUPTIONS, "corruption"), (at, SITES, "site to restore")):
        if value not in known:
            raise ValueError(f"There is no {what} {value!r}. Known: {', '.join(known)}.")
    spans = windows(vlm.n_layers, window)
    examples = Examples(vlm, inputs, answers)
    named = _named(groups, len(examples))
    found = each(
        vlm,
        examples,
        _restored,
        lambda example: (
            _other(vlm, example, examples, corrupt),
            [_group(example, given) for given in named[example.number].values()],
            spans,
            corrupt,
            at,
            seed,
        ),
        "causal trace",
    )
    tokens, p, p_corrupt, p_restored = zip(*found, strict=True)
    first = 0 if at == "resid_pre" else 1
    return CausalTraceResult(
        p=torch.tensor(p), p_corrupt=torch.tensor(p_corrupt), p_restored=torch.tensor(p_restored).permute(1, 2, 0),
        groups=tuple(named[0]), layers=tuple(range(first, vlm.n_layers + first)),
        windows=tuple((span.start, span.stop) for span in spans), at=at, corrupt=corrupt,
        answers=pieces(vlm, torch.tensor(tokens)), model=vlm.name,
    )  # fmt: skip


def _named(groups, n: int) -> list[Mapping]:
    """For each example the groups' names, and which positions they are: by name again, or by number."""
    if not len(groups):
        raise ValueError(f"No group of positions was given; by default they are {', '.join(GROUPS)}.")
    if all(isinstance(group, str) for group in groups):
        return [{group: group for group in groups}] * n
    if len(groups) != n or any(not isinstance(g, Mapping) or list(g) != list(groups[0]) for g in groups):
        raise InputError(f"Groups are names, or one mapping per example ({n}) with the same names in each.")
    return list(groups)


def _group(example: Example, given) -> list[int]:
    tokens = example.inputs.tokens
    return (positions(tokens, given) if isinstance(given, str) else tokens.select(given)).tolist()


def _restored(
    vlm: VLM, example: Example, other: Inputs | None, where: list[list[int]], spans: list[range], corrupt: str, at: str,
    seed: int,
) -> tuple[int, float, float, list[list[float]]]:  # fmt: skip
    """The answer's token, its probability, that of the corrupted run, and with each group restored [window group]."""
    clean = run(vlm, example.inputs, keep=at)
    token = example.token(clean.logits)
    if other is not None:
        broken = run(vlm, other)
    else:
        broken = run(vlm, example.inputs, embeddings=_noisy(example, clean.resid[0], corrupt, seed))
    if torch.equal(broken.resid[0], clean.resid[0]):
        raise InputError(f"corrupt={corrupt!r} changes nothing of example {example.number}: choose another corruption.")

    def change(layer: int, rows: list[Edit]) -> None:
        first = rows[0].pos
        pos = [[i - first for i in where[edit.key[0]]] if layer in edit.layers else None for edit in rows]
        if any(pos):
            patch(vlm, clean.kept[layer][:, first:], pos, layer, at=at)

    edits = [Edit((g, span), span, min(pos)) for g, pos in enumerate(where) for span in dict.fromkeys(spans)]
    logits = sweep(vlm, broken, edits, change)
    restored = [[float(logits[g, span].softmax(-1)[token]) for g in range(len(where))] for span in spans]
    return token, clean.p(token), broken.p(token), restored


def _noisy(example: Example, old: Tensor, corrupt: str, seed: int) -> Float[Tensor, "1 pos d_model"]:
    """The embeddings with noise on those of the image ("noise") or of the words."""
    tokens = example.inputs.tokens
    words = tokens.question[tokens.modality[tokens.question] == Modality.TEXT]
    pos = tokens.image if corrupt == "noise" else words
    if not len(pos):
        raise InputError(f"Example {example.number} has no words before its last position to corrupt.")
    embeddings = old.clone()
    at = old[:, pos].float()
    noise = torch.randn(at.shape, generator=torch.Generator().manual_seed(seed + example.number)).to(at.device)
    embeddings[:, pos] = (at + NOISE * at.std() * noise).to(embeddings)
    return embeddings


def _other(vlm: VLM, example: Example, examples: Examples, corrupt: str) -> Inputs | None:
    """The example with another image, where the corruption is one."""
    if corrupt in ("noise", "words"):
        return None
    inputs, tokens = example.inputs, example.inputs.tokens
    images = inputs.images[0]
    if corrupt == "blank":
        others = [Image.new("RGB", image.size, (127, 127, 127)) for image in images]
    else:
        turns = ((example.number + step) % len(examples) for step in range(1, len(examples)))
        others = next((list(given) for turn in turns if (given := examples[turn].inputs.images[0]) != images), [])
        if not others:
            raise InputError(
                "corrupt='image' takes the image of the next example with another one, and there is none: give at least two "
                "examples, of different images."
            )
    other = vlm.inputs([others], inputs.prompts[0])
    if not torch.equal(other.tokens.ids, tokens.ids):
        raise InputError(
            f"Example {example.number} with another image has {len(other.tokens)} tokens instead of {len(tokens)}: "
            "its states cannot be restored position by position. Give examples of as many images, of one size."
        )
    return other
