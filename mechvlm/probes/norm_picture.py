"""The picture of norm-based attention: sources by layer, or where the patches lie on the image."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.headings import short_name
from mechvlm.figures.image_map import image_map, on_grid
from mechvlm.figures.scale import clipped
from mechvlm.figures.style import color_bar, heatmap, position_ticks, text
from mechvlm.figures.token_axis import column_edges, mark_spans, name_columns, runs_of
from mechvlm.inputs.batch import Inputs, picture_of
from mechvlm.inputs.tokens import Modality


class NormPicture:
    """The plot of a `NormAttentionResult`, from its fields."""

    norm: Float[Tensor, "layer example dest src"]
    layers: tuple[int, ...]
    names: tuple[str, ...]
    model: str
    modality: Int[Tensor, "example src"] | None
    ids: Int[Tensor, "example src"] | None
    vocabulary: tuple[tuple[int, str], ...]
    cells: Int[Tensor, "example src 3"] | None

    @plots(lambda self, on="tokens", **_: (6, 5.2) if on == "image" else (8, 2.2 + 0.22 * len(self.layers)))
    def plot(
        self,
        canvas: Canvas,
        on: str = "tokens",
        layers: int | Sequence[int] | None = None,
        image: int = 0,
        inputs: Inputs | None = None,
    ) -> None:
        """What each source wrote to the first destination, by layer, or on the image.

        Of several examples it is the mean, if they share a prompt. Where a few cells are far beyond
        the others, such as those of an attention sink, the scale is clipped and the note says so.

        Args:
            on: "tokens" draws all layers; "image" the mean over layers, where the patches lie.
            layers: those of the image's mean, one or several; by default all.
            image: which of the prompt's images.
            inputs: those that were read; with them the heat lies over the picture.

        Raises:
            ValueError: for another `on`, for examples of different prompts, for the mean of several
                over a picture, where visual tokens have no row and column, or for a layer that is
                not there.
        """
        if on not in ("tokens", "image"):
            raise ValueError(f"on={on!r} was asked for: norms are drawn on 'tokens' or on the 'image'.")
        self._refuse_other_prompts(on)
        if on == "tokens":
            self._draw_layers(canvas)
        else:
            self._draw_on_image(canvas, layers, image, inputs)

    def _refuse_other_prompts(self, on: str) -> None:
        """Refuse a mean over examples whose positions hold other tokens, or other patches."""
        same = [self.modality if self.ids is None else self.ids, self.cells if on == "image" else None]
        if any((values != values[0]).any() for values in same if values is not None):
            raise ValueError(
                f"These {self.norm.shape[1]} examples have different prompts, or images of different shapes, so that a position "
                "holds another token in each: their mean says nothing. Draw one, plot(example=0), or all heads' shares, "
                "image_share().plot()."
            )

    @property
    def _note(self) -> str:
        n = self.norm.shape[1]
        return f"mean of {n} examples" if n > 1 else ""

    def _draw_layers(self, canvas: Canvas) -> None:
        ax, values = canvas.ax, self.norm[:, :, 0].mean(1).numpy()
        scale, kinds = clipped(values), self._kinds()
        edges = None if kinds is None else column_edges(kinds)
        mesh = heatmap(ax, values, list(self.layers), edges, cmap=scale.colors, vmin=0, vmax=scale.most)
        if edges is None or kinds is None:
            position_ticks(ax, list(range(values.shape[1])))
            ax.set_xlabel("source position")
        else:
            named = [i for i, kind in enumerate(kinds) if kind in ("text", "special")]
            name_columns(ax, (edges[:-1] + edges[1:])[named] / 2, [text(self._name(i), 12) for i in named])
            spans = [(first, last) for first, last, kind in runs_of(kinds) if kind == "image"]
            mark_spans(ax, [(edges[a], edges[b + 1], f"image ({b - a + 1} tokens)") for a, b in spans])
            ax.set_xlabel("source token")
        notes = (self._note, scale.sentence(self.layers, lambda i: f"{text(self._name(i), 16)} (position {i})"))
        canvas.head(
            f"Norm-based attention of {text(self.names[0], 24)}, {short_name(self.model)}",
            "\n".join(filter(None, notes)),
        )
        color_bar(ax, mesh, "norm written (residual-stream units)", scale.extend)

    def _kinds(self) -> list[str] | None:
        """What each source is, by the names of `Modality`; None in files of earlier versions."""
        return None if self.modality is None else [Modality(int(kind)).name.lower() for kind in self.modality[0]]

    def _name(self, position: int) -> str:
        """The token at a position of the first example, or the position's number."""
        return dict(self.vocabulary).get(-1 if self.ids is None else int(self.ids[0, position]), str(position))

    def _draw_on_image(
        self, canvas: Canvas, layers: int | Sequence[int] | None, image: int, inputs: Inputs | None
    ) -> None:
        if self.cells is None or not (self.cells >= 0).any():
            raise ValueError(
                "These visual tokens have no row and column: they are queries or a memory, or an earlier version saved this."
            )
        if inputs is not None and self.norm.shape[1] > 1:
            raise ValueError(
                f"The mean of {self.norm.shape[1]} examples lies on none of their pictures: leave `inputs` out, or draw one "
                "example, plot(on='image', example=0, inputs=inputs)."
            )
        chosen = self.layers if layers is None else (layers,) if isinstance(layers, int) else tuple(layers)
        if missing := sorted(set(chosen) - set(self.layers)):
            raise ValueError(
                f"Layers {missing} were asked for; this result holds {self.layers[0]} to {self.layers[-1]}."
            )
        rows = [self.layers.index(layer) for layer in chosen]
        heat = self.norm[rows, :, 0].mean((0, 1)).numpy()  # [src]
        grid = on_grid(heat, self.cells[0].numpy(), image)
        scale, (picture, area) = clipped(grid), picture_of(inputs, canvas.example or 0, image)
        mesh = image_map(canvas.ax, grid, picture, area, cmap=scale.colors, vmin=0, vmax=scale.most)
        over = f"layer {chosen[0]}" if len(chosen) == 1 else f"mean over {len(chosen)} layers"
        canvas.head(
            f"Norm-based attention of {text(self.names[0], 24)} to the image, {short_name(self.model)}",
            "\n".join(filter(None, (self._note, over, scale.sentence(range(len(grid)), "column {}".format, "row")))),
        )
        color_bar(canvas.ax, mesh, "norm written (residual-stream units)", scale.extend)
