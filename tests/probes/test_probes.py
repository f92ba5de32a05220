"""Each probe against the plain formula, computed from Hugging Face's own outputs."""

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from mechvlm.families.record import part
from mechvlm.probes import likeliest


@pytest.fixture(scope="module")
def states(vlm, batch):
    """The residual stream at layers 0 to n_layers by plain hooks, and the logits."""
    got, handles = [], []
    for layer in part(vlm.hf, vlm.record.layers):
        handles.append(layer.register_forward_pre_hook(lambda m, args, kw: got.append(args[0]), with_kwargs=True))
    handles.append(part(vlm.hf, vlm.record.norm).register_forward_pre_hook(lambda m, args: got.append(args[0])))
    with torch.no_grad():
        logits = vlm.hf(**vlm.encoding(batch)).logits
    for handle in handles:
        handle.remove()
    assert len(got) == vlm.n_layers + 1
    return got, logits


# -- logit lens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("final_norm", [True, False])
def test_lens_equals_the_formula(vlm, batch, states, final_norm):
    lens = mv.logit_lens(vlm, batch, k=4, positions="image", final_norm=final_norm)
    norm, head = part(vlm.hf, vlm.record.norm), part(vlm.hf, vlm.record.unembed)
    for layer, state in enumerate(states[0]):
        with torch.no_grad():
            probs = head(norm(state) if final_norm else state).softmax(-1)
        for i, tokens in enumerate(batch.token_maps):
            best = probs[i, tokens.image].topk(4)
            own = lens.of(i)
            assert own.position.tolist() == tokens.image.tolist()
            torch.testing.assert_close(own.probs[layer], best.values, rtol=0, atol=1e-6)
            assert torch.equal(own.ids[layer], best.indices)


def test_the_last_layer_is_the_models_own_output(vlm, single):
    """The same states, norm and matrix product, and not normed twice."""
    with torch.no_grad():
        logits = vlm.hf(**vlm.encoding(single)).logits[0]
    lens = mv.logit_lens(vlm, single, k=3, positions="all", states=[vlm.n_layers])
    best = logits.topk(3)
    assert torch.equal(lens.ids[0], best.indices)
    torch.testing.assert_close(lens.probs[0], logits.softmax(-1).topk(3).values, rtol=2e-6, atol=0)


def test_chunks_change_nothing(vlm, single, monkeypatch):
    whole = mv.logit_lens(vlm, single, k=2, positions="all")
    monkeypatch.setattr(likeliest, "POSITIONS_PER_CHUNK", 3)
    parts = mv.logit_lens(vlm, single, k=2, positions="all")
    assert torch.equal(whole.ids, parts.ids)
    torch.testing.assert_close(whole.probs, parts.probs, rtol=0, atol=1e-6)


def test_logits_of_all_layers_never_exist_at_once(llava_vlm, monkeypatch):
    """The unembedding is given a chunk at most, and the trace saves k numbers per point."""
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    shapes = []
    head = part(llava_vlm.hf, llava_vlm.record.unembed)
    handle = head.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    monkeypatch.setattr(likeliest, "POSITIONS_PER_CHUNK", 8)
    mv.logit_lens(llava_vlm, inputs, k=2, positions="image")
    handle.remove()
    # 16 patches in chunks of 8, and the model's own.
    assert len(shapes) == 2 * (llava_vlm.n_layers + 1) + 1
    assert max(shape.numel() for shape in shapes) <= 8 * llava_vlm.d_vocab


def test_lens_pieces_and_table(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    lens = mv.logit_lens(llava_vlm, inputs, k=2, positions=[5, 6], states=[0, 3])
    frame = lens.to_frame()
    assert len(frame) == 2 * 2 * 2
    row = frame[(frame.state == 3) & (frame.position == 6) & (frame["rank"] == 2)].iloc[0]
    assert row.token == int(lens.ids[1, 1, 1])
    assert row.piece == llava_vlm.to_str_tokens(torch.tensor([row.token]))[0]
    assert row.probability == pytest.approx(float(lens.probs[1, 1, 1]))
    assert lens.pieces()[3][6][1] == row.piece


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "k=0"), ({"states": [4]}, r"\[4\].*0 \(embeddings\) to 3"), ({"positions": "patch"}, "'patch'"),
     ({"states": []}, "no state was given")],
)  # fmt: skip
def test_bad_lens_options(llava_vlm, options, message):
    with pytest.raises(ValueError, match=message):
        mv.logit_lens(llava_vlm, llava_vlm.inputs(noise_image(0), "a"), **options)


# -- contextualization -----------------------------------------------------------------------------


def cosines(a, b):
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (a, b))
    return a @ b.T


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("self_pairs", [True, False])
def test_contextualization_is_the_mean_of_all_pairs(vlm, batch, states, special, self_pairs):
    got = mv.contextualization(vlm, batch, special=special, self_pairs=self_pairs)
    for layer, state in enumerate(states[0]):
        for i, tokens in enumerate(batch.token_maps):
            text = torch.cat([tokens.special, tokens.text]) if special else tokens.text
            v, w = state[i, tokens.image], state[i, text]
            expected = {"inter": cosines(v, w).mean()}
            for name, x in (("image", v), ("text", w)):
                c = cosines(x, x)
                expected[name] = c.mean() if self_pairs else c[~torch.eye(len(c), dtype=torch.bool)].mean()
            for name, value in expected.items():
                torch.testing.assert_close(getattr(got, name)[layer, i], value, rtol=0, atol=2e-6, equal_nan=True)
    assert (got.special, got.self_pairs) == (special, self_pairs)


def test_baseline_is_the_mean_over_tokens_of_different_examples(vlm, batch, states):
    got = mv.contextualization(vlm, batch)
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    for layer, state in enumerate(states[0]):
        sets = [{"v": state[i, m.image], "w": state[i, m.text]} for i, m in enumerate(batch.token_maps)]
        for row, (x, y) in enumerate([("v", "w"), ("v", "v"), ("w", "w")]):
            expected = torch.stack([cosines(sets[a][x], sets[b][y]).mean() for a, b in pairs]).mean()
            torch.testing.assert_close(got.baseline[row, layer], expected, rtol=0, atol=2e-6)
    less = mv.contextualization(vlm, batch, subtract_baseline=True)
    assert less.adjusted
    torch.testing.assert_close(less.text, got.text - got.baseline[2][:, None], rtol=0, atol=1e-6)


def test_joined_batches_equal_one_batch(vlm, batch):
    whole = mv.contextualization(vlm, batch)
    pairs = zip(batch.images, batch.prompts, strict=True)
    parts = [mv.contextualization(vlm, vlm.inputs(images[0], prompt)) for images, prompt in pairs]
    assert parts[0].baseline.isnan().all()
    merged = mv.concat(parts)
    for name in ("inter", "image", "text", "baseline"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="differ in `special`: False and True"):
        mv.concat([parts[0], mv.contextualization(vlm, batch, special=True)])
    with pytest.raises(ValueError, match="at least two"):
        parts[0].minus_baseline()


def test_a_single_query_has_no_pair_without_itself():
    from mechvlm.probes.contextualization import without_self

    assert without_self(torch.tensor([1.0]), torch.tensor([1.0])).isnan().all()


# -- the queries' reading --------------------------------------------------------------------------


def test_query_reading_equals_the_qformers_cross_attentions(blip_vlm):
    batch = blip_vlm.inputs([noise_image(0), noise_image(1, (40, 90))], ["what is this", "a"])
    got = mv.query_reading(blip_vlm, batch)
    qformer = blip_vlm.hf.qformer
    weights, handles = [], []
    for layer in list(qformer.encoder.layer)[::2]:
        attention = layer.crossattention.attention

        def keep(module, args, kwargs, out):
            x, enc = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
            q, k = (f(y).unflatten(-1, (2, 12)).transpose(1, 2) for f, y in ((module.query, x), (module.key, enc)))
            weights.append((q @ k.transpose(-1, -2) / 12**0.5).softmax(-1))

        handles.append(attention.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        blip_vlm.hf(**blip_vlm.encoding(batch))
    for handle in handles:
        handle.remove()
    expected = torch.stack([w[:, :, :5, 1:].mean(1).unflatten(-1, (4, 4)) for w in weights])
    assert got.weight.shape == (2, 2, 5, 4, 4)
    torch.testing.assert_close(got.weight, expected, rtol=0, atol=1e-6)
    assert (got.map.sum((-1, -2)) < 1).all()  # the rest is on the class token


def test_query_reading_comes_with_the_rest_in_one_forward(blip_vlm):
    inputs = blip_vlm.inputs(noise_image(0), "what is this")
    calls = []
    handle = blip_vlm.hf.qformer.register_forward_hook(lambda *_: calls.append(1))
    lens, reading = mv.read(blip_vlm, inputs, mv.LogitLens(k=1), mv.QueryReading())
    handle.remove()
    assert len(calls) == 1
    assert torch.equal(reading.map, mv.query_reading(blip_vlm, inputs).map)
    assert torch.equal(lens.ids, mv.logit_lens(blip_vlm, inputs, k=1).ids)


def test_patches_have_no_query_reading(llava_vlm):
    with pytest.raises(ValueError, match="no queries"):
        mv.query_reading(llava_vlm, llava_vlm.inputs(noise_image(0), "a"))


# -- read() ----------------------------------------------------------------------------------------


def test_many_probes_share_one_forward_and_read_the_same_as_alone(vlm, batch):
    calls = []
    handle = part(vlm.hf, vlm.record.norm).register_forward_hook(lambda *_: calls.append(1))
    embed = part(vlm.hf, vlm.record.layers)[0].register_forward_hook(lambda *_: calls.append("layer 0"))
    lens, context, norms = mv.read(vlm, batch, mv.LogitLens(k=2), mv.Contextualization(), mv.NormAttention())
    handle.remove()
    embed.remove()
    assert calls.count("layer 0") == 1
    assert torch.equal(lens.ids, mv.logit_lens(vlm, batch, k=2).ids)
    assert torch.equal(context.inter, mv.contextualization(vlm, batch).inter)
    assert torch.equal(norms.norm, mv.norm_attention(vlm, batch).norm)


def test_only_reduced_tensors_leave_the_trace(vlm, batch):
    """No result holds a tensor as large as layers x vocabulary, or positions squared x width."""
    results = mv.read(vlm, batch, mv.LogitLens(k=2), mv.Contextualization(), mv.NormAttention())
    positions = len(batch.token_maps[0])
    for result in results:
        for value in vars(result).values():
            if isinstance(value, torch.Tensor):
                assert value.numel() < positions * vlm.d_vocab
                assert value.numel() <= vlm.n_layers * 3 * positions * 2 * vlm.n_heads + (vlm.n_layers + 1) * 100


def test_read_wants_a_probe(vlm, single):
    with pytest.raises(ValueError, match="no probe"):
        mv.read(vlm, single)
    with pytest.raises(ValueError, match=r"one by one.*\['list'\]"):
        mv.read(vlm, single, [mv.LogitLens()])


def test_nan_is_named_with_its_layer_and_example():
    hf, processor = llava.__wrapped__()
    vlm = mv.load(hf, processor)
    batch = vlm.inputs([noise_image(0), noise_image(1)], "what is this")
    batch.encoding["pixel_values"][1, 0, 3, 3] = float("nan")
    with pytest.raises(mv.NonFiniteError, match=r"embeddings that enter the decoder.*example\(s\) \[1\]") as error:
        mv.read(vlm, batch, mv.Contextualization())
    assert error.value.examples == (1,)
    with torch.no_grad():
        part(hf, vlm.record.layers)[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(mv.NonFiniteError, match=r"from the output of layer 1 \(of layers 0 to 2\) on"):
        mv.read(vlm, vlm.inputs(noise_image(0), "a"), mv.LogitLens())


# -- results ---------------------------------------------------------------------------------------


def test_results_survive_a_file(vlm, batch, tmp_path):
    for result in mv.read(vlm, batch, mv.LogitLens(k=2), mv.Contextualization(), mv.NormAttention()):
        result.save(tmp_path / "result.safetensors")
        loaded = type(result).load(tmp_path / "result.safetensors")
        for name, value in vars(result).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(torch.nan_to_num(getattr(loaded, name)), torch.nan_to_num(value))
            else:
                assert getattr(loaded, name) == value
    with pytest.raises(ValueError, match="holds NormAttentionResult, not LogitLensResult"):
        mv.LogitLensResult.load(tmp_path / "result.safetensors")


def test_a_result_shows_its_shapes_and_no_numbers(vlm, batch):
    for result in mv.read(vlm, batch, mv.LogitLens(k=2), mv.Contextualization(), mv.NormAttention()):
        assert len(repr(result)) < 400
        assert repr(result).startswith(type(result).__name__)
    assert "image" in repr(batch.token_maps[0])
    assert len(repr(batch.token_maps[0])) < 120


def test_saving_nowhere_names_the_folder(vlm, single, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        mv.contextualization(vlm, single).save(tmp_path / "nowhere" / "x.safetensors")


def test_tables_hold_the_tensors(vlm, batch):
    _, context, norms = mv.read(vlm, batch, mv.LogitLens(k=1), mv.Contextualization(), mv.NormAttention())
    frame = context.to_frame().set_index(["pair", "state", "example"]).value
    assert frame["text", 2, 1] == pytest.approx(float(context.text[2, 1]))
    frame = norms.to_frame().set_index(["measure", "layer", "example", "dest", "src"]).value
    src = batch.token_maps[0].last_image
    assert frame["norm", 2, 0, "last_image", src] == pytest.approx(float(norms.norm[2, 0, 1, src]))
    assert frame["weight", 0, 2, "last_text", src] == pytest.approx(float(norms.weight[0, 2, :, 0, src].mean()))
