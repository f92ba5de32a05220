"""A forward that starts mid-way equals a whole one, and computes no more than it must."""

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.forwards import forward
from helpers.images import noise_image
from mechvlm.decoder.attended import projections_of
from mechvlm.experiments import sweep as sweep_module
from mechvlm.experiments.sweep import Edit, run, sweep, windows
from mechvlm.families.table import load_table


def test_windows_lie_around_each_layer():
    assert windows(5, 1) == [range(i, i + 1) for i in range(5)]
    assert windows(5, 3) == [range(0, 2), range(0, 3), range(1, 4), range(2, 5), range(3, 5)]
    assert windows(4, 2) == [range(0, 2), range(1, 3), range(2, 4), range(3, 4)]
    assert windows(3, 99) == [range(3)] * 3
    with pytest.raises(ValueError, match="A window of 0 layers"):
        windows(3, 0)


def test_a_run_is_the_models_own_forward(deep, three):
    example = three[1]
    clean = run(deep, example, keep="mlp_out")
    with torch.no_grad():
        out = deep.hf(**deep.encoding(example), output_hidden_states=True)
    torch.testing.assert_close(clean.logits, out.logits[0, -1])
    torch.testing.assert_close(run(deep, example, embeddings=clean.resid[0]).logits, out.logits[0, -1])
    assert [x.shape for x in clean.kept] == [x.shape for x in clean.resid]


@pytest.mark.parametrize(("tokens", "rows"), [(1, 8), (7, 8), (512, 2), (512, 64)])
def test_a_sweep_equals_whole_forwards(deep, three, monkeypatch, tokens, rows):
    """Skipped layers, cached prefixes and rows that share a forward change no result."""
    monkeypatch.setattr(sweep_module, "TOKENS_PER_FORWARD", tokens)
    monkeypatch.setattr(sweep_module, "ROWS_PER_FORWARD", rows)
    example = three[1]
    tokens = example.tokens
    direction = torch.randn(deep.d_model, generator=torch.Generator().manual_seed(0))
    places = (int(tokens.image[0]), tokens.last - 2, tokens.last)
    edits = [Edit((pos, start), range(start, min(5, start + 2)), pos) for pos in places for start in range(5)]
    clean = run(deep, example)

    def change(layer, rows):
        pos = [[0] if layer in edit.layers else None for edit in rows]
        if any(pos):
            mv.steer(deep, direction, pos, layer, at="mlp_out")

    got = sweep(deep, clean, edits, change)
    for edit in edits:
        with torch.no_grad(), deep.trace(example, logits_to_keep=1):
            mv.steer(deep, direction, edit.pos, edit.layers, at="mlp_out")
            want = nnsight.save(deep.logits)
        torch.testing.assert_close(got[edit.key], want[0, -1], rtol=1e-5, atol=2e-6)
        # In the last layer no other position reads what an edit writes.
        if edit.layers.start < 4 or edit.pos == tokens.last:
            assert (got[edit.key] - clean.logits).abs().max() > 1e-3


def test_tokens_that_see_later_ones_are_computed_again():
    """PaliGemma's image tokens see each other: an edit of the third changes the first."""
    vlm = mv.load(*families.build("paligemma"))
    inputs = vlm.inputs(families.picture(60, 44, seed=0), "what is this")
    direction = 20 * torch.randn(vlm.d_model, generator=torch.Generator().manual_seed(0))
    third, last = int(inputs.tokens.image[2]), inputs.tokens.last
    edits = [Edit((pos,), range(1), pos) for pos in (third, last)]

    def change(layer, rows):
        if layer == 0:  # positions count from the first one that is computed
            mv.steer(vlm, direction, [[edit.key[0] - edit.pos] for edit in rows], layer)

    got = sweep(vlm, run(vlm, inputs), edits, change)
    for pos in (third, last):
        want = forward(vlm, inputs, lambda pos=pos: mv.steer(vlm, direction, pos, 0))
        torch.testing.assert_close(got[pos,], want[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", families.cases(memories=False))
def test_edits_behind_an_attention_leave_it_as_it_was(name):
    """In every family: z and what the MLP adds are changed, and the attention is the kept one."""
    row = load_table()[name]
    if "refused" in row or row["methods"]["ablation of every head"]:
        pytest.skip("it is refused")
    vlm = mv.load(*families.build(name))
    inputs = vlm.inputs(families.picture(60, 44, seed=0), "what is this")
    layers = [layer for layer in range(vlm.n_layers) if vlm.layer_parts[layer].kind.attention is not None]
    places = (int(inputs.tokens.image[1]), inputs.tokens.last)
    for site in ("z", "mlp_out"):
        edits = [Edit((layer, pos), range(layer, layer + 1), pos) for layer in layers for pos in places]

        def change(layer, rows, site=site):
            pos = [[0] if layer in edit.layers else None for edit in rows]
            if rows[0].pos != rows[0].key[1]:  # every position is computed
                pos = [[edit.key[1]] if layer in edit.layers else None for edit in rows]
            if any(pos):
                mv.ablate(vlm, pos, layer, at=site)

        clean = run(vlm, inputs, edits_at=site)
        # A latent attention (MLA) has no matrix of queries, keys or values: it is computed again.
        assert any(clean.projected) == any(map(projections_of, vlm.layer_parts))
        got = sweep(vlm, clean, edits, change)
        for layer, pos in got:
            want = forward(vlm, inputs, lambda layer=layer, pos=pos, site=site: mv.ablate(vlm, pos, layer, at=site))
            torch.testing.assert_close(got[layer, pos], want[0, -1].float(), rtol=1e-4, atol=1e-5)
            if layer < vlm.n_layers - 1 or pos == inputs.tokens.last:
                assert not torch.equal(got[layer, pos], clean.logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_kept_attention_projects_nothing(attention, monkeypatch):
    """Of the first layer only the output projection runs; the last one's sees one position."""
    vlm = mv.load(*families.build("llava", attention=attention))
    inputs = vlm.inputs(families.picture(60, 44, seed=0), "what is this")
    clean, calls, linear = run(vlm, inputs, edits_at="z"), [], torch.nn.functional.linear
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    names = {
        getattr(block.self_attn, name).weight: (layer, name)
        for layer, block in enumerate(vlm.hf.model.language_model.layers)
        for name in projections
    }

    def counted(x, weight, bias=None):
        if weight in names:
            calls.append((*names[weight], x.shape[1]))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    got = sweep(vlm, clean, [Edit((0,), range(1), 0)], lambda layer, rows: None)
    torch.testing.assert_close(got[0,], clean.logits)  # nothing was changed
    n, last = len(inputs.tokens), vlm.n_layers - 1
    between = [(layer, name, n) for layer in range(1, last) for name in projections]
    ends = [(last, name, 1 if name == "o_proj" else n) for name in projections]
    assert calls == [(0, "o_proj", n), *between, *ends]


def test_a_sweep_computes_no_layer_and_no_position_twice(llava_vlm, monkeypatch):
    """The MLPs run only in layers, and at positions, from the first edited one on.

    The last layer's computes the last position alone, unless an edit changes that layer.
    """
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    clean = run(llava_vlm, inputs)
    calls = []  # (layer, rows, positions)
    layers = llava_vlm.hf.model.language_model.layers
    handles = [
        layer.mlp.register_forward_hook(lambda _, args, out, i=i: calls.append((i, *args[0].shape[:2])))
        for i, layer in enumerate(layers)
    ]
    try:
        edits = [Edit((i,), range(1, 2), inputs.tokens.last - 3) for i in range(2)]
        sweep(llava_vlm, clean, edits, lambda layer, rows: None)
        assert calls == [(1, 2, 4), (2, 2, 1)]
        calls.clear()
        sweep(llava_vlm, clean, [*edits, Edit((2,), range(2, 3), inputs.tokens.last - 3)], lambda layer, rows: None)
        assert calls == [(1, 3, 4), (2, 3, 4)]
    finally:
        for handle in handles:
            handle.remove()
