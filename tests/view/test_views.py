"""The data in the views, and the arguments they refuse.

test_browser_views.py tests in a browser what they look like.
"""

import base64
import gzip
import io
import json
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.view import page
from mechvlm.view.match import check_match, load_image
from mechvlm.view.page import View, to_json
from mechvlm.view.pooling import token_groups


def data_of(view: View) -> list[dict]:
    return [json.loads(d) for d in re.findall(r'<script type="application/json">(.*?)</script>', view.body)]


@pytest.fixture(scope="module")
def read(llava_vlm):
    """Two examples of different lengths, with their lens and all their attention."""
    inputs = llava_vlm.inputs([noise_image(0), noise_image(1)], ["what is this", "a long question , is it not ? <b>"])
    return inputs, *mv.read(llava_vlm, inputs, mv.LogitLens(k=3), mv.NormAttention(dst="all pairs"))


@pytest.fixture(scope="module")
def read_queries(blip_vlm):
    inputs = blip_vlm.inputs(noise_image(0), "what is this")
    return inputs, *mv.read(blip_vlm, inputs, mv.LogitLens(k=2), mv.NormAttention(dst="all pairs"))


# --- the page


def test_json_cannot_end_its_script():
    hostile = ["</script><script>alert(1)</script>", "<!--", "&lt;", "\u2028\u2029", '"\\', "🎈", "שלום", "\ud800"]
    text = to_json(hostile)
    assert json.loads(text) == hostile
    assert text.isascii()
    assert not set("<>&") & set(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, {"a": float("-inf")}]])
def test_json_refuses_what_it_cannot_write(value):
    with pytest.raises(mv.ViewError, match="NaN or infinity"):
        to_json(value)


def test_a_page_is_one_file_with_a_policy_and_escaped_names(tmp_path):
    view = View('a <b> & "c"', "<p>body</p>", ("let a = '</ScRipt><!--';",), ("p::after { content: '</style>' }",))
    path = view.save(tmp_path / "view.html")
    html = path.read_text(encoding="utf-8")
    assert html == view.html()
    assert "default-src 'none'" in html
    assert "<title>a &lt;b&gt; &amp; &quot;c&quot;</title>" in html
    assert html.count("</script>") == 2, "its own, and the script that marks the page as live"
    assert html.count("</style>") == 2
    assert r"'\x3c/ScRipt>\x3c!--'" in html
    assert "<img" not in html + view._repr_html_(), "without a picture none is shown"
    assert "body" not in repr(view)
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere is not there"):
        view.save(tmp_path / "nowhere" / "view.html")


def test_views_are_added_with_what_they_share_once(read):
    inputs, lens, norms = read
    first, second = mv.view.attention(inputs, norms, 1, pool=2), mv.view.topk(inputs, lens)
    both = first + second
    assert both.html().count("var CircuitsVis=") == 1
    assert len(both.scripts) == 2
    assert len(data_of(both)) == 2
    assert both.height == first.height + second.height
    sizes = [Image.open(io.BytesIO(v.picture)).size for v in (first, second, both)]
    assert sizes[2] == (max(sizes[0][0], sizes[1][0]), sizes[0][1] + sizes[1][1])
    assert len(data_of(first + first)) == 2


def test_a_frame_over_a_picture():
    drawn = []
    view = View('"quoted"', "<p>\"'&amp;</p>", preview=lambda: drawn.append(1) or b"not really", height=321)
    assert (view.html() and drawn) == [], "the page itself shows no picture"
    html = view._repr_html_()
    assert html.startswith('<div style="position:relative;height:321px"><img')
    (srcdoc,) = re.findall(r'<iframe sandbox="allow-scripts" [^>]*srcdoc="([^"]*)"', html)
    assert "&lt;p&gt;&quot;&#x27;&amp;amp;&lt;/p&gt;" in srcdoc
    assert html.count("data:image/png") == 1, "the picture stands under the frame, not in it as well"
    assert html.index("<img") < html.index("<iframe")


def test_too_large_says_what_to_choose(read, monkeypatch):
    with pytest.raises(mv.ViewError, match=r"'big' would have 50 MB; at most 50 MB.*Choose fewer layers"):
        View("big", "x" * (page.PAGE_LIMIT + 1))
    inputs, lens, norms = read
    monkeypatch.setattr(page, "PAGE_LIMIT", 1_000_000)
    with pytest.raises(mv.ViewError, match="smaller pool"):
        mv.view.attention(inputs, norms, 1, pool=2)
    with pytest.raises(mv.ViewError, match="smaller k"):
        mv.view.topk(inputs, lens)
    with pytest.raises(mv.ViewError, match="shorter prompt"):
        mv.view.attention_row(inputs, norms, 20)


# --- the data in the views


@pytest.mark.parametrize("measure", ["norm", "weight"])
def test_attention_holds_the_pooled_maps(measure, read):
    inputs, _, norms = read
    view = mv.view.attention(inputs, norms, [0, 2], heads=[2], pool=2, measure=measure, example=1)
    (data,) = data_of(view)
    assert data["maps"] == ["0 all", "0.2", "2 all", "2.2"]
    assert (data["steps"], data["heads"]) == ([0, 2], ["all", "2"])
    tokens = inputs.token_maps[1]
    whole = norms.norm[:, 1] if measure == "norm" else norms.weight[:, 1].mean(1)
    single = norms.norm_head[:, 1, 2] if measure == "norm" else norms.weight[:, 1, 2]
    for shown, values in zip(data["patterns"], [whole[0], single[0], whole[2], single[2]], strict=True):
        naive = np.zeros((len(data["labels"]),) * 2)
        names, member = token_groups(tokens, 2)
        assert data["labels"] == [name.removeprefix("▦") for name in names]
        for i, dests in enumerate(member):
            for j, srcs in enumerate(member):
                block = values[dests.bool()][:, srcs.bool()]
                naive[i, j] = block.sum(1).mean()
        np.testing.assert_allclose(shown, naive, rtol=6e-4, atol=1e-9)
        if measure == "weight":
            np.testing.assert_allclose(np.sum(shown, 1), 1, rtol=1e-3)
    assert data["top"] == pytest.approx(np.max(data["patterns"]), rel=1e-3)


def test_attention_over_queries(read_queries):
    inputs, _, norms = read_queries
    (data,) = data_of(mv.view.attention(inputs, norms, 2, pool=2))
    assert data["labels"][:3] == ["q0–2", "q3–4", "<s>"]
    assert [unit["kind"] for unit in data["units"]][:3] == ["query", "query", "token"]
    assert len(data["patterns"]) == 1 + norms.weight.shape[2]
    assert data["views"] == data["cells"] == [], "queries have no place on the image"
    assert len(data["images"]) == 1


def test_one_row_at_full_length(read):
    inputs, _, norms = read
    last = inputs.token_maps[0].last
    view = mv.view.attention_row(inputs, norms, last)
    (data,) = data_of(view)
    real = inputs.token_maps[0].all
    shown = np.array(data["values"])  # [layer, all + head, pos]
    assert shown.shape == (3, 1 + 4, len(real))
    np.testing.assert_allclose(shown[:, 0], norms.norm[:, 0, last, real], rtol=6e-4)
    np.testing.assert_allclose(shown[1, 1:], norms.norm_head[1, 0, :, last, real], rtol=6e-4)
    assert [unit["at"] for unit in data["units"]] == real.tolist()
    assert (data["steps"], data["heads"]) == ([0, 1, 2], ["all", "0", "1", "2", "3"])
    assert "“All” is all heads' vectors summed." in data["why"]
    weights = np.array(data_of(mv.view.attention_row(inputs, norms, last, measure="weight"))[0]["values"])
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-3)


def test_a_row_by_its_name(llava_vlm, read):
    inputs, _, norms = read
    named = mv.norm_attention(llava_vlm, inputs, dst=["last_text", "last"])
    by_name = data_of(mv.view.attention_row(inputs, named, "last", example=1))
    assert by_name == data_of(mv.view.attention_row(inputs, norms, inputs.token_maps[1].last, example=1))
    with pytest.raises(mv.ViewError, match=r"dest=None was asked for; these norms hold \['last_text', 'last'\]"):
        mv.view.attention_row(inputs, named)
    with pytest.raises(mv.ViewError, match="Position 0 is padding in example 0, whose tokens start at"):
        mv.view.attention_row(inputs, norms, 0)
    with pytest.raises(mv.ViewError, match="dest='first'"):
        mv.view.attention_row(inputs, named, "first")


def test_topk_holds_the_lens(read):
    """The bytes as the page reads them: a word's number in three, its chance, then all words."""
    inputs, lens, _ = read
    (data,) = data_of(mv.view.topk(inputs, lens, example=1))
    pieces, probs, own = lens.of(1).pieces(), lens.of(1).probs, data["lens"]
    assert [row["name"] for row in data["rows"]] == ["row 0", "row 1", "row 2", "row 3"]
    assert data["steps"] == own["states"] == [0, 1, 2, 3]
    packed = gzip.decompress(base64.b64decode(own["data"]))
    shape = len(own["states"]), own["k"], len(own["sources"])
    planes = np.frombuffer(packed[: 4 * np.prod(shape)], np.uint8).reshape(4, *shape).astype(int)
    words = json.loads(packed[4 * np.prod(shape) :])
    ids = planes[0] + (planes[1] << 8) + (planes[2] << 16)
    for row, col, state in [(0, 0, 0), (2, 3, 1), (3, 1, 3)]:
        unit, point = data["rows"][row]["units"][col], row * 4 + col
        position = inputs.token_maps[1].position(row, col)
        assert data["units"][unit]["at"] == position
        at = own["sources"].index(unit)
        assert [words[i] for i in ids[state, :, at]] == list(pieces[state][position])
        np.testing.assert_allclose((planes[3, state, :, at] / 255) ** 2, probs[state, point], atol=0.004)


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ([21, 22, 24], ["positions 21, 22", "positions 24"]),
        (list(range(14, 24)), ["positions 14 to 21", "positions 22, 23"]),
    ],
)
def test_topk_of_other_positions(where, names, llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "what is this and that and more")
    (data,) = data_of(mv.view.topk(inputs, mv.logit_lens(llava_vlm, inputs, k=2, positions=where)))
    assert [row["name"] for row in data["rows"]] == names
    assert [data["units"][unit]["at"] for row in data["rows"] for unit in row["units"]] == where
    assert data["units"][data["start"]]["at"] == where[0]


def test_coloured_tokens(read):
    inputs, *_ = read
    tokens = inputs.token_maps[0]
    values = torch.arange(len(tokens)).float()
    (data,) = data_of(mv.view.tokens(inputs, values, name="rank"))
    assert data["values"] == [[values[tokens.all].tolist()]], "padding is left out"
    assert [unit["at"] for unit in data["units"]] == tokens.all.tolist()
    assert data["units"][0] == {"piece": "<s>", "kind": "token", "at": int(tokens.all[0])}
    on_image = [data["units"][unit]["at"] for unit in data["cells"]]
    assert on_image == tokens.image.tolist(), "patches are cells of the picture, row by row"


def test_the_tokens_of_an_answer(llava_vlm):
    """A value for each position, or one for each of the answer's tokens."""
    answer = llava_vlm.generate(llava_vlm.inputs(noise_image(0), "what is this"), max_new_tokens=4)[0]
    tokens = answer.inputs.tokens
    (data,) = data_of(mv.view.tokens(answer, answer.logprobs, name="log-probability"))
    assert [data["units"][unit]["at"] for unit in data["answer"]] == tokens.answer.tolist()
    shown = [data["values"][0][0][unit] for unit in data["answer"]]
    np.testing.assert_allclose(shown, answer.logprobs, rtol=6e-4)
    assert data["values"][0][0][: len(tokens.prompt)] == [None] * len(tokens.prompt)
    values = torch.linspace(-1, 1, len(tokens))
    (data,) = data_of(mv.view.tokens(answer.inputs, values))
    np.testing.assert_allclose(data["values"][0][0], values[tokens.all], rtol=6e-4)
    n = len(answer.ids)
    with pytest.raises(mv.ViewError, match=rf"shape \[{n + 1}\].*or one for each of the answer's {n} tokens"):
        mv.view.tokens(answer, torch.zeros(n + 1))


def test_every_view_has_a_small_picture(read, read_queries, recwarn):
    for inputs, lens, norms in (read, read_queries):
        values = torch.linspace(-1, 1, len(inputs.token_maps[0]))
        views = [
            mv.view.attention(inputs, norms, 1, pool=2), mv.view.attention_row(inputs, norms, inputs.token_maps[0].last),
            mv.view.topk(inputs, lens), mv.view.tokens(inputs, values), mv.view.tokens(inputs, values * 0),
        ]  # fmt: skip
        for view in views:
            picture = Image.open(io.BytesIO(view.picture))
            assert picture.format == "PNG"
            assert len(view.picture) < 200_000
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10, "it is not blank"
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


# --- arguments that are refused


def test_results_of_other_inputs(llava_vlm, blip_vlm, read, read_queries):
    inputs, lens, norms = read
    single = llava_vlm.inputs(noise_image(0), "what is this")
    check_match(inputs, lens, norms)
    with pytest.raises(mv.ViewError, match="NormAttentionResult has 2 examples, the inputs have 1"):
        check_match(single, norms)
    longer = llava_vlm.inputs([noise_image(0)] * 2, "what is this , and is it longer than the other one was ?")
    with pytest.raises(mv.ViewError, match=r"NormAttentionResult has \d+ positions, the inputs have \d+"):
        mv.view.attention(longer, norms, 1)
    with pytest.raises(mv.ViewError, match="example 1, the inputs only 1"):
        mv.view.topk(single, lens)
    elsewhere = replace(lens.of(0), position=lens.of(0).position + 100)
    with pytest.raises(mv.ViewError, match=r"position .* no token of these inputs"):
        mv.view.topk(inputs, elsewhere)
    other = replace(norms, model="another")
    with pytest.raises(mv.ViewError, match="of the model 'another', the inputs are of"):
        mv.view.attention_row(inputs, other, 20)
    with pytest.raises(mv.ViewError, match="of the model"):
        check_match(read_queries[0], norms)
    reading = mv.query_reading(blip_vlm, read_queries[0])
    check_match(read_queries[0], reading)
    with pytest.raises(mv.ViewError, match="queries, the inputs have 0"):
        check_match(single, replace(reading, model=single.model))
    with pytest.raises(TypeError, match="A dict cannot be shown"):
        check_match(inputs, {})


def test_an_image_that_is_gone(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    norms = mv.norm_attention(llava_vlm, inputs, dst="all pairs")
    assert load_image(inputs, 0).size == (80, 60)
    with pytest.raises(mv.ViewError, match="Image 0 of example 0 is gone: the inputs no longer hold it"):
        mv.view.attention(replace(inputs, images=((),)), norms, 1, pool=2)
    inputs.images[0][0].close()
    with pytest.raises(mv.ViewError, match=r"Image 0 of example 0 is gone \(.*Make the inputs again"):
        mv.view.attention(inputs, norms, 1, pool=2)
    with pytest.raises(mv.ViewError, match="Image 0 of example 0 is gone"):
        mv.view.tokens(inputs, torch.zeros(len(inputs.tokens)))


def test_too_many_maps_say_which_pooling_fits(llava_vlm, read):
    inputs, _, norms = read
    with pytest.raises(mv.ViewError, match=r"is [\d,]+, at most 20,000 is usable\. Choose pool=(\d)") as error:
        mv.view.attention(inputs, norms, [0, 1, 2], example=1)
    pool = int(re.search(r"pool=(\d)", str(error.value))[1])
    mv.view.attention(inputs, norms, [0, 1, 2], pool=pool, example=1)
    with pytest.raises(mv.ViewError):
        mv.view.attention(inputs, norms, [0, 1, 2], pool=pool + 1, example=1)
    text = llava_vlm.inputs(noise_image(0), "a question of many words " * 12)
    full = mv.norm_attention(llava_vlm, text, dst="all pairs")
    with pytest.raises(mv.ViewError, match=r"Choose pool=4 and at most (\d) maps") as error:
        mv.view.attention(text, full, 1)
    assert int(re.search(r"most (\d) maps", str(error.value))[1]) >= 1
    mv.view.attention(text, full, 1, pool=4, heads=())
    longer = llava_vlm.inputs(noise_image(0), "a question of many words " * 30)
    with pytest.raises(mv.ViewError, match="attention_row"):
        mv.view.attention(longer, mv.norm_attention(llava_vlm, longer, dst="all pairs"), 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, i, lens, n: v.attention(i, n, 3), r"layers \[3\] were asked for; there are 0 to 2"),
        (lambda v, i, lens, n: v.attention(i, n, []), "No layer"),
        (lambda v, i, lens, n: v.attention(i, n, 1, heads=[4]), r"heads \[4\] were asked for; there are 0 to 3"),
        (lambda v, i, lens, n: v.attention(i, n, 1, pool=5), "pool=5 was asked for; the image has 4 x 4 patches"),
        (lambda v, i, lens, n: v.attention(i, n, 1, pool=2, measure="raw"), "measure='raw'.*'norm', 'weight'"),
        (lambda v, i, lens, n: v.attention(i, n, 1, pool=2, example=2), "Example 2 was asked for; the inputs hold 2"),
        (lambda v, i, lens, n: v.topk(i, lens.of(0), example=1), r"no position of example 1, only of \[0\]"),
        (lambda v, i, lens, n: v.tokens(i, [1.0, 2.0]), r"shape \[2\]; example 0 has \d+ positions"),
        (lambda v, i, lens, n: v.tokens(i, [float("nan")] * len(i.token_maps[0])), "NaN or infinity"),
    ],
)
def test_wrong_arguments(call, message, read):
    with pytest.raises(mv.ViewError, match=message):
        call(mv.view, *read)


def test_patterns_need_every_destination(llava_vlm, read):
    inputs, *_ = read
    with pytest.raises(mv.ViewError, match=r"Patterns need every destination; these norms hold \['last'\].*all pairs"):
        mv.view.attention(inputs, mv.norm_attention(llava_vlm, inputs, dst="last"), 1)


def test_groups_of_queries_are_few_enough(read_queries):
    inputs, _, norms = read_queries
    for pool in (6, (2, 2), 0):
        with pytest.raises(mv.ViewError, match="queries: choose 1 to 5 groups"):
            mv.view.attention(inputs, norms, 1, pool=pool)


@pytest.mark.long
def test_a_view_opens_no_figure_of_its_own(read):
    """A pyplot figure of the picture would appear under the view in a notebook."""
    inputs, lens, norms = read
    plt.close("all")
    for shown in (
        mv.view.topk(inputs, lens),
        mv.view.attention(inputs, norms, layers=1, pool=2),
        mv.view.patches(inputs, lens, norms, example=0),
        mv.view.tokens(inputs, torch.zeros(len(inputs.token_maps[0]))),
    ):
        assert shown.picture.startswith(b"\x89PNG")
    assert plt.get_fignums() == []


@pytest.mark.long
def test_every_form_of_layers_and_heads_means_the_same(read):
    inputs, _, norms = read
    want = data_of(mv.view.attention(inputs, norms, [0, 2], heads=[0, 3], pool=2))
    for layers, heads in (
        (range(0, 3, 2), (0, -1)),
        (torch.tensor([0, -1]), np.array([0, 3])),
        ([0, 2], torch.tensor([0, 3])),
    ):
        assert data_of(mv.view.attention(inputs, norms, layers, heads=heads, pool=2)) == want
    one = data_of(mv.view.attention(inputs, norms, np.int64(2), heads=-1, pool=2))
    assert one == data_of(mv.view.attention(inputs, norms, [2], heads=[3], pool=2))
