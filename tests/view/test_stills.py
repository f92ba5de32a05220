"""The small pictures that stand for views, pixel by pixel: each value at its place.

Grids are not square, one image is padded and one is cut, and values fall on no axis alike.
"""

import io
import json
import re
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import mechvlm as mv
from helpers.patch_results import uneven
from mechvlm.figures.style import HEAT
from mechvlm.study.report import gallery
from mechvlm.view import previews
from mechvlm.view.example import match_example
from mechvlm.view.pooling import pool_attention, token_groups


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that were saved, in order."""
    figures, save = [], Figure.savefig

    def savefig(self, *args, **options):
        save(self, *args, **options)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def rgb(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float)


def pixel(picture: np.ndarray, ax, x: float, y: float) -> np.ndarray:
    """The picture's color where these axes have the point (x, y)."""
    across, up = ax.figure.transFigure.inverted().transform(ax.transData.transform((x, y)))
    return picture[int((1 - up) * picture.shape[0]), int(across * picture.shape[1])]


def color(name: str, share) -> np.ndarray:
    return 255 * np.array(mpl.colormaps[name](share))[..., :3]


def labels(ax, axis: str) -> dict[float, str]:
    ticks = getattr(ax, f"get_{axis}ticks")(), getattr(ax, f"get_{axis}ticklabels")()
    return {float(at): label.get_text() for at, label in zip(*ticks, strict=True)}


def shown(ax, axis: str) -> dict[float, str]:
    """The labels within the axis: matplotlib has empty ones beyond its ends."""
    return {tick: label for tick, label in labels(ax, axis).items() if label}


def texts(ax) -> dict[tuple[float, float], str]:
    return {text.get_position(): text.get_text() for text in ax.texts}


VEIL = 0.76
"""How much white lies over what the model does not see."""


def frame(image: np.ndarray, share: float) -> np.ndarray:
    """The image's color under the frame of a patch: its opacity is the share of the largest."""
    color = [0, 122, 92] if share < 0 else [214, 0, 108]
    return image * (1 - abs(share)) + np.array(color) * abs(share)


def frame_scale(grid) -> float:
    """The lines of a frame lie this much closer to the edge where cells are few."""
    return min(1, max(grid.rows, grid.cols) / 14)


def check_cell(picture: np.ndarray, ax, pixels: np.ndarray, grid, cell: tuple[int, int], share: float):
    """Inside its frame a patch is the image, and the frame has the patch's share."""
    left, upper, right, lower = grid.box(*cell)
    x, y = (left + right) / 2, (upper + lower) / 2
    assert pixel(picture, ax, x, y) == pytest.approx(pixels[int(y), int(x)], abs=6), cell
    # Between the white line and the inside: one of the picture's pixels lies on the frame alone.
    depth = min(right - left, lower - upper) * frame_scale(grid) * np.linspace(0.07, 0.24, 18)
    spots = np.array([pixel(picture, ax, x, lower - d) for d in depth])
    expected = frame(pixels[min(int(lower), len(pixels)) - 1, int(x)], share)
    assert np.abs(spots - expected).max(1).min() < 9, (cell, share)


# --- the patch view


@pytest.mark.parametrize("turned", [False, True])
def test_the_patch_views_picture(turned, saved):
    inputs, lens, norms = uneven(turned=turned)
    picture, tokens = rgb(mv.view.patches(inputs, lens, norms).picture), inputs.tokens
    *stages, words, bar = saved[-1].axes
    heats = [
        norms.norm[5, 0, 1, where].reshape(g.rows, g.cols) for where, g in zip(tokens.images, tokens.grids, strict=True)
    ]
    top = float(max(heat.max() for heat in heats))
    for ax, image, grid, heat in zip(stages, inputs.images[0], tokens.grids, heats, strict=True):
        pixels = np.asarray(image).astype(float)
        for r, c in np.ndindex(grid.rows, grid.cols):
            if grid.box(r, c)[3] <= image.height:
                check_cell(picture, ax, pixels, grid, (r, c), float(heat[r, c]) / top)
    wide, tall = (1, 0) if turned else (0, 1)
    # The image's right edge is cut: no heat, and paler.
    # Beyond the other image's lower edge there are frames alone.
    pale = np.asarray(inputs.images[0][tall]).astype(float)[200, 240] * (1 - VEIL) + 255 * VEIL
    assert pixel(picture, stages[tall], 240, 200) == pytest.approx(pale, abs=4)
    grid, share = tokens.grids[wide], float(heats[wide][1, 2]) / top
    left, upper, right, lower = grid.box(1, 2)
    depth = (lower - upper) * frame_scale(grid) * np.linspace(0.07, 0.24, 18)
    beyond = np.array([pixel(picture, stages[wide], (left + right) / 2, lower - d) for d in depth])
    assert np.abs(beyond - frame(np.full(3, 255.0), share)).max(1).min() < 9
    assert stages[0].get_title(loc="left") == 'What "it" looked at, layer 5'
    assert bar.get_xlim() == pytest.approx((0, top), rel=1e-5)
    assert bar.get_xlabel() == "frames: norm written (residual-stream units)"

    hottest = int(torch.cat([heat.flatten() for heat in heats]).argmax())
    image, row, col = tokens.cell(int(tokens.image[hottest]))
    assert words.get_title(loc="left") == f"Logit lens: patch at row {row}, col {col} of image {image}"
    assert labels(words, "y") == {float(i): str(state) for i, state in enumerate(lens.states)}
    assert labels(words, "x") == {float(k): f"top {k + 1}" for k in range(3)}
    assert not words.yaxis_inverted(), "the embeddings are lowest"
    assert texts(words) == pieces_at(lens, int(tokens.image[hottest]))
    for i, k in np.ndindex(6, 3):
        share = float(lens.probs[i, hottest, k]) / 1.3
        assert pixel(picture, words, k - 0.45, i - 0.3) == pytest.approx(color("Blues", share), abs=4)


def pieces_at(lens, position: int) -> dict[tuple[float, float], str]:
    """Words by their place on the picture: rank across, state up."""
    rows = lens.pieces().values()
    return {(k, i): piece.strip() for i, at in enumerate(rows) for k, piece in enumerate(at[position])}


def test_the_patch_views_picture_of_queries(saved):
    inputs, lens, norms, reading = uneven(patches=False)
    picture, tokens = rgb(mv.view.patches(inputs, lens, norms, reading).picture), inputs.tokens
    stage, words, bar = saved[-1].axes
    read = norms.norm[5, 0, 1, tokens.image]
    heat = torch.einsum("q,qrc->rc", read, reading.map[0])
    pixels = np.asarray(inputs.images[0][0]).astype(float)
    check_cell(picture, stage, pixels, tokens.grids[0], (0, 0), float(heat[0, 0] / heat.max()))
    check_cell(picture, stage, pixels, tokens.grids[0], (0, 2), float(heat[0, 2] / heat.max()))
    assert bar.get_xlim() == pytest.approx((0, float(heat.max())), rel=1e-5)
    assert words.get_title(loc="left") == f"Logit lens: query {int(read.argmax())}"
    assert texts(words) == pieces_at(lens, int(tokens.image[read.argmax()]))


@pytest.mark.parametrize("turned", [False, True])
def test_the_gallerys_picture(turned):
    """Every pixel, but for those on the edge of a line."""
    inputs, lens, norms = uneven(turned=turned)
    shown = match_example(inputs, lens, norms, None, None)
    grid, image = inputs.tokens.grids[0], inputs.images[0][0]
    heat = norms.norm[5, 0, 1, inputs.tokens.images[0]].reshape(grid.rows, grid.cols)
    drawn, small = np.asarray(gallery._heat(shown, shown.first_pick)).astype(float), image.copy()
    small.thumbnail((256, 256))
    assert drawn.shape[1::-1] == small.size == ((213, 256) if turned else (256, 128))
    pixels = np.asarray(small).astype(float)
    x = (np.arange(small.width) + 0.5) * image.width / small.width
    y = (np.arange(small.height) + 0.5) * image.height / small.height
    expected, known = np.zeros_like(pixels), np.zeros(pixels.shape[:2], bool)

    def between(left: float, top: float, right: float, bottom: float, edge: float) -> np.ndarray:
        across, down = (left + edge < x) & (x < right - edge), (top + edge < y) & (y < bottom - edge)
        return down[:, None] & across

    for r, c in np.ndindex(grid.rows, grid.cols):
        box, share = grid.box(r, c), float(heat[r, c] / heat.max())
        unit = min(box[2] - box[0], box[3] - box[1]) * frame_scale(grid)
        line = [between(*box, part * unit) for part in (0, 0.04, 0.09, 0.22)]
        for here, drawn_there in (
            (line[0] & ~line[1], pixels), (line[1] & ~line[2], pixels * (1 - share) + 255 * share),
            (line[2] & ~line[3], frame(pixels, share)), (line[3], pixels),
        ):  # fmt: skip
            expected[here] = drawn_there[here]
            known |= here
    unseen = ~between(*grid.crop_box, -2)
    expected[unseen] = pixels[unseen] * (1 - VEIL) + 255 * VEIL
    known |= unseen
    assert known.mean() > 0.9
    assert drawn[known] == pytest.approx(expected[known], abs=1.5)


# --- CircuitsVis's views


def test_the_picture_of_patterns(saved):
    """Pooled cells of both images: a source's column, a destination's row from the top."""
    inputs, _, norms = uneven(dest=range(21))
    tokens = inputs.tokens
    names, member = token_groups(tokens, (2, 1))
    assert [name for name in names if "▦" in name] == ["▦0:r0c0", "▦0:r1c0", "▦1:r0c0", "▦1:r1c0"]
    for measure in ("norm", "weight"):
        picture = rgb(mv.view.attention(inputs, norms, [3, 7], heads=[2], pool=(2, 1), measure=measure).picture)
        ax = saved[-1].axes[0]
        whole = norms.norm[3, 0] if measure == "norm" else norms.weight[3, 0].mean(0)
        values = pool_attention(whole, member).numpy()
        assert ax.yaxis_inverted()
        assert labels(ax, "x") == labels(ax, "y") == {float(i): name.strip() for i, name in enumerate(names)}
        for i, j in np.ndindex(*values.shape):
            expected = color(HEAT, float(values[i, j] / values.max()))
            assert pixel(picture, ax, j, i) == pytest.approx(expected, abs=4), (i, j)
        assert "layer 3 all" in ax.get_title(loc="left")


def test_the_picture_of_tokens(saved):
    """Values as frames of the patches and colors of the words, padding left out."""
    inputs, *_ = uneven()
    tokens = inputs.tokens
    values = torch.linspace(-1, 3, 21)[torch.randperm(21, generator=torch.Generator().manual_seed(3))]
    picture = rgb(mv.view.tokens(inputs, values).picture)
    *stages, ax, _ = saved[-1].axes
    most = float(values[tokens.image].abs().max())
    assert (values[tokens.image] < 0).any(), "else nothing is tested"
    for stage, image, where, grid in zip(stages, inputs.images[0], tokens.images, tokens.grids, strict=True):
        pixels = np.asarray(image).astype(float)
        for (r, c), value in np.ndenumerate(values[where].reshape(grid.rows, grid.cols).numpy()):
            if grid.box(r, c)[3] <= image.height:
                check_cell(picture, stage, pixels, grid, (r, c), float(value) / most)
        assert stage.get_title(loc="left") == f"value: at most {most:.3g}"
    words = [p for p in tokens.all.tolist() if p not in set(tokens.image.tolist())]
    most = float(values[words].abs().max())
    low, high = (np.array(end) * 0.58 + 255 * 0.42 for end in ((0, 122, 92), (214, 0, 108)))
    assert ax.yaxis_inverted()
    for number, position in enumerate(words):
        row, col = divmod(number, 8)
        share = float(values[position]) / most
        expected = 255 + abs(share) * ((high if share > 0 else low) - 255)
        assert pixel(picture, ax, col - 0.44, row - 0.4) == pytest.approx(expected, abs=5), position
        assert texts(ax)[col, row] == tokens.strings[position].strip()
    assert len(ax.texts) == len(words)


@pytest.mark.parametrize("measure", ["norm", "weight"])
def test_the_picture_of_one_row(measure, saved):
    inputs, _, norms = uneven()
    picture = rgb(mv.view.attention_row(inputs, norms, 17, measure=measure).picture)
    ax, real = saved[-1].axes[0], inputs.tokens.all
    values = norms.norm[:, 0, 3, real] if measure == "norm" else norms.weight[:, 0, :, 3, real].mean(1)
    (low, high), values = (float(values.min()), float(values.max())), values.numpy()
    for layer, j in np.ndindex(*values.shape):
        expected = color(HEAT, (values[layer, j] - low) / (high - low))
        assert pixel(picture, ax, j, layer) == pytest.approx(expected, abs=4), (layer, j)
    assert shown(ax, "y") == {float(i): str(i) for i in (0, 2, 4, 6, 8, 10)}
    assert not ax.yaxis_inverted()


def test_the_picture_of_words(saved):
    """Of 13 positions all, of 39 every third."""
    _, lens, _ = uneven()
    assert mv.view.topk(*uneven()[:2]).picture
    ax = saved[-1].axes[0]
    assert texts(ax) == {
        (col, row): lens.pieces()[state][p][0].strip()
        for row, state in enumerate(lens.states)
        for col, p in enumerate(lens.position.tolist())
    }
    many = replace(
        lens, position=torch.arange(39), example=torch.zeros(39, dtype=torch.long),
        ids=torch.cat([lens.ids, lens.ids.flip(1), lens.ids.flip(0)], 1), probs=lens.probs.repeat(1, 3, 1),
    )  # fmt: skip
    picture = rgb(previews.words(many))
    ax = saved[-1].axes[0]
    for row, col in np.ndindex(6, 13):
        assert texts(ax)[col, row] == dict(lens.vocabulary)[int(many.ids[row, 3 * col, 0])].strip()
        expected = color("Blues", float(many.probs[row, 3 * col, 0]))
        assert pixel(picture, ax, col - 0.45, row - 0.35) == pytest.approx(expected, abs=4)
    assert shown(ax, "x") == {float(i): str(3 * i) for i in range(0, 13, 2)}
    assert shown(ax, "y") == {float(i): str(state) for i, state in enumerate(lens.states)}
    assert ax.get_title(loc="left").endswith("(13 of 39 positions)")


def test_the_cells_over_the_images():
    """Three rows of patches in two cells: the first takes two; cells of padding lie outside."""
    inputs, _, norms = uneven(dest=range(21))
    body = mv.view.attention(inputs, norms, 3, heads=(), pool=2).body
    page = json.loads(re.search(r'json">(.*?)</script>', body)[1])
    boxes = [[tuple(view["crop"]) for view in page["views"] if view["image"] == image] for image in (0, 1)]
    assert boxes[0] == [(0, -25, 200, 75), (200, -25, 300, 75), (0, 75, 200, 175), (200, 75, 300, 175)]
    assert boxes[1] == [(25, 0, 125, 200), (125, 0, 225, 200), (25, 200, 125, 300), (125, 200, 225, 300)]
    assert [view["name"] for view in page["views"]] == ["r0c0", "r0c1", "r1c0", "r1c1"] * 2
    assert [page["units"][unit]["piece"] for unit in page["cells"]] == [
        f"{image}:r{r}c{c}" for image in (0, 1) for r in (0, 1) for c in (0, 1)
    ]
