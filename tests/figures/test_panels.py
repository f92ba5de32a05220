"""Panels of a paper's width: by their drawn boxes, nothing collapses, overlaps or is cut."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

import mechvlm as mv
from helpers.boxes import covered, outside, overlaps, smallest
from helpers.drawn import MAKERS
from helpers.images import noise_image

JOURNAL = {"font.size": 7, "axes.titlesize": 8, "axes.labelsize": 7}
LEFT = {"font.family": "serif", "font.size": 8, "axes.titlelocation": "left"}
FOURS = (
    ("norms", "contextualization", "head_map", "flow"), ("lens", "trace", "attribution", "patched"),
    ("memory", "shares", "localization", "controls"), ("head_sets", "ablation", "neurons", "pairs"),
    ("words", "queries", "phases", "lens of 576"),
)  # fmt: skip
"""Each kind once, in figures of four panels."""


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def assert_readable(figure, least: float = 0.4) -> None:
    assert overlaps(figure) == []
    assert outside(figure) == []
    assert covered(figure) == []
    assert smallest(figure) > least, "inches"


@pytest.mark.parametrize("kind", MAKERS)
def test_a_plot_of_its_own_size_is_readable(kind):
    assert_readable(MAKERS[kind]().plot().figure)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_plot_fits_the_column_of_a_journal(kind):
    with plt.rc_context(JOURNAL):
        figure = MAKERS[kind]().plot(figsize=(3.3, 5.5 if kind == "pairs" else 2.8)).figure
        assert_readable(figure, 0.3)


@pytest.mark.parametrize("kinds", FOURS)
@pytest.mark.parametrize("style", [{}, LEFT], ids=["default", "left"])
def test_four_panels_of_any_kind_are_readable(kinds, style):
    assert sorted(sum(FOURS, ())) == sorted(MAKERS)
    with plt.rc_context(style):
        figure = mv.figures.grid([MAKERS[kind]() for kind in kinds])
        assert figure.get_figwidth() == 7
        assert_readable(figure, 0.35)  # the small maps of neurons


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("style", [{}, {"font.family": "serif"}, JOURNAL])
def test_panels_across_a_page_are_readable(count, style):
    kinds = ["norms", "contextualization", "head_map", "flow"][:count]
    with plt.rc_context(style):
        figure = mv.figures.grid([MAKERS[kind]() for kind in kinds], figsize=(7, 2.9 * -(-count // 2)))
        assert_readable(figure)


def test_a_title_ends_before_the_next_panel():
    """The left panel has no neighbour at its left, so only the right one holds its title back."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.9), layout="constrained")
    MAKERS["contextualization"]().plot(left, title="a title of many words " * 4)
    figure.draw_without_rendering()
    box = left.title.get_window_extent()
    assert box.x1 <= (left.bbox.x1 + right.bbox.x0) / 2
    assert box.width > 0.7 * left.bbox.width, "and takes the room that it has"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_panels_in_a_column_are_readable(count):
    kinds = ["lens", "norms", "trace", "ablation"][:count]
    with plt.rc_context(JOURNAL):
        figure = mv.figures.grid([MAKERS[kind]() for kind in kinds], figsize=(3.3, 2.4 * count))
        lefts = [ax.get_subplotspec().colspan.start for ax in figure.axes if ax.get_label() != "<colorbar>"]
        assert lefts == [0] * count, "one column"
        assert_readable(figure)


def test_a_legend_moves_no_limits_that_the_user_sets():
    ax = MAKERS["flow"]().plot()
    ax.figure.draw_without_rendering()
    low, high = ax.get_legend().data
    assert ax.get_ylim()[1] > high, "room for the legend"
    assert all(tick <= high for tick in ax.get_yticks()), "and no ticks beside it"
    assert ax.get_yticks()[-1] > high - 0.3 * (high - low)
    ax.set_ylim(-100, 100)
    ax.figure.draw_without_rendering()
    assert ax.get_ylim() == (-100, 100)
    assert {-100, 0, 100} <= set(ax.get_yticks()), "the ticks are those of the limits again"


@pytest.mark.parametrize("width", [3.4, 3.46, 6.34])
def test_a_note_that_fits_only_once_it_is_broken_stays_broken(width):
    """At these widths each layout breaks the note's line or does not, by turns."""
    assert outside(MAKERS["head_map"]().plot(figsize=(width, 4)).figure) == []


def test_a_note_takes_no_width_from_a_map():
    """Its bar stands beside the map, however long the note above both is."""
    ax = MAKERS["head_map"]().plot(figsize=(4, 3))
    ax.figure.draw_without_rendering()
    bar = ax.collections[0].colorbar.ax
    assert (bar.bbox.x0 - ax.bbox.x1) / ax.figure.dpi < 0.2, "inches"


def test_the_test_sees_what_overlaps():
    figure, (left, right) = plt.subplots(1, 2, figsize=(3, 2))
    left.set_title("a title that is far too long for these axes")
    right.set_title("another one that is as long as the first")
    assert ("a title that is far too long for these axes", "another one that is as long as the first") in overlaps(
        figure
    )
    assert outside(figure)
    assert smallest(figure) == pytest.approx(min(left.bbox.width, left.bbox.height) / figure.dpi)
    left.plot([0, 1], [0, 1], label="a")
    left.set(xlim=(0, 1.25), ylim=(0, 1.25))
    left.legend(loc="upper right")
    assert covered(figure) == ["a title that is far too long for these axes"]
    left.legend(loc="upper left")
    assert covered(figure) == []


def test_each_result_is_drawn_into_its_own_panel():
    results = [MAKERS["contextualization"](), MAKERS["shares"](), MAKERS["flow"]()]
    figure = mv.figures.grid(results, columns=3, titles=["a", None, False])
    panels = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert [ax.get_title() for ax in panels] == ["a", "Attention to the image, llava-v1.6-mistral-7b-hf", ""]
    expected = results[0].inter.numpy().mean(1)
    assert panels[0].lines[0].get_ydata() == pytest.approx(expected, rel=1e-5)
    assert panels[1].collections[0].get_array().data == pytest.approx(results[1].image.numpy().mean((1, 3)), rel=1e-5)
    assert len(panels[2].lines) == 5
    x = [ax.get_position().x0 for ax in panels]
    assert x == sorted(x)
    assert len({round(y, 2) for y in (ax.get_subplotspec().rowspan.start for ax in panels)}) == 1


def test_functions_draw_too_and_what_is_neither_is_refused():
    norms, drawn = MAKERS["norms"](), []
    figure = mv.figures.grid([lambda ax: drawn.append(norms.plot(ax, on="image"))], columns=1)
    assert drawn[0].images[0].get_array().shape == (4, 4)
    assert drawn[0].figure is figure
    plt.close("all")
    for arguments, error in (
        (([],), ValueError), (([norms], 0), ValueError), (([norms], 1, None, ["a", "b"]), ValueError), (([3],), TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=r"grid\(\)"):
            mv.figures.grid(*arguments)
        assert plt.get_fignums() == []


# -- what is readable at 7B size -------------------------------------------------------------------


def test_a_lens_of_576_patches_writes_its_words_where_they_lie():
    result = MAKERS["lens of 576"]()
    ax = result.plot()
    ax.figure.draw_without_rendering()
    heat = ax.images[0].get_array()
    state = int(result.probs[:, :, 0].mean(1).argmax())
    np.testing.assert_allclose(heat, result.probs[state, :, 0].numpy().reshape(24, 24))
    words = {text.get_position(): text for text in ax.texts}
    assert len(words) == 576
    assert words[3.5, 2.5].get_text() == f"w{2 * 24 + 3}", "row 2, column 3"
    assert ax.get_ylim() == (24, 0)
    shown = [text for text in ax.texts if text.get_window_extent().width > 2]
    assert len(shown) == 576, "each cell has room for its word"
    assert f"state {state}" in ax.child_axes[0].get_xlabel()
    tokens = result.plot(on="tokens")
    assert tokens.images[0].get_array().shape == (8, 576)
    with pytest.raises(IndexError, match="State 99 was not read"):
        result.plot(on="image", state=99)
    with pytest.raises(ValueError, match="on='sky' was asked for"):
        result.plot(on="sky")


def test_norms_lie_on_the_image_as_its_patches_do():
    result = MAKERS["norms"]()
    expected = result.norm[:, :, 0, 3:19].mean((0, 1)).numpy().reshape(4, 4)
    ax = result.plot(on="image")
    np.testing.assert_allclose(ax.images[0].get_array(), expected, rtol=1e-5)
    assert ax.get_ylim() == (4, 0)
    one = result.plot(on="image", layers=3, example=1)
    np.testing.assert_allclose(one.images[0].get_array(), result.norm[3, 1, 0, 3:19].numpy().reshape(4, 4), rtol=1e-5)
    with pytest.raises(ValueError, match=r"Layers \[99\] were asked for; this result holds 0 to 15"):
        result.plot(on="image", layers=99)


def test_the_images_span_is_marked_and_words_are_named():
    ax = MAKERS["norms"]().plot()
    figure = ax.figure
    figure.draw_without_rendering()
    mesh = next(c for c in ax.collections if hasattr(c, "get_coordinates"))
    edges = mesh.get_coordinates()[0, :, 0]
    (strip,) = (p for p in ax.patches if p.get_x() == edges[3])
    assert strip.get_x() + strip.get_width() == pytest.approx(edges[19])
    top = ax.child_axes[0]
    assert [label.get_text() for label in top.get_xticklabels()] == ["image (16 tokens)"]
    assert top.get_xticks() == pytest.approx([(edges[3] + edges[19]) / 2])
    names = {
        round(float(at), 6): label.get_text() for at, label in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
    }
    assert names[round(float(edges[23] + edges[24]) / 2, 6)] == "heart"
    assert names[round(float(edges[0] + edges[1]) / 2, 6)] == "<s>"


def test_a_mean_over_different_prompts_is_refused():
    result = MAKERS["norms"]()
    result.ids[1, 21] = 0
    with pytest.raises(ValueError, match=r"5 examples have different prompts.*plot\(example=0\)"):
        result.plot()
    assert result.plot(example=1).get_title().startswith("Norm-based attention")


def test_a_mean_over_images_of_other_shapes_is_refused():
    """Where as many patches lie in other rows and columns, though the prompts are the same."""
    result = MAKERS["norms"]()
    row, col = result.cells[1, :, 1].clone(), result.cells[1, :, 2].clone()
    result.cells[1, :, 1], result.cells[1, :, 2] = col, row
    with pytest.raises(ValueError, match=r"images of different shapes.*plot\(example=0\)"):
        result.plot(on="image")
    assert result.plot().get_title().startswith("Norm-based attention"), "by token the mean is right"


def test_heat_and_words_lie_over_the_picture_that_was_read(llava_vlm):
    images = [noise_image(seed) for seed in (1, 2)]
    inputs = llava_vlm.inputs(images, ["What color?"] * 2)
    lens, norms = mv.read(llava_vlm, inputs, mv.LogitLens(), mv.NormAttention(dst="last"))
    left, top, right, bottom = inputs.token_maps[1].grids[0].crop_box
    for result in (lens, norms):
        ax = result.plot(on="image", example=1, inputs=inputs)
        picture, heat = ax.images
        np.testing.assert_array_equal(picture.get_array()[..., :3], np.asarray(inputs.images[1][0])[..., :3])
        assert list(heat.get_extent()) == [left, right, bottom, top]
    with pytest.raises(ValueError, match=r"The mean of 2 examples lies on none of their pictures"):
        norms.plot(on="image", inputs=inputs)
    with pytest.raises(ValueError, match=r"choose one, plot\(\.\.\., example"):
        lens.plot(on="image", inputs=inputs)


def test_a_sink_does_not_take_the_scale():
    from helpers.drawn import norms

    result = norms(sink=150.0)
    ax = result.plot()
    mesh = next(c for c in ax.collections if hasattr(c, "get_coordinates"))
    values = result.norm[:, :, 0].mean(1).numpy()
    rest = np.delete(values, 0, axis=1)
    assert mesh.get_clim()[1] <= rest.max(), "the scale is that of the other sources"
    assert mesh.get_clim()[1] > 0.5 * rest.max()
    assert mesh.colorbar.extend == "max"
    note = ax.child_axes[0].get_xlabel()
    assert f"beyond the scale (green): <s> (position 0) in layers 2–15, up to {values.max():.3g}" in note
    result.norm[7, :, :, 0] = 0.5
    result.norm[9, :, :, 20] = 70
    note = result.plot().child_axes[0].get_xlabel()
    assert "<s> (position 0), color (position 20) in layers 2–6, 8–15" in note
    even = norms().plot()
    mesh = next(c for c in even.collections if hasattr(c, "get_coordinates"))
    assert mesh.colorbar.extend == "neither"
    assert mesh.get_clim() == pytest.approx((0, float(norms().norm[:, :, 0].mean(1).max())))
    assert "beyond" not in even.child_axes[0].get_xlabel()
