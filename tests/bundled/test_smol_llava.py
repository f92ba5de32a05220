"""smol-llava, whose decoder is SmolLM2: as it is read, as its card says, and what moves its answers.

The lane `-m smollm2` runs it: it needs the extra and the package that carries the decoder.
"""

import json
import math
import re
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import mechvlm as mv
from mechvlm import bundled
from mechvlm.datasets.scenes import sample_scenes
from mechvlm.datasets.swaps import attribute_swaps

sys.path.insert(0, str(Path(mv.__file__).parents[1] / "scripts"))

import evaluate_bundled
import evaluate_smol

pytestmark = pytest.mark.smollm2

ONE_MORE_SEED = 2001
SCENES = list(sample_scenes(60, ONE_MORE_SEED, "test", (1, 2)))


@pytest.fixture(scope="module")
def vlm():
    return mv.load("smol-llava")


@pytest.fixture(scope="module")
def reader():
    return evaluate_smol.Reader("smol-llava", bundled.path("smol-llava"))


# -- the decoder -----------------------------------------------------------------------------------


def test_the_decoder_is_the_one_that_transformers_reads(vlm):
    """Its own reading of the GGUF file, which is slow; ours is stored in float16."""
    from transformers import AutoModelForCausalLM

    from mechvlm.bundled.smollm2 import WEIGHTS, weights_file

    theirs = AutoModelForCausalLM.from_pretrained(weights_file().parent, gguf_file=WEIGHTS, dtype=torch.float32)
    ours = vlm.hf.model.language_model.state_dict()
    expected = theirs.model.state_dict()
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        rows = ours[name][: len(value)]
        assert torch.equal(rows, value.half().float()), name
    embedding = ours["embed_tokens.weight"]
    assert len(embedding) == 49153
    torch.testing.assert_close(embedding[-1], expected["embed_tokens.weight"].mean(0), atol=1e-4, rtol=1e-3)
    settings, own = theirs.config.to_dict(), vlm.hf.config.text_config.to_dict()
    same = set(settings) - {"vocab_size", "quantization_config", "architectures", "_name_or_path", "dtype"}
    different = {name: (settings[name], own[name]) for name in same if name in own and settings[name] != own[name]}
    assert different.keys() <= {"rms_norm_eps", "unk_token_id"}
    assert own["rms_norm_eps"] == pytest.approx(settings["rms_norm_eps"], rel=1e-6)


@cache
def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable bytes are themselves, the others come after 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]


def _naive_tokens(text: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-level BPE as it is defined: digits alone, words by the pattern, then merges by rank."""
    import regex

    words = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    out = []
    for part in regex.findall(r"\p{N}|\P{N}+", text):
        for word in regex.findall(words, part):
            letters = [_byte_letters()[byte] for byte in word.encode()]
            while len(letters) > 1:
                rank, i = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(letters)))
                if rank == math.inf:
                    break
                letters[i : i + 2] = [letters[i] + letters[i + 1]]
            out += letters
    return out


@pytest.mark.parametrize(
    "text",
    [
        "a red circle and an orange square on sand.",
        "It's 2026, isn't it?",
        "Ünïcödé  naïve\n\nçay 你好 🙂 \t x",
        "1234 5.67e8",
    ],
)
def test_the_tokenizer_is_byte_level_bpe(vlm, text):
    model = json.loads((bundled.path("smol-llava") / "tokenizer.json").read_text())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    assert vlm.tokenizer.tokenize(text) == _naive_tokens(text, ranks)
    assert vlm.tokenizer.decode(vlm.tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_grouped_queries_and_tied_embeddings(vlm):
    """The lens, and the norm-based attention head by head, by their formulas from weights."""
    inputs = vlm.inputs(SCENES[0].render(), "Describe the scene.")
    norms, lens = mv.read(vlm, inputs, mv.NormAttention(dst="last"), mv.LogitLens(k=3, positions="last"))
    lm = vlm.hf.model.language_model
    n_heads, n_kv, d = 9, 3, 64
    x = vlm.run_with_cache(inputs, [f"blocks.{layer}.hook_resid_pre" for layer in (0, 14, 29)])[1]
    for layer in (0, 14, 29):
        block, state = lm.layers[layer], x[f"blocks.{layer}.hook_resid_pre"][0].float()
        with torch.no_grad():
            h = state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-5) * block.input_layernorm.weight
            n = len(h)
            q = (h @ block.self_attn.q_proj.weight.T).view(n, n_heads, d)
            k = (h @ block.self_attn.k_proj.weight.T).view(n, n_kv, d)
            v = (h @ block.self_attn.v_proj.weight.T).view(n, n_kv, d)
            angle = torch.arange(n)[:, None] * 100_000.0 ** (-torch.arange(0, d, 2) / d)
            cos, sin = (torch.cat([f(angle), f(angle)], -1)[:, None] for f in (torch.cos, torch.sin))

            def turned(t, cos=cos, sin=sin):
                return t * cos + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], -1) * sin

            q, k = turned(q), turned(k)
            written = torch.zeros(n, 576)
            for head in range(n_heads):
                group = head // (n_heads // n_kv)
                weights = (q[-1, head] @ k[:, group].T / math.sqrt(d)).softmax(-1)
                out = block.self_attn.o_proj.weight[:, head * d : (head + 1) * d]
                written += weights[:, None] * (v[:, group] @ out.T)
        torch.testing.assert_close(norms.norm[layer, 0, 0].float(), written.norm(dim=-1), atol=1e-4, rtol=1e-3)
        with torch.no_grad():
            last = state[-1] * torch.rsqrt(state[-1].square().mean() + 1e-5) * lm.norm.weight
            top = (last @ lm.embed_tokens.weight.T).topk(3).indices.tolist()
        assert lens.pieces()[layer][inputs.tokens.last] == [vlm.tokenizer.decode([t]) for t in top]


# -- the card --------------------------------------------------------------------------------------


def _on_card(label: str) -> tuple[float, float]:
    """Mean and standard deviation between seeds of a figure on the card, as shares."""
    card = (bundled.shipped("smol-llava") / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {label} \| ([\d.]+) ± ([\d.]+) % \|", card, re.MULTILINE)
    return float(row[0]) / 100, float(row[1]) / 100


def _fits(label: str, figure: dict) -> bool:
    """Whether one more seed's figure is within three standard errors of the card's mean."""
    mean, sd = _on_card(label)
    share = min(max(mean, 1 / figure["n"]), 1 - 1 / figure["n"])
    spread = math.sqrt(sd**2 + share * (1 - share) / figure["n"])
    return abs(figure["value"] - mean) <= 3 * spread


def test_one_more_seed_says_what_the_card_says(reader):
    images = [scene.render() for scene in SCENES]
    captions = evaluate_bundled.captions(reader, SCENES, images)
    answers = evaluate_bundled.questions(reader, SCENES, images)
    swaps = evaluate_bundled.swaps(reader, attribute_swaps(20, ONE_MORE_SEED), "Describe the scene.")
    figures = {
        "1 and 2 objects": captions["1 and 2"],
        "color, shape and count": answers["color, shape and count"],
        "attribute swap, group score": swaps["group"],
    }
    assert {label: figure for label, figure in figures.items() if not _fits(label, figure)} == {}


def test_what_is_packed_is_what_one_prompt_gives(vlm, reader):
    """The card's figures come from packed rows: the answers are those of `vlm.generate`."""
    scenes, text = SCENES[:4], "Describe the scene."
    images = [scene.render() for scene in scenes]
    said = reader.answers(images, [text] * 4, 24)
    assert [str(answer).strip() for answer in vlm.generate(vlm.inputs(images, text), 24)] == said


# -- what moves its answers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colors(vlm):
    """Scenes of one object, asked for its color."""
    scenes = list(sample_scenes(6, ONE_MORE_SEED, "test", (1,)))
    prompts = [f"What color is the {scene.objects[0].shape}?" for scene in scenes]
    inputs = vlm.inputs([scene.render() for scene in scenes], prompts)
    return scenes, inputs, [scene.objects[0].color for scene in scenes]


def test_the_image_reaches_the_question_early_and_the_last_position_late(vlm, colors):
    _, inputs, answers = colors
    flow = mv.information_flow(vlm, inputs, answers, window=5, flows=["image -> question", "image -> last"])
    assert flow.p.mean() > 0.8
    to_question, to_last = flow.change.mean(-1)
    early, late = slice(0, vlm.n_layers // 3), slice(vlm.n_layers // 2, None)
    assert to_question[early].min() < -30
    assert to_question[early].min() < to_question[late].min() - 20
    assert to_last[late].min() < -30
    assert to_last[late].min() < to_last[early].min() - 20


def test_its_own_patches_carry_an_object(vlm, colors):
    scenes, inputs, answers = colors
    ablation = mv.object_ablation(vlm, inputs, [s.objects[0].box() for s in scenes], answers, margins=(1,), draws=3)
    assert ablation.correct.float().mean() > 0.8
    own, random = (ablation.p_ablated[ablation.conditions.index(name), 0].mean() for name in ("own", "random"))
    assert own < 0.5
    assert random > own + 0.3
