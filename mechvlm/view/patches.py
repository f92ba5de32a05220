"""The patch view: an image's patches, what a token reads from each, and the words of each.

1. `match_example` checks that inputs and results belong together.
2. The rows that can be picked, the lens's words and the images are packed (packing.py) into one
   JSON.
3. patches.js unpacks it in the browser and draws the page.
"""

import io
import warnings
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from mechvlm.errors import ViewError
from mechvlm.figures.style import style, text
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.prompts import prompt_text
from mechvlm.inputs.tokens import Modality
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.probes.query_reading import QueryReadingResult
from mechvlm.progress import track
from mechvlm.view import packing
from mechvlm.view.drawn import FRAME_COLOR
from mechvlm.view.example import Pick, ShownExample, match_example
from mechvlm.view.page import PAGE_LIMIT, View, page_script, to_json
from mechvlm.view.stage import Stage

SCRIPTS = ("places", "unpack", "frames", "elements", "image", "words", "heads", "link", "patches")
"""The page's scripts: places, numbers, heat, what pages are made of, images, the lens's words,
layers and heads, two views with one cursor; the page itself."""


@dataclass(frozen=True)
class PatchView(View):
    """The page of `patches`, which `compare` can put beside another.

    Attributes:
        model: name of the model.
        images: its images, as data URLs.
    """

    model: str = ""
    images: tuple[str, ...] = field(default=(), repr=False)


def patches(
    inputs: Inputs,
    lens: LogitLensResult,
    norms: NormAttentionResult,
    reading: QueryReadingResult | None = None,
    *,
    example: int | None = None,
) -> PatchView:
    """One example to explore: a token's heat over the patches, and each patch's logit-lens words.

    Patches lie at their place on the original image; the part that the model does not see is
    dimmed. Views that overlap (the whole image, then its tiles) are drawn apart, and together: the
    heat of all tokens that show a spot is added up there.

    A reader can pick the prompt's tokens that are destinations of `norms`. To pick from all of
    them, read `NormAttention(dst=inputs.tokens.text.tolist())`.

        >>> inputs = vlm.inputs(image, "What is left of the dog?")
        >>> lens, norms = mechvlm.read(vlm, inputs, mechvlm.LogitLens(), mechvlm.NormAttention())
        >>> mechvlm.view.patches(inputs, lens, norms).save("page.html")

    Where the inputs hold an answer, its words can be picked too, if `norms` read the positions
    that wrote them (`dst="writing"`). A word shows what was looked at while the model wrote it: the
    row of the position before it. A word of several tokens shows the mean of their rows, norms and
    weights each, and its shares are those of this mean.

        >>> answer = vlm.generate(inputs)[0]
        >>> probes = mechvlm.LogitLens(), mechvlm.NormAttention(dst="writing")
        >>> results = mechvlm.read(vlm, answer.inputs, *probes)
        >>> mechvlm.view.patches(answer.inputs, *results)

    The heat at layer l (0 to n_layers - 1) is what its attention reads of state l. Its color is
    linear, from 0 to the map's own maximum:
        norm-based: ‖Σ_h α_h f_h(x)‖, or ‖α_h f_h(x)‖ of one head (residual-stream units);
        raw: the mean of the attention weights α_h over heads, or those of one head (0 to 1).
    The words are those of state l, with probabilities in percent: what layer l reads there. The
    last state, n_layers, is read by no layer and has words alone.

    The map of layers and heads shows which share of a row lies on the image: the sum over its
    visual tokens divided by the sum over all sources.

    Where visual tokens are queries (InstructBLIP), a query's heat is the Q-Former's attention
    weight, the mean over its layers and heads. A token's heat is Σ_q (what it reads from query q) x
    (where q reads): its norms or weights spread over the image.

    Numbers on the page are off by at most 0.4 % of their row's maximum, and shares are exact. Where
    one destination's rows would take more than half a megabyte, or those of all together more than
    eleven, single heads are off by up to 2.2 %, and all heads together by up to 0.8 %.

    Args:
        inputs: the inputs of the results.
        lens: their logit lens, at any positions and states.
        norms: their norm-based attention, of one destination or more.
        reading: where each query reads; required where visual tokens are queries, and only there.
        example: which of several examples.

    Raises:
        ViewError: when the results are not of these inputs, an image is gone, or the page would
            exceed 50 MB.
    """
    shown = match_example(inputs, lens, norms, reading, example)
    rows = _pack_picks(shown)
    words = packing.pack_words(shown.lens.ids.numpy(), shown.lens.probs.numpy(), dict(lens.vocabulary))
    not_visual = shown.sources[shown.n_visual :]
    question = prompt_text(inputs.prompts[shown.number])
    data = {
        "title": f"What {norms.model} looked at",
        "question": question.strip(),
        "layers": len(norms.layers),
        "heads": norms.weight.shape[2],
        "images": shown.page_images(),
        "views": shown.page_views(),
        "positions": shown.sources.tolist(),
        "pieces": [shown.piece(p) for p in not_visual.tolist()],
        "n_words": shown.n_words,
        "special": [bool(shown.tokens.modality[p] == Modality.SPECIAL) for p in not_visual],
        "visual": shown.n_visual,
        "answer": [
            {
                "text": word.text,
                "sources": shown.source_of[list(word.holds)].tolist(),
                "wrote": list(word.wrote),
            }
            for word in shown.answer
        ],
        "rows": rows,
        "start": {
            "row": shown.picks.index(shown.first_pick),
            "layer": shown.first_layer,
            "source": shown.first_source,
        },
        "lens": {
            "states": list(lens.states),
            "k": lens.ids.shape[2],
            "sources": shown.source_of[shown.lens.position.numpy()].tolist(),
            "data": words,
        },
        "reading": None if shown.maps is None else _pack_maps(shown.maps),
        "color": list(FRAME_COLOR),
    }
    body = f'<article class="view patch-view"><script type="application/json">{to_json(data)}</script></article>'
    _check_size(len(body), shown)
    return PatchView(
        title=f"Patches, {norms.model}: {question}{_answer_text(shown)}",
        body=body,
        scripts=(page_script(SCRIPTS),),
        styles=((files("mechvlm.view") / "views.css").read_text("utf-8"),),
        preview=lambda: _preview(shown),
        height=_height(shown),
        model=norms.model,
        images=tuple(image["src"] for image in data["images"]),
    )


def _pack_picks(shown: ShownExample) -> list[dict]:
    """One row for each pick, by its source or its word; those of one position are packed once."""
    rows: list[dict] = []
    size, room = 0, packing.row_room(len({pick.positions for pick in shown.picks}))
    packed_at: dict[tuple[int, ...], int] = {}
    for number, pick in enumerate(track(shown.picks, "packing words")):
        at = int(shown.source_of[pick.positions[0]])
        name: dict[str, Any] = {"source": at} if pick.word is None else {"word": pick.word}
        if pick.positions in packed_at:
            rows.append({**name, "like": packed_at[pick.positions]})
            continue
        packed, levels = packing.pack_rows(*shown.row_values(pick), shown.parts, shown.groups, room)
        packed_at[pick.positions] = number
        rows.append({**name, "levels": levels, "data": packed})
        size += len(packed)
        # Estimated from the rows so far, to refuse a large page before all of it is packed.
        _check_size(size * len(shown.picks) // len(rows), shown)
    return rows


def _answer_text(shown: ShownExample) -> str:
    """The answer as a title shows it, behind an arrow; nothing without one."""
    answer = "".join(word.text for word in shown.answer).strip()
    return f" → {answer}" if answer else ""


def _pack_maps(maps: np.ndarray) -> str:
    """Where the queries read, packed: maxima f4 [query], steps u1 [query row*col]."""
    steps, top = packing.to_steps(maps.reshape(len(maps), -1))
    return packing.pack(top, steps)


def _height(shown: ShownExample) -> int:
    """The page's height in pixels in JupyterLab, where a frame is some 840 wide, estimated."""
    first, end = 0 if shown.maps is not None else shown.n_visual, shown.n_visual + shown.n_words
    held = set(shown.tokens.answer.tolist())
    strings = [shown.tokens.strings[p] for p in shown.sources[first:end] if p not in held]
    # The question and the prompt, the answer, the controls with the small maps.
    height = 98 + 63 + 32 * _chip_lines(strings, 8, 4, 190 * len(shown.pictures))
    if shown.answer:
        height += 64 + 38 * _chip_lines([word.text for word in shown.answer], 10, 5)
    n_layers, n_states = len(shown.norms.layers), len(shown.lens.states)
    height += 113 + 70 * -(-n_layers // 13)
    width, tall = shown.pictures[0].size
    image = 203 + (min(480, 351 * tall // width) if len(shown.pictures) == 1 else 320)
    sheets = len({view.sheet for view in shown.views if view.image == 0})
    if sheets > 1:
        # All views together stand above the sheets, which lie two in a row.
        image += -(-sheets // 2) * (25 + min(480, 175 * tall // width))
    words, heads = 96 + 25 * (n_states + 1), 174 + n_layers * min(24, max(8, 416 // n_layers))
    n_heads, is_tall = shown.norms.weight.shape[2], n_states > 16
    if n_heads > (2 if is_tall else 5):
        heads += 127  # shares stand under the map where they do not fit beside it
    heads += 34 * (n_heads // 10)  # buttons, some ten a line
    if len(shown.pictures) > 1:
        columns = image + max(words, heads)
    else:
        # Many states have a column of their own: patches.js puts the map under the image.
        columns = max(image + heads, words) if is_tall else max(image, words + heads)
    return height + columns + 20 + 72  # a gap, the keys


def _chip_lines(strings: list[str], letter: int, most: int, others: int = 0) -> int:
    """Lines that chips of these texts take, beside `others` pixels: `most`, which then scroll."""
    return min(most, -(-(others + sum(24 + letter * min(len(s), 20) for s in strings)) // 790))


def _check_size(size: int, shown: ShownExample) -> None:
    if size > PAGE_LIMIT:
        n = len({p for p in shown.dest.tolist() if shown.source_of[p] >= 0})
        fit = max(1, n * PAGE_LIMIT // size * 9 // 10)
        raise ViewError(
            f"The page would have {size / 1e6:,.0f} MB, over the {PAGE_LIMIT / 1e6:.0f} MB that a browser opens well: "
            f"norms has {n} destinations at {len(shown.norms.layers)} layers x {shown.norms.weight.shape[2]} heads x "
            f"{len(shown.sources)} tokens, lens {shown.lens.ids.shape[1]} positions. Choose fewer: "
            f"NormAttention(dst=['last']), at most about {fit}, or LogitLens(positions='image', k=5)."
        )


def _preview(shown: ShownExample) -> bytes:
    """A PNG of what the page shows first, for where its scripts do not run."""
    heats = shown.heat(shown.first_pick, shown.first_layer)
    stages = [
        Stage(image, *zip(*[(v, h) for v, h in zip(shown.views, heats, strict=True) if v.image == number], strict=True))
        for number, image in enumerate(shown.pictures)
    ]
    top = max(float(stage.top) for stage in stages) or 1.0
    with style():
        n = len(stages)
        figure = Figure((4.2 * n + 4.6, max(4.6, 0.21 * len(shown.lens.states))), dpi=100, layout="constrained")
        *left, right = figure.subplots(1, n + 1, width_ratios=[4.2] * n + [4.6])
        for ax, stage in zip(left, stages, strict=True):
            stage.draw(ax, top)
        shades = ListedColormap([(*np.array(FRAME_COLOR) / 255, share) for share in np.linspace(0, 1, 256)])
        figure.colorbar(
            ScalarMappable(Normalize(0, top), shades), ax=left, location="bottom", shrink=0.7, aspect=36,
            label="frames: norm written (residual-stream units)",
        )  # fmt: skip
        left[0].set_title(f"{_heading(shown, shown.first_pick)}, layer {shown.first_layer}", fontsize=9.5)
        _draw_words(right, shown)
        file = io.BytesIO()
        with warnings.catch_warnings():
            # Tokens come in more scripts than one font has; the page itself has the reader's fonts.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _heading(shown: ShownExample, pick: Pick) -> str:
    """What is drawn of a pick, in the page's own words."""
    if pick.word is None:
        return f'What "{text(shown.piece(pick.positions[0]), 16)}" looked at'
    word = shown.answer[pick.word].text
    return f'Looked at while it wrote "{text(word, 16)}"' if word else "Looked at after the answer"


def _draw_words(ax: Axes, shown: ShownExample) -> None:
    """The lens words of the visual token shown first, by layer, colored by probability."""
    point = int((shown.source_of[shown.lens.position.numpy()] == shown.first_source).nonzero()[0][0])
    probs, name = shown.lens.probs[:, point].numpy(), dict(shown.lens.vocabulary)
    pieces = [[name[i] for i in ids] for ids in shown.lens.ids[:, point].tolist()]
    ax.imshow(probs, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1.3)
    small = 7 if len(pieces) <= 16 else 6
    for row, words in enumerate(pieces):
        for col, word in enumerate(words):
            color = "white" if probs[row, col] > 0.75 else "#222222"
            ax.text(col, row, text(word, 11), ha="center", va="center", fontsize=small, color=color)
    if shown.maps is None:
        place = shown.tokens.place(int(shown.sources[shown.first_source]))
        assert place is not None  # it is drawn
        of_view = f", {place.view}" if len(shown.tokens.views[place.image]) > 1 else ""
        of_image = f" of image {place.image}" if len(shown.pictures) > 1 else ""
        ax.set_title(f"Logit lens: patch at row {place.row}, col {place.col}{of_view}{of_image}", fontsize=9.5)
    else:
        ax.set_title(f"Logit lens: query {shown.first_source}", fontsize=9.5)
    ax.set_yticks(range(len(pieces)), [str(layer) for layer in shown.lens.states], fontsize=small)
    ax.set_xticks(range(shown.lens.ids.shape[2]), [f"top {k + 1}" for k in range(shown.lens.ids.shape[2])])
    ax.set_ylabel("state (0 = embeddings)")
    ax.grid(False)
