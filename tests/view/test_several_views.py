"""Pictures of an image that the model sees in several views: apart and together, nothing lost."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers.several_views import SIZE, results, tokens_of
from mechvlm.inputs.views import AreaGrid, View
from mechvlm.view.drawn import added_up, drawn_views
from mechvlm.view.example import match_example
from mechvlm.view.pooling import cell_names, pool_attention, position_rows, token_groups


def test_every_view_has_its_heat():
    tokens = tokens_of()
    inputs, lens, norms = results(tokens)
    shown = match_example(inputs, lens, norms, None, None)
    start = int(tokens.image[0])
    whole, tile = shown.heat(shown.first_pick, 1)
    assert np.allclose(whole, norms.norm[1, 0, 0, start + 6 : start + 12].reshape(2, 3))
    assert np.allclose(tile, norms.norm[1, 0, 0, [start, start + 1, start + 3, start + 4]].reshape(2, 2))
    assert shown.sources.tolist() == [*range(9, 15), 3, 4, 6, 7, 1, 2, 15, 16, 5, 8]
    assert (shown.n_visual, shown.n_words, shown.first_pick.positions) == (10, 4, (16,))
    assert sorted(shown.groups[0].tolist()) == [*range(10), 14, 15], "shares count what has no place too"
    assert [shown.piece(p) for p in (5, 8, 16)] == ["line break", "line break", " w16"]


def test_views_that_overlap_lie_on_different_sheets():
    assert [(view.name, view.sheet) for view in drawn_views(tokens_of())] == [("thumbnail", 0), ("tile 0,1", 1)]
    assert [(view.name, view.sheet) for view in drawn_views(tokens_of(whole=False))] == [
        ("tile 0,0", 0),
        ("tile 0,1", 0),
    ]


def test_heats_are_added_up_where_views_overlap():
    views = drawn_views(tokens_of())
    heats = np.arange(1.0, 7).reshape(2, 3), 100 * np.arange(1.0, 5).reshape(2, 2)
    x, y = np.array([-5.0, 5, 25, 35, 55, 61]), np.array([10.0, 30, 41])
    total, count = added_up(views, heats, x, y)
    assert total.tolist() == [[0, 1, 2, 102, 203, 0], [0, 4, 5, 305, 406, 0], [0] * 6]
    assert count.tolist() == [[0, 1, 1, 2, 2, 0], [0, 1, 1, 2, 2, 0], [0] * 6]


def test_a_cell_without_a_token_has_no_heat():
    tokens = tokens_of()
    holed = View("thumbnail", AreaGrid(2, 3, SIZE, (0.0, 0.0, 60.0, 40.0)), torch.tensor([[6, -1, 8], [9, 10, 11]]))
    tokens = replace(tokens, layouts=(replace(tokens.layouts[0], views=(holed,)),))
    shown = match_example(*results(tokens), None, None)
    (heat,) = shown.heat(shown.first_pick, 0)
    assert heat[0, 1] == 0
    assert (np.delete(heat.flatten(), 1) > 0).all()
    assert shown.page_views()[0]["empty"] == [1]
    assert len(shown.sources) == 16, "its token is counted still"


def test_the_page_draws_all_views_and_names_what_has_no_place():
    page = mv.view.patches(*results(tokens_of())).html()
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])
    assert (data["visual"], data["n_words"], len(data["positions"])) == (10, 4, 16)
    assert data["pieces"][4:] == ["line break", "line break"]
    assert [(v["name"], v["rows"], v["cols"], v["sheet"], v["crop"]) for v in data["views"]] == [
        ("thumbnail", 2, 3, 0, [0, 0, 60, 40]), ("tile 0,1", 2, 2, 1, [30, 0, 60, 40]),
    ]  # fmt: skip
    assert data["rows"][0]["source"] == 15, "a line break that is a destination"


def test_an_image_never_seen_as_a_whole_is_drawn_in_its_parts():
    tokens = tokens_of(whole=False)
    with pytest.raises(ValueError, match=r"in 2 parts and never as a whole, so it has no one grid: take tokens\.views"):
        _ = tokens.grids
    inputs, lens, norms = results(tokens)
    shown = match_example(inputs, lens, norms, None, None)
    assert [heat.shape for heat in shown.heat(shown.first_pick, 0)] == [(2, 3), (2, 2)]
    assert mv.view.patches(inputs, lens, norms).picture


def test_pooled_cells_hold_every_token_once():
    tokens = tokens_of()
    names = cell_names(tokens, (2, 1))
    assert [names[p] for p in range(3, 15)] == [
        *["▦tile 0,1"] * 2, "▦breaks", *["▦tile 0,1"] * 2, "▦breaks", *["▦r0c0"] * 3, *["▦r1c0"] * 3,
    ]  # fmt: skip
    groups, member = token_groups(tokens, (2, 1))
    assert groups[2:6] == ["▦tile 0,1", "▦breaks", "▦r0c0", "▦r1c0"]
    assert member.sum(0).tolist() == [0, *[1] * 16]
    rows = torch.rand(17, 17)
    rows[:, 0] = 0
    assert torch.allclose(pool_attention(rows, member).sum(-1), (member / member.sum(1, keepdim=True)) @ rows.sum(-1))


def test_rows_follow_the_views():
    tokens = tokens_of()
    names, rows = position_rows(tokens, tokens.image.tolist())
    assert names == ["thumbnail, row 0", "thumbnail, row 1", "tile 0,1, row 0", "tile 0,1, row 1", "line breaks"]
    assert rows == [[6, 7, 8], [9, 10, 11], [0, 1], [3, 4], [2, 5]]
