"""SmolLM2 as the decoder of a LLaVA, whose projector is random: parity with formulas from weights.

The lane `-m smollm2` runs it: it needs the extra and the package that carries the decoder.
"""

import json
import math
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import mechvlm as mv
from mechvlm import bundled
from mechvlm.bundled import assemble
from mechvlm.bundled.smollm2 import WEIGHTS, read_decoder, weights_file
from mechvlm.datasets.scenes import sample_scenes

sys.path.insert(0, str(Path(mv.__file__).parents[1] / "scripts"))

import bundled_smol
import bundled_smol_llava
from transformers import LlavaConfig

pytestmark = pytest.mark.smollm2

(SCENE,) = sample_scenes(1, 2001, "test", (2,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As the model would be put together in a cache."""
    decoder = read_decoder()
    torch.manual_seed(0)
    full = bundled_smol_llava.build(decoder, LlavaConfig.from_pretrained(bundled.path("tiny-llava")).vision_config)
    with torch.no_grad():  # visual tokens of the size of words
        full.model.multi_modal_projector.linear_2.weight.mul_(10)
    home = tmp_path_factory.mktemp("home")
    bundled_smol.save(full, bundled_smol_llava.processor(decoder), home / "smol")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHVLM_CACHE", str(home / "cache"))
        yield assemble.assembled(home / "smol")


@pytest.fixture(scope="module")
def vlm(folder):
    return mv.load(folder, dtype="float32")


def test_the_decoder_is_the_one_that_transformers_reads(vlm):
    """Its own reading of the GGUF file, which is slow; ours is stored in float16."""
    from transformers import AutoModelForCausalLM

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
def test_the_tokenizer_is_byte_level_bpe(vlm, folder, text):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    assert vlm.tokenizer.tokenize(text) == _naive_tokens(text, ranks)
    assert vlm.tokenizer.decode(vlm.tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_grouped_queries_and_tied_embeddings(vlm):
    """The lens, and the norm-based attention head by head, by their formulas from weights."""
    inputs = vlm.inputs(SCENE.render(), "Describe the scene.")
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
