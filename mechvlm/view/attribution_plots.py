"""The pictures of what was written toward an answer: by layers and heads, and by neurons."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.gridspec import GridSpec, SubplotSpec
from matplotlib.ticker import MaxNLocator

from mechvlm.intervals import mean_interval
from mechvlm.probes.logit_attribution import LogitAttributionResult
from mechvlm.probes.neurons import MultimodalNeuronsResult
from mechvlm.view.plots import Line, axes, draw, layer_axis, style, text

PARTS = {
    "embed": Line("embedding", "#444444", "", "D"),
    "image": Line("attention to the image", "#0072B2", "-", "o"),
    "rest": Line("attention to the rest", "#E69F00", "--", "s"),
    "mlp": Line("MLP", "#009E73", "-.", "^"),
}
SIGNED = "RdBu_r"  # told apart by the color-blind


@draw.register
def _(result: LogitAttributionResult, ax: Axes | None = None) -> Axes:
    """What the parts of each layer wrote, and above it each head; means over examples with their 95 % intervals.

    W_O's bias, where there is one, is drawn with the attention to the rest.
    """
    with style():
        n_layers, n_examples, n_heads = result.heads.shape
        tall = min(0.9 + 0.14 * n_heads, 3.5)
        ax = axes(ax, width=6.6, height=3.2 + tall)
        top = _above(ax, tall / 3)
        values = {
            "embed": result.embed[:, None],
            "image": result.from_image.sum(-1).T,
            "rest": (result.from_rest.sum(-1) + result.attn_bias).T,
            "mlp": result.mlps.T,
        }
        ax.axhline(0, color="#888888", linewidth=0.8)
        for number, (part, found) in enumerate(values.items()):
            mean, low, high = (x.numpy() for x in mean_interval(found))
            layers = np.zeros(1) if part == "embed" else np.arange(1, n_layers + 1) + (number - 2) * 0.12
            line = PARTS[part]
            ax.errorbar(
                layers, mean, yerr=None if n_examples < 2 else np.clip([mean - low, high - mean], 0, None), color=line.color,
                linestyle=line.dash, marker=line.marker, label=line.label, linewidth=1.3, elinewidth=1, capsize=2,
            )  # fmt: skip
        layer_axis(ax, n_layers)
        ax.set_ylabel("written toward it (logits)")
        ax.legend(ncols=2)

        heads = result.interval("heads")
        mesh = top.pcolormesh(
            np.arange(n_layers + 1) + 0.5, np.arange(n_heads + 1) - 0.5, heads.mean.T.numpy(), cmap=SIGNED,
            norm=CenteredNorm(), rasterized=True,
        )  # fmt: skip
        sure = ((heads.low > 0) | (heads.high < 0)).nonzero().numpy()
        size = 9 if n_layers * n_heads < 400 else 2
        top.scatter(sure[:, 0] + 1, sure[:, 1], s=size, color="#222222", edgecolors="white", linewidths=0.4)
        top.tick_params(labelbottom=False)
        top.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        top.set_ylabel("head")
        top.grid(False)
        ax.figure.colorbar(mesh, ax=top, label="logits", pad=0.01)
        over = f"mean of {n_examples} examples with 95 % intervals; a dot where it leaves out 0"
        title = f"Logit attribution: {_toward(result)}, {result.model}"
        top.set_title(f"{title}\n{over}" if n_examples > 1 else title, fontsize=8.5)
    return ax


@draw.register
def _(result: MultimodalNeuronsResult, ax: Axes | None = None) -> Axes:
    """Each neuron's attribution with its words, and where on the image it fires in the example where it did most."""
    with style():
        n_examples, n_neurons = result.attribution.shape
        ax = axes(ax, width=7.5, height=1.1 + 0.52 * n_neurons)
        side = _right(ax, 0.3)
        mean, low, high = (x.numpy() for x in result.interval)
        rows = np.arange(n_neurons)
        ax.barh(rows, mean, height=0.5, color=PARTS["mlp"].color, alpha=0.8)
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
        names = zip(result.layer.tolist(), result.index.tolist(), result.words, strict=True)
        words = [f"layer {layer}, {i}\n" + " ".join(text(w, 10) for w in piece[:5]) for layer, i, piece in names]
        ax.set_yticks(rows, words, fontsize=7)
        ax.set_ylim(n_neurons - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_ylabel("MLP neuron, and the words it writes")
        ax.set_xlabel("attribution on the image (logits)" + (", 95 % intervals" if n_examples > 1 else ""))
        ax.set_title(f"Multimodal neurons for {_toward(result)}, {result.model}", fontsize=8.5)

        # As many small maps as there are neurons, each to its own maximum: how strongly each fires is not compared.
        best = result.attribution.argmax(0)
        shown = result.maps if result.grid else result.activation[:, :, None]
        for row, example in enumerate(best.tolist()):
            one = shown[example, row].numpy()
            most = np.nanmax(np.abs(one)) or 1.0
            half = 0.44 if result.grid else 0.2
            extent = (0.0, 1.0, row + half, row - half)
            side.imshow(one, extent=extent, cmap=SIGNED, vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
            side.text(1.05, row, f"±{most:.2g}\nexample {example}", fontsize=6, va="center")
        side.set_xlim(0, 1.5)
        side.set_ylim(n_neurons - 0.5, -0.5)
        side.set_xticks([])
        side.tick_params(labelleft=False, left=False)
        side.grid(False)
        side.set_frame_on(False)
        side.set_xlabel("activation" if result.grid else "activation, by query", fontsize=8)
    return ax


def _above(ax: Axes, share: float) -> Axes:
    """New axes over `ax`, `share` as high as it, on the same x: they part the room that `ax` had."""
    grid = _room(ax).subgridspec(2, 1, height_ratios=(share, 1))
    ax.set_subplotspec(grid[1])
    return ax.figure.add_subplot(grid[0], sharex=ax)


def _right(ax: Axes, share: float) -> Axes:
    """New axes to the right of `ax`, `share` as wide as it, on the same y: they part the room that `ax` had."""
    grid = _room(ax).subgridspec(1, 2, width_ratios=(1, share))
    ax.set_subplotspec(grid[0])
    return ax.figure.add_subplot(grid[1], sharey=ax)


def _room(ax: Axes) -> SubplotSpec:
    """The cell of the grid in which `ax` stands; where it was put by hand, one around it."""
    at = ax.get_position()
    edges = {"left": at.x0, "right": at.x1, "bottom": at.y0, "top": at.y1}
    return ax.get_subplotspec() or GridSpec(1, 1, figure=ax.figure, **edges)[0]  # type: ignore[arg-type]


def _toward(result: LogitAttributionResult | MultimodalNeuronsResult) -> str:
    """What was measured, in words: the answer where all examples have the same."""
    answers, versus = set(result.answers), set(getattr(result, "versus", ()))
    shown = text(answers.pop(), 12) if len(answers) == 1 else "each example's answer"
    if versus:
        shown += f" less {text(versus.pop(), 12) if len(versus) == 1 else 'another'}"
    return shown
