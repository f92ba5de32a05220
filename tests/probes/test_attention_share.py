"""Shares of each head's attention against eager attention, and heads by their share."""

import pytest
import torch

import mechvlm as mv
from helpers.artists import note_of
from helpers.images import noise_image


@pytest.fixture(scope="module", params=["llava_vlm", "blip_vlm"])
def both(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def answered(both):
    """Two examples of other lengths with answers."""
    inputs = both.inputs([noise_image(0), noise_image(1)], ["what is this in the image", "a"])
    return inputs.answered(["a red circle and a cat", "so it is, yes and no"])


def eager(vlm, inputs):
    before = vlm.text_config._attn_implementation
    vlm.hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = vlm.hf(**vlm.encoding(inputs), output_attentions=True)
    finally:
        vlm.hf.set_attn_implementation(before)
    inner = out if getattr(out, "attentions", None) is not None else out["language_model_outputs"]
    return inner["attentions"]


def naive(rows, tokens, dest):
    """image, text, special and self of one example's rows [head dest src], by loops."""
    groups = [tokens.image, tokens.text, tokens.special]
    return torch.stack([
        torch.stack([*(rows[:, i, [p for p in g.tolist() if p != d]].sum(-1) for g in groups), rows[:, i, d]], -1)
        for i, d in enumerate(dest)
    ], 1)  # fmt: skip


def test_shares_are_sums_of_the_eager_attention(both, answered):
    dst = ["last_prompt", "answer"]
    with pytest.raises(ValueError, match="different numbers of positions"):
        mv.read(both, answered, mv.AttentionShare(dst))
    dst = ["last_prompt", "last", "last_image"]
    (shares,) = mv.read(both, answered, mv.AttentionShare(dst))
    assert shares.names == tuple(dst)
    for layer, weights in enumerate(eager(both, answered)):
        for row, tokens in enumerate(answered.token_maps):
            dest = [int(tokens.select(name)[0]) for name in dst]
            wanted = naive(weights[row][:, dest], tokens, dest)
            assert torch.allclose(shares.share[layer, row], wanted, atol=1e-5)
    assert torch.allclose(shares.share.sum(-1), torch.ones(()), atol=1e-5)
    assert torch.equal(shares.image, shares.share[..., 0])
    assert torch.equal(shares.group("self"), shares.share[..., 3])


def test_shares_of_norms_are_those_of_the_norms_by_head(both, answered):
    norms, of_norms, of_weights = mv.read(
        both, answered, mv.NormAttention(["last_prompt", "last"]), mv.AttentionShare(["last_prompt", "last"], of="norm"),
        mv.AttentionShare(["last_prompt", "last"]),
    )  # fmt: skip
    by_head = norms.norm_head
    for row, tokens in enumerate(answered.token_maps):
        dest = [tokens.select("last_prompt").item(), tokens.last]
        for layer in range(both.n_layers):
            rows = by_head[layer, row] / by_head[layer, row].sum(-1, keepdim=True)
            assert torch.allclose(of_norms.share[layer, row], naive(rows, tokens, dest), atol=1e-5)
    for of, wanted in (("norm", of_norms), ("weight", of_weights)):
        got = norms.image_share(of)
        assert torch.allclose(got.share, wanted.share, atol=1e-5)
        assert (got.of, got.names) == (of, wanted.names)


def test_a_boxes_share_is_that_of_its_patches(llava_vlm):
    inputs = llava_vlm.inputs([noise_image(0), noise_image(1)], ["what is this", "a"])
    boxes = [(0, 0, 30, 60), (20, 10, 56, 56)]
    (shares,) = mv.read(llava_vlm, inputs, mv.AttentionShare("last", boxes=boxes))
    for layer, weights in enumerate(eager(llava_vlm, inputs)):
        for row, (tokens, box) in enumerate(zip(inputs.token_maps, boxes, strict=True)):
            wanted = weights[row][:, tokens.last, tokens.pos_in_box(box)].sum(-1)
            assert torch.allclose(shares.box[layer, row, :, 0], wanted, atol=1e-5)
    assert list(shares.to_frame()["group"].unique()) == ["image", "text", "special", "self", "box"]
    table = shares.heads(2, by="box")
    best = shares.box.mean((1, 3)).flatten().argsort(descending=True)[:2]
    n_heads = shares.box.shape[2]
    assert [(r.layer, r.head) for r in table.itertuples()] == [divmod(int(i), n_heads) for i in best]


def test_results_of_batches_are_one_result(llava_vlm, tmp_path):
    images, prompts = [noise_image(i) for i in range(3)], ["what is this", "a", "what is in the image"]
    boxes = [(0, 0, 30, 60), (20, 10, 56, 56), (0, 0, 56, 56)]
    probe = mv.AttentionShare("last", boxes=boxes)
    (whole,) = mv.read(llava_vlm, llava_vlm.inputs(images, prompts), probe)
    (parts,) = mv.read(llava_vlm, llava_vlm.inputs(images, prompts, batch_size=2), probe)
    for name in ("share", "box"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=1e-5)
    parts.save(tmp_path / "shares.safetensors")
    assert torch.equal(mv.AttentionShareResult.load(tmp_path / "shares.safetensors").share, parts.share)
    norms = [mv.norm_attention(llava_vlm, batch, "last") for batch in llava_vlm.inputs(images, prompts, batch_size=2)]
    assert torch.allclose(mv.concat(norms).image_share("weight").share, whole.share, atol=1e-5)
    frame = whole.to_frame()
    assert len(frame) == whole.share.numel() + whole.box.numel()
    row = frame[(frame.layer == 1) & (frame.example == 2) & (frame["head"] == 1) & (frame.group == "text")]
    assert row["share"].item() == pytest.approx(float(whole.share[1, 2, 1, 0, 1]))


def test_the_map_of_heads_shows_the_means(llava_vlm, answered, both):
    (shares,) = mv.read(both, answered, mv.AttentionShare(["last", "last_image"]))
    ax = shares.plot(by="text")
    drawn = ax.collections[0].get_array().reshape(both.n_layers, -1)
    assert torch.allclose(torch.tensor(drawn.data), shares.group("text").mean((1, 3)), atol=1e-6)
    assert "2 destinations, means; n = 2 examples, means" in note_of(ax)


def test_a_head_that_copies_one_patch_comes_first():
    from helpers.copying import HEAD, LAYER, PATCH, copying, picture

    vlm = copying()
    inputs = vlm.inputs([picture("red"), picture("blue")], "what is this")
    row, col = divmod(PATCH, 4)
    box = (14 * col, 14 * row, 14 * col + 14, 14 * row + 14)
    (shares, parts, maps) = mv.read(
        vlm, inputs, mv.AttentionShare("last", boxes=[box, box]), mv.LogitAttribution(["red", "blue"]),
        mv.LocalizationHeads("last"),
    )  # fmt: skip
    for table in (shares.heads(1), shares.heads(1, by="box"), parts.top_heads(1), maps.heads(1, 1, skip_layers=0)):
        assert (table["layer"][0], table["head"][0]) == (LAYER, HEAD)
    assert float(shares.box[LAYER, :, HEAD].min()) > 0.999
    assert float(maps.entropy[LAYER, :, HEAD].max()) == 0


def test_bad_shares_are_refused(llava_vlm, blip_vlm):
    inputs = llava_vlm.inputs([noise_image(0), noise_image(1)], "what is this")
    for probe, kind, message in (
        (mv.AttentionShare(of="value"), ValueError, "of='value' was asked for: shares are of 'weight' or 'norm'"),
        (mv.AttentionShare(boxes=[(0, 0, 9, 9)]), mv.InputError, "1 boxes were given for 2 examples: give one each"),
        (mv.AttentionShare(boxes=[(0, 0, 30, 30), (0, 0, 1, 1)]), mv.InputError, "of example 1 holds no patch"),
    ):
        with pytest.raises(kind, match=message):
            mv.read(llava_vlm, inputs, probe)
    (shares,) = mv.read(llava_vlm, inputs, mv.AttentionShare())
    with pytest.raises(ValueError, match="A box is measured where `boxes` are given"):
        shares.heads(by="box")
    with pytest.raises(ValueError, match=r"There is no group 'patch'. Groups: image, text, special, self"):
        shares.group("patch")
    norms = mv.norm_attention(llava_vlm, inputs, "last")
    with pytest.raises(ValueError, match="of='x' was asked for"):
        norms.image_share("x")
    from dataclasses import replace

    with pytest.raises(ValueError, match="saved without what its positions hold"):
        replace(norms, modality=None).image_share()
    with pytest.raises(ValueError, match="There is no part 'mlps' of heads"):
        mv.logit_attribution(llava_vlm, inputs, "a").top_heads(part="mlps")
    queries = blip_vlm.inputs(noise_image(0), "a")
    with pytest.raises(ValueError, match="quer"):
        mv.read(blip_vlm, queries, mv.AttentionShare(boxes=[(0, 0, 9, 9)]))
