"""One image read and shown: the page that `mechvlm view` writes and the study's gallery opens."""

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import TokenMap
from mechvlm.probes.logit_lens import LogitLens
from mechvlm.probes.norm_attention import NormAttention
from mechvlm.probes.query_reading import QueryReading
from mechvlm.tracing.reading import read
from mechvlm.view.packing import row_room
from mechvlm.view.page import View
from mechvlm.view.patches import patches
from mechvlm.vlm.vlm import VLM

PAGE_ROOM = 16_000_000
"""Characters that the rows of all destinations may take up on a page: 88 of them at 7B."""
GALLERY_ROOM = 4_000_000
"""The same on each page of the gallery: 7 destinations at 7B, all of them for a small model."""


def with_answer(vlm: VLM, inputs: Inputs, answer: str | None = None) -> Inputs:
    """One example's inputs with an answer: the model's own, of at most 40 tokens, or a given one.

    Where the model ends its answer at once, they hold none: `tokens.n_answer` is 0.

    Raises:
        InputError: for an answer that is empty or cannot follow the prompt (`Inputs.answered`).
    """
    return vlm.generate(inputs)[0].inputs if answer is None else inputs.answered(answer)


def destinations(vlm: VLM, tokens: TokenMap, room: int = PAGE_ROOM) -> Int[Tensor, " dest"]:
    """The positions to pick from on the page: those that can have read the image, in order.

    They are the prompt's text after the image, its last position, and the positions that wrote the
    answer. When `room` (characters) does not hold the rows of all, those of the answer go first,
    from its beginning, and of the prompt the last ones are taken. A row takes at most four
    characters for each layer, head and source, and hardly more than
    `mechvlm.view.packing.row_room` gives it.
    """
    prompt = tokens.text[tokens.text > tokens.image[0]]
    prompt = torch.cat([prompt[~torch.isin(prompt, tokens.answer)], tokens.prompt[-1:]]).unique()
    wanted = torch.cat([tokens.writing, prompt[~torch.isin(prompt, tokens.writing)].flip(0)])
    most = 4 * vlm.n_layers * vlm.n_heads * len(tokens)
    fitting = [n for n in range(1, len(wanted) + 1) if n * min(row_room(n), most) <= room]
    return wanted[: max(fitting, default=1)].sort().values


def patch_view(vlm: VLM, inputs: Inputs, dest: Int[Tensor, " dest"], k: int = 5) -> View:
    """The patch view of one example, read in one forward.

    The positions `dest` can be picked on it; each patch shows its `k` likeliest tokens.
    """
    return patches(inputs, *read_for_page(vlm, inputs, dest, k))


def read_for_page(vlm: VLM, inputs: Inputs, dest: Int[Tensor, " dest"], k: int) -> tuple:
    """The results of a patch view: (lens, norms, reading).

    `reading` is where each query reads, or None when visual tokens are patches.
    """
    queries = [] if inputs.tokens.patches else [QueryReading()]
    results = read(vlm, inputs, LogitLens(k=k), NormAttention(dst=dest.tolist()), *queries)
    return *results, *[None] * (3 - len(results))
