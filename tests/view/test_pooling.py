"""Tokens as views show them: readable pieces, cells of the image, groups, and pooled maps."""

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from mechvlm.view.pooling import cell_names, pool_attention, readable, token_groups


@pytest.fixture(scope="module")
def patch_inputs(llava_vlm):
    """Two examples of different lengths."""
    return llava_vlm.inputs([noise_image(0), noise_image(1)], ["what is this", "a long question , is it not ? <b>"])


@pytest.fixture(scope="module")
def query_inputs(blip_vlm):
    return blip_vlm.inputs(noise_image(0), "what is this")


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        (" the", " the"), ("\n", "⏎"), ("A", "A"), ("\ufffd", "\ufffd"), ("  ", "␣␣"), ("Ġgant", "Ġgant"),
        ("", ""), ("<s>", "<s>"), ("\t", "⇥"), ("\u202e", "U+202E"), ("\u2028", "U+2028"), ("\x00", "U+0000"),
        ("👩\u200d🚀", "👩\u200d🚀"), ("שלום", "שלום"),
    ],
)  # fmt: skip
def test_pieces_are_readable(piece, shown):
    assert readable(piece) == shown


def test_cells_by_hand():
    vlm = mv.load(*llava())
    tokens = vlm.inputs(noise_image(0), "what").tokens  # 4 x 4 patches
    start = int(tokens.image[0])
    two = cell_names(tokens, (2, 4))
    assert [two[start + i] for i in (0, 3, 4, 8, 15)] == ["▦r0c0", "▦r0c3", "▦r0c0", "▦r1c0", "▦r1c3"]
    three = cell_names(tokens, 3)  # 4 patches in 3 cells: the first takes two
    assert [three[start + i] for i in range(4)] == ["▦r0c0", "▦r0c0", "▦r0c1", "▦r0c2"]


@pytest.mark.parametrize("pool", [None, 1, 2, 3, (1, 4), (4, 1)])
def test_every_token_is_in_one_group(pool, patch_inputs, query_inputs):
    for inputs in (patch_inputs, query_inputs):
        if isinstance(pool, tuple) and not inputs.token_maps[0].patches:
            continue
        for tokens in inputs.token_maps:
            names, member = token_groups(tokens, pool)
            assert member.sum(0).nonzero().flatten().tolist() == tokens.all.tolist()
            assert member.sum(0).max() == 1
            assert len(names) == len(member)
            text = [readable(tokens.strings[p]) for p in tokens.all.tolist() if p not in tokens.image.tolist()]
            assert [n for n in names if n[0] not in "▦q"] == [t for t in text if t[0] not in "▦q"]


def test_groups_of_queries_are_named_by_their_queries(query_inputs):
    tokens = query_inputs.tokens
    assert token_groups(tokens, 2)[0][:2] == ["q0–2", "q3–4"]
    assert token_groups(tokens, None)[0][:5] == ["q0", "q1", "q2", "q3", "q4"]
    names, member = token_groups(tokens, 3)
    assert names[:3] == ["q0–1", "q2–3", "q4"]
    assert [row.nonzero().flatten().tolist() for row in member[:3]] == [[0, 1], [2, 3], [4]]


def test_images_of_one_prompt_have_their_own_cells(llava_vlm):
    tokens = llava_vlm.inputs([[noise_image(0), noise_image(1)]], "what").tokens
    names, _ = token_groups(tokens, (1, 2))
    assert [n for n in names if "▦" in n] == ["▦0:r0c0", "▦0:r0c1", "▦1:r0c0", "▦1:r0c1"]


def test_pooling_by_hand():
    values = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
    member = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    assert torch.allclose(pool_attention(values, member), torch.tensor([[1.0, 0], [0.35, 0.65]]))
