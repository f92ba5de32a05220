"""Causal tracing: corrupt the image or the words, restore a few clean states, and see how much of the answer comes back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.experiments.cases import Example, Examples, each, positions
from mechvlm.experiments.sweep import Edit, run, sweep, windows
from mechvlm.figures.headings import ALONE, INTERVAL, heading, n_examples, number, short_name, window_width
from mechvlm.figures.style import LAYER, SIGNED, axes, heatmap, style, text
from mechvlm.inputs.batch import Answers, Inputs
from mechvlm.inputs.tokens import Modality
from mechvlm.intervals import Interval, mean_interval
from mechvlm.results import Result, long_frame
from mechvlm.tracing.interventions import patch
from mechvlm.vlm.vlm import VLM

CORRUPTIONS = ("noise", "image", "blank", "words")
RESTORED_SITES = ("resid_pre", "attn_out", "mlp_out")
GROUPS = ("image", "question", "last")
NOISE = 3.0
"""Standard deviations of the embeddings, as in Meng et al. 2022."""


CORRUPTED = {
    "noise": "noise on the image", "image": "image exchanged", "blank": "image greyed out", "words": "noise on the words",
}  # fmt: skip


TOTAL = 0.5
"""How wide the total effect's cell is; a group's is 1."""


CENTERED: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}


@dataclass(frozen=True, repr=False)
class CausalTraceResult(Result):
    """How much of the answer a few clean states bring back into a corrupted forward.

    Attributes:
        p: of the answer's first token, undisturbed.
        p_corrupt: with the image or the words corrupted.
        p_restored: corrupted, with a group's states restored in the window around each layer.
        groups: names of the groups of positions.
        layers: layers as states: with at="resid_pre" l is the state that enters the decoder's layer l (0: the
            embeddings), else 1 to n_layers is the layer that wrote.
        windows: (first, last + 1) of each window, as indices of the decoder's layers.
        at, corrupt: the site that is restored, and what was corrupted.
        answers: the tokens whose probability is measured, as the tokenizer's pieces.
        model: the model's name.
    """

    units: ClassVar[str] = "probability of the answer brought back"

    p: Float[Tensor, " example"]
    p_corrupt: Float[Tensor, " example"]
    p_restored: Float[Tensor, "layer group example"]
    groups: tuple[str, ...]
    layers: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    at: str
    corrupt: str
    answers: tuple[str, ...]
    model: str

    @property
    def effect(self) -> Float[Tensor, "layer group example"]:
        """The indirect effect: p_restored - p_corrupt, a difference of probabilities (Meng et al. 2022)."""
        return self.p_restored - self.p_corrupt

    @property
    def interval(self) -> Interval:
        """The mean effect over examples [layer group] with its 95 % bootstrap interval."""
        return mean_interval(self.effect.movedim(-1, 0))

    @property
    def total_effect(self) -> Float[Tensor, " example"]:
        """p - p_corrupt: what the corruption took, and a full restoration brings back."""
        return self.p - self.p_corrupt

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, group and example: p, p_corrupt, p_restored and effect."""
        axes = {"layer": self.layers, "group": self.groups, "example": range(len(self.p))}
        frame = long_frame(self.p_restored, **axes).rename(columns={"value": "p_restored"})
        for name in ("p", "p_corrupt"):
            frame[name] = getattr(self, name).numpy()[frame["example"]]
        return frame.assign(effect=frame["p_restored"] - frame["p_corrupt"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """The mean effect by layer and group, hatched where its interval holds 0; the last column is the total effect."""
        found, total = self.interval, mean_interval(self.total_effect)
        n_layers, n_groups = found.mean.shape
        # A gap, and then the total as one cell of the map's height: on the same colors, the most that can come back.
        gap, column = np.full((n_layers, 1), np.nan), np.full((n_layers, 1), float(total.mean))
        shown = np.concatenate([found.mean.numpy(), gap, column], axis=1)
        start, stop = n_groups - 0.3, n_groups - 0.3 + TOTAL
        edges = np.append(np.arange(n_groups + 1) - 0.5, [start, stop])
        most = float(np.nanmax(np.abs(shown), initial=1e-6))
        digits = min(max(2, 1 - int(np.floor(np.log10(most)))), 6)
        with style():
            ax = axes(ax, width=max(6.4, 3.2 + 0.8 * n_groups), height=1.9 + min(0.3 * n_layers, 2.4 + 0.15 * n_layers))
            mesh = heatmap(ax, shown, self.layers, edges, cmap=SIGNED, vmin=-most, vmax=most)
            extent = ax.get_window_extent()
            wide, high = extent.width / ax.figure.dpi / (stop + 0.5), extent.height / ax.figure.dpi / n_layers
            for row, group in np.ndindex(n_layers, n_groups):
                value, none = float(found.mean[row, group]), holds_0(found, row, group)
                if none:
                    hatch(ax, group - 0.5, row - 0.5, 1, 1)
                if wide > 0.3 and high > 0.12 and not np.isnan(value):
                    color = ink(value / most, "#666666" if none else "#222222")
                    ax.text(group, row, number(value, digits), color=color, **CENTERED)
            if holds_0(total):
                hatch(ax, start, -0.5, TOTAL, n_layers)
            ends = "" if total.low.isnan() else f"\n[{number(total.low, digits)}, {number(total.high, digits)}]"
            ax.text(
                (start + stop) / 2, (n_layers - 1) / 2, number(total.mean, digits) + ends, rotation=90,
                color=ink(float(total.mean) / most, "#222222"), **CENTERED,
            )  # fmt: skip
            names = [text(group, 24) for group in self.groups]
            ax.set_xticks([*range(n_groups), (start + stop) / 2], [*names, "total effect"])
            ax.tick_params(axis="x", length=0)
            if max(map(len, names)) * 0.08 > wide:  # inches
                for label in ax.get_xticklabels():
                    label.set(rotation=30, ha="right", rotation_mode="anchor")
            ax.spines[:].set_visible(False)
            ax.set_ylabel(LAYER)
            ax.set_xlabel(f"positions whose {self.at} was restored")
            several = f"{n_examples(self.effect)}, means; hatched: the {INTERVAL} holds 0"
            heading(
                ax, f"Causal trace, {short_name(self.model)}: {CORRUPTED[self.corrupt]}",
                f"{self.at} restored {window_width(self.windows)}\n{several if len(self.p) > 1 else ALONE}",
            )  # fmt: skip
            bar = ax.figure.colorbar(mesh, ax=ax, label=self.units, pad=0.03)
            bar.outline.set_visible(False)
            bar.ax.set_ylim(min(0, float(np.nanmin(shown, initial=0))), most)
        return ax


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
    for value, known, what in ((corrupt, CORRUPTIONS, "corruption"), (at, RESTORED_SITES, "site to restore")):
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
        answers=vlm.to_str_tokens(torch.tensor(tokens)), model=vlm.name,
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


def holds_0(found: Interval, *at: int) -> bool:
    return bool(found.low[at] <= 0 <= found.high[at])


def ink(share: float, dark: str) -> str:
    """What can be read on a color that is this share of the darkest."""
    return "white" if abs(share) > 0.6 else dark


def hatch(ax: Axes, x: float, y: float, width: float | int, height: int) -> None:
    ax.add_patch(Rectangle((x, y), width, height, fill=False, hatch="////", edgecolor="#d2d2d2", linewidth=0))
