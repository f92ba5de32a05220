"""The patch view: the image with its patches, what a token reads from each of them, and the words each one holds."""

import io
import warnings
from importlib.resources import files

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mechvlm.errors import ViewError
from mechvlm.figures.style import HEAT, style, text
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import Modality
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.probes.query_reading import QueryReadingResult
from mechvlm.view import packing
from mechvlm.view.example import Seen, see
from mechvlm.view.page import LIMIT, View, to_json


def patches(
    inputs: Inputs,
    lens: LogitLensResult,
    norms: NormAttentionResult,
    reading: QueryReadingResult | None = None,
    *,
    example: int | None = None,
) -> View:
    """One example to explore: the heat of a token over the patches, and the logit-lens words of each patch.

    Patches lie where they are on the original image; what the model does not see of it is dimmed. Of the prompt, the tokens
    that are destinations of `norms` can be picked: NormAttention(dst=inputs.tokens.text.tolist()) makes all of it so.

    The heat, at layer l (1 to n_layers) from state l - 1 to l, its color linear from 0 to the map's own maximum:
        norm-based: ‖Σ_h α_h f_h(x)‖, or ‖α_h f_h(x)‖ of one head (residual-stream units);
        raw: the mean of the attention weights α_h over heads, or those of one head (0 to 1).
    The words are those of state l (0, the embeddings, to n_layers), with probabilities in percent. The map of layers and
    heads shows which share of a row lies on the image: the sum over its visual tokens by the sum over all sources.

    Where visual tokens are queries (InstructBLIP), a query's heat is the Q-Former's attention weight, mean over its layers
    and heads; a token's is Σ_q (what it reads from query q) x (where q reads): norms or weights spread over the image.

    Numbers on the page are off by at most 0.4 % of their row's maximum; those of single heads by more, up to 1.6 %, where one
    query's rows would else take more than half a megabyte. Shares are exact.

    Args:
        inputs: what was read.
        lens: its logit lens, at any positions and layers.
        norms: its norm-based attention, of one destination or more.
        reading: where each query reads; needed where visual tokens are queries, and only there.
        example: which of several examples.

    Raises:
        ViewError: when the results are not of these inputs, an image is gone, or the page would exceed 50 MB.
    """
    seen = see(inputs, lens, norms, reading, example)
    rows, size = [], 0
    for row in seen.rows:
        packed, levels = packing.pack_rows(*seen.values(row), seen.parts, seen.groups)
        rows.append({"source": int(seen.index[seen.dest[row]]), "levels": levels, "data": packed})
        size += len(packed)
        _check_size(size * len(seen.rows) // len(rows), seen)
    words = packing.pack_words(seen.lens.ids.numpy(), seen.lens.probs.numpy(), dict(lens.vocabulary))
    heat = mpl.colormaps[HEAT]
    data = {
        "model": norms.model,
        "layers": len(norms.layers),
        "heads": norms.weight.shape[2],
        "images": seen.images(),
        "positions": seen.order.tolist(),
        "pieces": [seen.tokens.strings[p] for p in seen.order[seen.n_visual :]],
        "special": [bool(seen.tokens.modality[p] == Modality.SPECIAL) for p in seen.order[seen.n_visual :]],
        "visual": seen.n_visual,
        "rows": rows,
        "start": {"row": seen.rows.index(seen.start), "layer": seen.layer, "source": seen.point},
        "lens": {
            "layers": list(lens.layers),
            "k": lens.ids.shape[2],
            "sources": seen.index[seen.lens.position.numpy()].tolist(),
            "data": words,
        },
        "reading": None if seen.maps is None else packing.pack(*_flat(seen.maps)),
        "colors": [mpl.colors.to_hex(heat(x)) for x in np.linspace(0, 0.92, 64)],
    }
    body = f'<main class="patch-view"><script type="application/json">{to_json(data)}</script></main>'
    _check_size(len(body), seen)
    here = files("mechvlm.view")
    return View(
        title=f"Patches, {norms.model}: {inputs.prompts[seen.example]}",
        body=body,
        scripts=((here / "patches.js").read_text("utf-8"),),
        styles=((here / "patches.css").read_text("utf-8"),),
        still=lambda: _picture(seen),
        height=_height(seen),
    )


def _flat(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maxima f4 [query], steps u1 [query row*col]."""
    steps, top = packing.steps(maps.reshape(len(maps), -1))
    return top, steps


def _height(seen: Seen) -> int:
    """Pixels that the page takes up at the width of a notebook, about 900."""
    strings = [seen.tokens.strings[p] for p in seen.order[0 if seen.maps is not None else seen.n_visual :]]
    chips = sum(18 + 7 * min(len(s), 20) for s in strings) + 190 * len(seen.pictures)
    n, (width, height) = len(seen.lens.layers), seen.pictures[0].size
    image = min(480, 410 * height // width) + 80 if len(seen.pictures) == 1 else 380 * len(seen.pictures)
    tall = n > 16  # the map then stands under the image
    columns = max(image + 270, 50 + 18 * n) if tall else max(image, 300 + 21 * n)
    return 170 + 29 * min(4, -(-chips // 850)) + columns


def _check_size(size: int, seen: Seen) -> None:
    if size > LIMIT:
        n = len(seen.rows)
        fit = max(1, n * LIMIT // size * 9 // 10)
        raise ViewError(
            f"The page would have {size / 1e6:,.0f} MB, over the {LIMIT / 1e6:.0f} MB that a browser opens well: norms has {n} "
            f"destinations at {len(seen.norms.layers)} layers x {seen.norms.weight.shape[2]} heads x {len(seen.order)} tokens, "
            f"lens {seen.lens.ids.shape[1]} positions. Choose fewer: NormAttention(dst=['last']), at most about {fit}, or "
            "LogitLens(positions='image', k=5)."
        )


def _picture(seen: Seen) -> bytes:
    """What the page shows first, as PNG: stands for it where scripts do not run."""
    heats = seen.heat(seen.start, seen.layer)
    top = max(float(h.max()) for h in heats) or 1.0
    with style():
        n = len(heats)
        figure = Figure((4.2 * n + 4.6, max(4.6, 0.21 * len(seen.lens.layers))), dpi=100, layout="constrained")
        *left, right = figure.subplots(1, n + 1, width_ratios=[4.2] * n + [4.6])
        for ax, image, grid, heat in zip(left, seen.pictures, seen.tokens.grids, heats, strict=True):
            x0, y0, x1, y1 = grid.crop_box
            veil = np.full((image.height, image.width, 1), 0.8)  # white over what the model does not see
            veil[max(0, round(y0)) : max(0, round(y1)), max(0, round(x0)) : max(0, round(x1))] = 0.35
            ax.imshow(np.asarray(image) / 255 * (1 - veil) + veil)
            mesh = ax.imshow(
                heat, extent=(x0, x1, y1, y0), cmap=HEAT, vmin=0, vmax=top, alpha=0.15 + 0.7 * np.sqrt(heat / top),
                interpolation="nearest",
            )  # fmt: skip
            ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="#444444", linewidth=0.8))
            ax.set_xlim(min(0, x0), max(image.width, x1))
            ax.set_ylim(max(image.height, y1), min(0, y0))
            ax.set_axis_off()
        figure.colorbar(
            mesh, ax=left, location="bottom", shrink=0.7, aspect=36, label="norm written (residual-stream units)"
        )
        piece = text(seen.tokens.strings[seen.dest[seen.start]], 16)
        left[0].set_title(f'What "{piece}" reads, layer {seen.layer}', fontsize=9.5)
        _words(right, seen)
        file = io.BytesIO()
        with warnings.catch_warnings():
            # Vocabularies know more scripts than one font does; the page itself has the reader's fonts.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _words(ax, seen: Seen) -> None:
    """The lens table of one visual token: words by layer, on the color of their probability."""
    at = int((seen.index[seen.lens.position.numpy()] == seen.point).nonzero()[0][0])
    probs, pieces = seen.lens.probs[:, at].numpy(), [layer[at] for layer in seen.lens.pieces()]
    ax.imshow(probs, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1.3)
    small = 7 if len(pieces) <= 16 else 6
    for row, words in enumerate(pieces):
        for col, word in enumerate(words):
            color = "white" if probs[row, col] > 0.75 else "#222222"
            ax.text(col, row, text(word, 11), ha="center", va="center", fontsize=small, color=color)
    if seen.maps is None:
        image, row, col = seen.tokens.cell(int(seen.order[seen.point]))
        ax.set_title(
            f"Logit lens: patch at row {row}, col {col}" + (f" of image {image}" if image else ""), fontsize=9.5
        )
    else:
        ax.set_title(f"Logit lens: query {seen.point}", fontsize=9.5)
    ax.set_yticks(range(len(pieces)), [str(layer) for layer in seen.lens.layers], fontsize=small)
    ax.set_xticks(range(seen.lens.ids.shape[2]), [f"top {k + 1}" for k in range(seen.lens.ids.shape[2])])
    ax.set_ylabel("state (0 = embeddings)")
    ax.grid(False)
