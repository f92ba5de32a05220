"""The patch view's data: they unpack to the results, match the inputs, and stay small."""

import base64
import dataclasses
import gzip
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mechvlm as mv
from helpers.images import noise_image
from helpers.patch_results import large_inputs, photo, synthetic, uneven
from mechvlm.errors import ViewError
from mechvlm.view import packing, patches
from mechvlm.view.example import match_example


def read(vlm, inputs, dst="last", positions="image"):
    return mv.read(vlm, inputs, mv.LogitLens(k=3, positions=positions), mv.NormAttention(dst=dst))


def data_of(view) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', view.body, re.S)[1])


def unpacked(text: str) -> bytes:
    return gzip.decompress(base64.b64decode(text))


def unzipped(raw: bytes, n_gaps: int, n_values: int, n_arrays: int, length: int) -> np.ndarray:
    """Arrays [n_arrays, length] of gaps and values, one value after the other."""
    assert len(raw) == n_gaps + n_arrays * n_values
    values = np.frombuffer(raw[n_gaps:], "u1").reshape(n_arrays, n_values).T
    out, at, taken = np.zeros((n_arrays, length), np.uint8), 0, 0
    for gap in raw[:n_gaps]:
        at += gap
        if gap < 255:
            out[:, at] = values[taken]
            at, taken = at + 1, taken + 1
    assert taken == n_values
    return out


def rows_of(data: dict, row: dict) -> tuple[np.ndarray, np.ndarray]:
    """A row as the page reads it.

    Values [2, layer, 1 + head, src] and shares [2, layer, 1 + head, group].
    """
    n_layers, n_heads, n = data["layers"], data["heads"], len(data["positions"])
    n_groups, visual, raw = len(data["images"]) + 2, data["visual"], unpacked(row["data"])
    n_gaps, n_values = np.frombuffer(raw[:8], "<u4").tolist()
    cuts = 8 + np.cumsum([0, 12 * n_layers * (n_heads + 1), 4 * n_layers * (n_heads + 1) * n_groups, 2 * n_layers * n])
    low, middle, high = np.frombuffer(raw[cuts[0] : cuts[1]], "u1").reshape(3, -1).astype(np.uint32)
    top = (low << 8 | middle << 16 | high << 24).view("f4").reshape(2, n_layers, n_heads + 1, 2)
    low, high = np.frombuffer(raw[cuts[1] : cuts[2]], "u1").reshape(2, -1).astype(int)
    share = (low + 256 * high).reshape(2, n_layers, n_heads + 1, n_groups) / 65535
    together = np.frombuffer(raw[cuts[2] : cuts[3]], "u1").reshape(2, n_layers, 1, n)
    heads = unzipped(raw[cuts[3] :], n_gaps, n_values, 2, n_layers * n_heads * n).reshape(2, n_layers, n_heads, n)
    heads[1] += heads[0]
    fine = 255 if row["levels"] == 255 else 127
    values = np.concatenate([(together / fine) ** 2, heads / row["levels"]], 2)
    values[..., :visual] *= top[..., :1]
    values[..., visual:] *= top[..., 1:]
    return values, share


def check_row(data, row, norms, tokens, example=0):
    """Values equal the result's to 0.4 % of each part's maximum; shares are ratios of sums."""
    positions = np.array(data["positions"])
    d = norms.dest[example].tolist().index(positions[row["source"]])
    weight = norms.weight[:, example, :, d].numpy()
    raw = np.concatenate([weight.mean(1, keepdims=True), weight], 1)
    norm = np.concatenate([norms.norm[:, example, None, d].numpy(), norms.norm_head[:, example, :, d].numpy()], 1)
    true = np.stack([raw, norm])
    values, share = rows_of(data, row)
    for part in (slice(0, data["visual"]), slice(data["visual"], None)):
        expected = true[..., positions[part]]
        assert (np.abs(values[..., part] - expected) <= 0.0041 * expected.max(-1, keepdims=True) + 1e-9).all()
    for group, where in enumerate([*tokens.images, tokens.text, tokens.special]):
        assert share[..., group] == pytest.approx(true[..., where.numpy()].sum(-1) / true.sum(-1), abs=2e-5)


def test_rows_words_and_positions_come_back(vlm):
    """Rows, shares, words and probabilities equal the results', padded and in both families."""
    inputs = vlm.inputs([noise_image(i) for i in range(2)], ["what is this", "describe the scene . a what is this"])
    lens, norms = read(vlm, inputs, dst=["last", "last_image"], positions="all")
    queries = not inputs.token_maps[0].patches
    reading = mv.query_reading(vlm, inputs) if queries else None
    for example, tokens in enumerate(inputs.token_maps):
        data = data_of(mv.view.patches(inputs, lens, norms, reading, example=example))
        assert sorted(data["positions"]) == tokens.all.tolist(), "no padding"
        assert data["positions"][: data["visual"]] == tokens.image.tolist()
        assert data["pieces"] == [tokens.strings[p] for p in data["positions"][data["visual"] :]]
        assert [data["positions"][row["source"]] for row in data["rows"]] == [tokens.last_image, tokens.last]
        assert data["rows"][data["start"]["row"]]["source"] == data["positions"].index(tokens.last)
        for row in data["rows"]:
            check_row(data, row, norms, tokens, example)

        own, raw = lens.of(example), unpacked(data["lens"]["data"])
        n_layers, n_points, k = own.ids.shape
        n = n_layers * n_points * k
        low, mid, high, chance = np.frombuffer(raw[: 4 * n], "u1").reshape(4, n_layers, k, n_points).astype(int)
        words, codes = json.loads(raw[4 * n :]), low | mid << 8 | high << 16
        assert [[[words[c] for c in point] for point in layer.T] for layer in codes] == [
            list(points.values()) for points in own.pieces().values()
        ]
        assert (chance / 255) ** 2 == pytest.approx(own.probs.transpose(1, 2).numpy(), abs=0.004)
        assert [data["positions"][s] for s in data["lens"]["sources"]] == own.position.tolist()

        if queries:
            raw, grid = unpacked(data["reading"]), tokens.grids[0]
            top = np.frombuffer(raw[: 4 * data["visual"]], "<f4")[:, None]
            maps = top * (np.frombuffer(raw[4 * data["visual"] :], "u1").reshape(data["visual"], -1) / 255) ** 2
            expected = reading.map[example].reshape(data["visual"], -1).numpy()
            assert maps.shape[1] == grid.rows * grid.cols
            assert maps == pytest.approx(expected, abs=0.004 * float(expected.max()))


def test_rows_of_uneven_images_come_back():
    """Each of four destinations, in which special tokens have a share of their own."""
    inputs, lens, norms = uneven()
    data = data_of(mv.view.patches(inputs, lens, norms))
    assert [data["positions"][row["source"]] for row in data["rows"]] == [13, 17, 19, 20]
    for row in data["rows"]:
        check_row(data, row, norms, inputs.tokens)


def test_the_heat_of_a_token_over_queries_is_what_it_wrote_times_where_they_read(blip_vlm):
    inputs = blip_vlm.inputs(noise_image(0), "what is this")
    lens, norms = read(blip_vlm, inputs)
    reading = mv.query_reading(blip_vlm, inputs)
    shown = match_example(inputs, lens, norms, reading, None)
    (heat,) = shown.heat(shown.first_pick, 1)
    expected = sum(
        norms.norm[1, 0, 0, p].item() * reading.map[0, q].numpy() for q, p in enumerate(inputs.tokens.image.tolist())
    )
    assert heat == pytest.approx(expected, rel=1e-5)


def test_patches_lie_where_the_grid_says(llava_vlm):
    """With two images that are not square: dividing the crop evenly gives the grid's boxes."""
    inputs = llava_vlm.inputs([[photo(90, 200), photo(200, 90)]], "what is this")
    data = data_of(mv.view.patches(inputs, *read(llava_vlm, inputs)))
    assert len(data["images"]) == 2
    for view, grid, image, picture in zip(
        data["views"], inputs.tokens.grids, data["images"], inputs.images[0], strict=True
    ):
        (x0, y0, x1, y1), rows, cols = view["crop"], view["rows"], view["cols"]
        assert tuple(image["size"]) == picture.size
        dx, dy = (x1 - x0) / cols, (y1 - y0) / rows
        for r, row in enumerate(grid.boxes().tolist()):
            for c, box in enumerate(row):
                assert [x0 + c * dx, y0 + r * dy, x0 + (c + 1) * dx, y0 + (r + 1) * dy] == pytest.approx(box, abs=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("spread", [1.5, 2.5])
def test_under_a_megabyte_at_the_size_of_7b(spread):
    """32 layers x 32 heads x 620 tokens, both measures, a lens of 576 patches, 640 x 480 pixels."""
    inputs = large_inputs()
    assert (len(inputs.tokens), len(inputs.tokens.image)) == (620, 576)
    lens, norms = synthetic(inputs, spread=spread)
    view = mv.view.patches(inputs, lens, norms)
    size = len(view.html().encode())
    data = data_of(view)
    print(f"spread {spread}: {size:,} bytes, single heads in {data['rows'][0]['levels']} steps")
    assert size < 1_000_000
    if spread == 2.5:
        assert data["rows"][0]["levels"] == 255
        check_row(data, data["rows"][0], norms, inputs.tokens)


@pytest.mark.long
def test_all_words_of_an_answer_of_60_tokens_under_12_megabytes():
    """Each word has less room than one alone, and its numbers are still right to 2.2 %."""
    inputs = large_inputs(answer=" ".join(["a red cat what is this scene dog"] * 8))
    lens, norms = synthetic(inputs, dest=tuple(inputs.tokens.writing.tolist()[:59]))
    view = mv.view.patches(inputs, lens, norms)
    size, data = len(view.html().encode()), data_of(view)
    levels = {row["levels"] for row in data["rows"] if "data" in row}
    print(f"{len(data['rows'])} rows, {size:,} bytes, single heads in {levels} steps")
    assert sum("data" in row for row in data["rows"]) == 60
    assert size < 12_000_000
    row = next(
        row for row in data["rows"] if {"word", "data"} <= row.keys() and len(data["answer"][row["word"]]["wrote"]) == 1
    )
    values, _ = rows_of(data, row)
    at = norms.dest[0].tolist().index(data["answer"][row["word"]]["wrote"][0])
    true = norms.norm_head[:, 0, :, at].numpy()[..., data["positions"]][..., : data["visual"]]
    error = np.abs(values[1, :, 1:, : data["visual"]] - true) / true.max(-1, keepdims=True)
    assert error.max() < 0.023


def test_rows_are_packed_under_a_bar(results, monkeypatch):
    labels = []
    monkeypatch.setattr(patches_module(), "track", lambda items, label: labels.append((len(items), label)) or items)
    mv.view.patches(*results)
    assert labels == [(2, "packing words")]


def test_steps_worked_by_hand():
    steps, top = packing.to_steps(np.array([[4.0, 1.0, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    # 255 x sqrt(1, 1/4, 1/16, 0), rounded to even.
    assert steps.tolist() == [[255, 128, 64, 0], [0, 0, 0, 0]]
    assert top.tolist() == [4, 0]


def test_large_images_are_reduced_and_the_smaller_format_is_taken():
    def format_and_size(url):
        kind, text = re.fullmatch(r"data:image/(\w+);base64,(.*)", url).groups()
        return kind, Image.open(io.BytesIO(base64.b64decode(text))).size

    assert format_and_size(packing.data_url(Image.new("RGB", (3000, 1500), "red"))) == ("png", (1024, 512))
    assert format_and_size(packing.data_url(photo(300, 200))) == ("jpeg", (300, 200))


def test_the_picture_stands_for_the_page(vlm):
    inputs = vlm.inputs(photo(80, 60), "what is this")
    reading = None if inputs.tokens.patches else mv.query_reading(vlm, inputs)
    view = mv.view.patches(inputs, *read(vlm, inputs), reading)
    with Image.open(io.BytesIO(view.picture)) as picture:
        assert picture.format == "PNG"
        assert picture.width > 600
        assert len(set(np.asarray(picture.convert("RGB")).reshape(-1, 3).tobytes()[::97])) > 50
    assert len(view.picture) < 300_000
    assert view.height > 400


# --- bad input


@pytest.fixture(scope="module")
def results(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    return inputs, *read(llava_vlm, inputs, dst=["last", 2])


def change(result, **fields):
    return dataclasses.replace(result, **fields)


def change_tensors(norms, to, **fields):
    return change(
        norms,
        **{f: to(getattr(norms, f)) for f in ("norm", "weight", "value_norm")},
        **dict.fromkeys(("modality", "divisor", "ids", "cells")),
        **fields,
    )


BAD = {
    "lens of another model": (
        lambda i, w, n: (i, change(w, model="other"), n),
        "different models: inputs of '.*', lens of 'other'",
    ),
    "another tokenizer": (
        lambda i, w, n: (i, change(w, vocabulary=((int(i.tokens.ids[-1]), "other"), *w.vocabulary)), n),
        "another tokenizer.*'other' there",
    ),
    "a batch in norms": (
        lambda i, w, n: (i, w, change_tensors(n, lambda x: torch.cat([x, x], 1), dest=n.dest.expand(2, -1))),
        "norms was not read from these inputs: it holds 2 example.*the inputs 1",
    ),
    "a batch in the lens": (lambda i, w, n: (i, change(w, example=w.example + 1), n), r"lens holds the examples \[1\]"),
    "fewer tokens in norms": (
        lambda i, w, n: (i, w, change_tensors(n, lambda x: x[..., 1:])),
        "norms was not read from these inputs: it holds 1 .* of .* tokens",
    ),
    "another place of the last": (lambda i, w, n: (i, w, change(n, dest=n.dest - 1)), "'last' is position .* there"),
    "lens beyond the end": (lambda i, w, n: (i, change(w, position=w.position + 30), n), "no tokens of this example"),
    "lens of text alone": (
        lambda i, w, n: (i, change(w, position=i.tokens.text[:1].expand(len(w.position))), n), "read no visual token",
    ),
    "more states than layers": (lambda i, w, n: (i, change(w, states=(0, 1, 2, 9)), n), "goes to state 9, norms to layer 2"),
    "no image": (lambda i, w, n: (change(i, images=((),)), w, n), "image of example 0 is gone.*0 of 1"),
    "no images at all": (lambda i, w, n: (change(i, images=()), w, n), "gone.*vlm.inputs"),
    "another image": (lambda i, w, n: (change(i, images=((photo(50, 50),),)), w, n), "50 x 50; the patches.*80 x 60"),
    "NaN": (lambda i, w, n: (i, w, change(n, norm=n.norm * torch.nan)), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_results_that_are_not_of_these_inputs(case, results):
    spoil, message = BAD[case]
    assert mv.view.patches(*results)
    with pytest.raises(ViewError, match=message):
        mv.view.patches(*spoil(*results))


def test_results_in_the_wrong_order(results):
    inputs, lens, norms = results
    # `patches` itself has annotations, which these tests check before it is called.
    with pytest.raises(ViewError, match=r"lens is a NormAttentionResult.*takes a LogitLensResult"):
        match_example(inputs, norms, lens, None, None)


def test_a_closed_image(llava_vlm, tmp_path):
    noise_image(0).save(tmp_path / "x.png")
    inputs = llava_vlm.inputs(tmp_path / "x.png", "what is this")
    inputs.images[0][0].close()
    lens, norms = read(llava_vlm, inputs)
    with pytest.raises(ViewError, match=r"is gone: it cannot be read.*vlm.inputs"):
        mv.view.patches(inputs, lens, norms)


def test_results_of_another_prompt(llava_vlm, results):
    """A longer one, and a batch."""
    longer = llava_vlm.inputs(noise_image(0), "what is this scene")
    lens, norms = read(llava_vlm, longer)
    with pytest.raises(ViewError, match="norms was not read from these inputs"):
        mv.view.patches(results[0], results[1], norms)
    padded = llava_vlm.inputs([noise_image(0)] * 2, ["a", "what is this"])
    lens, norms = read(llava_vlm, padded)
    with pytest.raises(ViewError, match=r"lens holds the examples \[0, 1\], the inputs 0 to 0"):
        mv.view.patches(results[0], lens, norms)


def test_which_example(llava_vlm):
    inputs = llava_vlm.inputs([noise_image(0), noise_image(1)], "a")
    lens, norms = read(llava_vlm, inputs)
    with pytest.raises(ViewError, match=r"2 examples.*example=0 to 1"):
        mv.view.patches(inputs, lens, norms)
    with pytest.raises(ViewError, match="Example 2 was asked for"):
        mv.view.patches(inputs, lens, norms, example=2)
    with pytest.raises(ViewError, match=r"lens holds the examples \[0\]"):
        mv.view.patches(inputs, lens.of(0), norms, example=1)


def test_reading_is_for_queries(results, blip_vlm):
    inputs = blip_vlm.inputs(noise_image(0), "what is this")
    lens, norms = read(blip_vlm, inputs)
    reading = mv.query_reading(blip_vlm, inputs)
    with pytest.raises(ViewError, match=r"also give where each one reads.*query_reading\(vlm, inputs\)"):
        mv.view.patches(inputs, lens, norms)
    with pytest.raises(ViewError, match=r"reading was made from other inputs.*\[1, 4, 4, 4\] there"):
        mv.view.patches(inputs, lens, norms, change(reading, weight=reading.weight[:, :, :4]))
    with pytest.raises(ViewError, match="leave it out"):
        mv.view.patches(*results, change(reading, model=results[1].model))


def test_a_page_over_the_limit_says_what_to_choose(results, monkeypatch):
    monkeypatch.setattr(patches_module(), "PAGE_LIMIT", 5_000)
    with pytest.raises(ViewError, match=r"0 MB, over the .*norms has 2 destinations.*NormAttention\(dst=\['last'\]\)"):
        mv.view.patches(*results)


@pytest.mark.long
def test_all_pairs_of_7b_are_refused_before_they_are_packed(monkeypatch):
    """The size of all destinations is estimated from the first ones."""
    inputs = large_inputs()
    lens, norms = synthetic(inputs, layers=8, heads=32)
    places = range(20, 620)
    many = {
        name: getattr(norms, name)[..., :1, :].expand(*getattr(norms, name).shape[:-2], 600, -1)
        for name in ("norm", "weight")
    }
    norms = change(norms, **many, dest=torch.tensor([[*places]]), names=tuple(map(str, places)))
    packed = []
    pack_rows = packing.pack_rows
    monkeypatch.setattr(packing, "pack_rows", lambda *a: packed.append(1) or pack_rows(*a))
    lens = change(lens, ids=lens.ids[:9], probs=lens.probs[:9], states=lens.states[:9])
    with pytest.raises(ViewError, match=r"The page would have 1?\d\d MB, over the 50 MB .* 600 destinations"):
        mv.view.patches(inputs, lens, norms)
    assert len(packed) < 3


def patches_module():
    """The module: `mechvlm.view.patches` is the function of the same name."""
    return sys.modules["mechvlm.view.patches"]


def test_the_view_is_a_function():
    assert callable(patches)
    assert mv.view.patches is patches
