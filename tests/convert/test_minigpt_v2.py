"""MiniGPT-v2's checkpoint in transformers, against a plain restatement of the original."""

import sys
from pathlib import Path

import nnsight
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    dynamic_module_utils,
)

import mechvlm
from helpers import older
from helpers.images import noise_image
from helpers.models import llama_tokenizer
from helpers.older_files import (
    BLOCKS,
    QUERY_WIDTH,
    WIDTH,
    eva_file,
    llama_folder,
    lora,
    projection,
    random_tensors,
    trained_file,
)

sys.path.insert(0, str(Path(mechvlm.__file__).parents[1] / "scripts" / "convert"))
import minigpt_v2
from tensors import ConversionError

pytestmark = pytest.mark.long

PROMPT = "[INST] <Img><ImageHere></Img> [vqa] What is it? [/INST]"
QUERIES_OF = "llama_model.base_model.model.model.layers.0.self_attn.q_proj"


def convert(at: Path, **changed: str) -> None:
    """With a folder's files; `changed` names others, by the arguments of `minigpt_v2.convert`."""
    names = dict(checkpoint="own.pth", llm="llm", vision="eva.pth", out="out") | changed
    minigpt_v2.convert(**{name: str(at / file) for name, file in names.items()}, blocks=BLOCKS)


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """The files, their tensors, and the folder that was made of them; images of 8 x 8 patches."""
    at = tmp_path_factory.mktemp("minigpt_v2")
    tower, own = eva_file(at / "eva.pth", grid=4), projection(4 * WIDTH) | lora()
    trained_file(at / "own.pth", own, arch="minigpt_v2", image_size=112, lora_alpha=32)
    llm = llama_folder(at / "llm")
    convert(at)
    return at, own, tower, llm


@pytest.fixture
def load(monkeypatch, tmp_path):
    """The folder's model, with its own code, and its processor."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return lambda at: (
        AutoModelForImageTextToText.from_pretrained(at, trust_remote_code=True),
        AutoProcessor.from_pretrained(at, trust_remote_code=True),
    )


@torch.no_grad()
def test_the_logits_are_the_originals(system, load):
    """Measured: 8e-7 of the largest. Without ln_vision, or without LoRA, it is over 1."""
    at, own, tower, llm = system
    model, processor = load(at / "out")
    assert isinstance(model, LlavaForConditionalGeneration)
    batch = processor(images=noise_image(0), text=PROMPT, return_tensors="pt")
    tower = tower | {"pos_embed": older.larger(tower["pos_embed"], 8)}
    image = older.strips_image(own, tower, batch["pixel_values"], BLOCKS)
    assert image.shape[1] == 16
    with older.lora(llm, own, alpha=32):
        want = older.around_image(llm, llama_tokenizer(()), PROMPT, "<ImageHere>", image)
    got = model(**batch).logits
    assert got.shape == (*want.shape[:2], 32001)
    assert (got[..., :32000] - want).abs().max() < 4e-6 * want.abs().max()
    new = model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert new[0, -1] == want[0, -1].argmax()


def test_the_image_stands_where_the_prompt_says(system, load):
    """16 times, one for each strip of 4 patches, between pieces that both begin with a space."""
    _, processor = load(system[0] / "out")
    written = processor.tokenizer.convert_ids_to_tokens(processor(images=noise_image(0), text=PROMPT).input_ids[0])
    start = ["<s>", "▁[", "INST", "]", "▁<", "Img", ">"]
    assert written[: len(start)] == start
    assert written[len(start) : len(start) + 16] == ["<ImageHere>"] * 16
    assert written[len(start) + 16 :][:4] == ["▁</", "Img", ">", "▁["]
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "[vqa] What is it?"}]}
    assert processor.apply_chat_template([question], add_generation_prompt=True) == PROMPT


def test_mechvlm_reads_it(system, load):
    """Once its own code has loaded it; of the folder alone it is told so."""
    model, processor = load(system[0] / "out")
    with pytest.raises(mechvlm.ModelError, match="a class of its own code"):
        mechvlm.load(system[0] / "out", trust_remote_code=True)
    vlm = mechvlm.load(model, processor)
    inputs = vlm.inputs(noise_image(0), PROMPT)
    assert len(inputs.tokens.image) == 16
    with torch.no_grad(), vlm.trace(inputs):
        logits = nnsight.save(vlm.logits)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**vlm.encoding(inputs)).logits)


def test_its_code_comes_along_and_is_asked_for(system):
    """No class of transformers is taken in its stead."""
    code = Path(minigpt_v2.__file__).with_name("modeling_minigpt_v2.py").read_text()
    assert (system[0] / "out" / "modeling_minigpt_v2.py").read_text() == code
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageTextToText.from_pretrained(system[0] / "out", trust_remote_code=False)


@torch.no_grad()
def test_minigpt4_for_llama_2(system, load, tmp_path):
    """The projection alone, no settings: 224 pixels, 16 x 16 patches; `ln_vision` given."""
    at, _, tower, llm = system
    norm = random_tensors({"ln_vision.weight": (WIDTH,), "ln_vision.bias": (WIDTH,)}, seed=9)
    own = projection(4 * WIDTH)
    trained_file(tmp_path / "own.pth", own | norm)
    convert(at, checkpoint=str(tmp_path / "own.pth"), out=str(tmp_path / "out"))
    model, processor = load(tmp_path / "out")
    batch = processor(images=noise_image(0), text=PROMPT, return_tensors="pt")
    tower = tower | {"pos_embed": older.larger(tower["pos_embed"], 16)}
    image = older.strips_image(own, tower, batch["pixel_values"], BLOCKS, norm)
    want = older.around_image(llm, llama_tokenizer(()), PROMPT, "<ImageHere>", image)
    assert (model(**batch).logits[..., :32000] - want).abs().max() < 4e-6 * want.abs().max()
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    text = processor.apply_chat_template([question], add_generation_prompt=True)
    assert text.startswith("Give the following image: <Img>ImageContent</Img>. You will")
    assert text.endswith("questions.[INST] <Img><ImageHere></Img> What is it? [/INST] ")


def test_newer_names_of_lora_and_the_usual_alpha(system, tmp_path):
    """peft names the adapter `default` since its release 0.3; 16 is the original's alpha."""
    at, own, _, llm = system
    renamed = {
        name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): t for name, t in own.items()
    }
    trained_file(tmp_path / "own.pth", renamed, image_size=56)
    convert(at, checkpoint=str(tmp_path / "own.pth"), out=str(tmp_path / "out"))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    (merged,) = (t for name, t in weights.items() if name.endswith("layers.0.self_attn.q_proj.weight"))
    change = merged - llm.model.layers[0].self_attn.q_proj.weight
    want = 16 / 3 * own[f"{QUERIES_OF}.lora_B.weight"] @ own[f"{QUERIES_OF}.lora_A.weight"]
    assert torch.allclose(change, want, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{QUERIES_OF}.lora_B.weight": None}, r"half of the LoRA pair of model\.layers\.0\.self_attn\.q_proj\.weight"),
        ({f"{QUERIES_OF}.lora_B.weight": torch.ones(5, 3)}, r"changes model\.layers\.0\S* by 5 x 32; .* is \(32, 32\)"),
        ({f"{QUERIES_OF.replace('.0.', '.7.')}.lora_{s}.weight": torch.ones(3, 3) for s in "AB"}, "it is not there"),
        (projection(QUERY_WIDTH), r"reads 128 numbers a token; 4 joined patches are 4 x 176.*use minigpt4\.py"),
        ({"llama_proj.weight": None}, "lacks llama_proj.weight"),
        ({"Qformer.bert.x": torch.ones(1)}, r"no place in the model: Qformer\.bert\.x"),
    ],
)  # fmt: skip
def test_a_file_with_missing_or_other_tensors(system, tmp_path, change, message):
    at, own, _, _ = system
    trained_file(tmp_path / "own.pth", {n: t for n, t in (own | change).items() if t is not None}, image_size=112)
    with pytest.raises(ConversionError, match=message):
        convert(at, checkpoint=str(tmp_path / "own.pth"), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command(system, capsys):
    with pytest.raises(SystemExit) as help_shown:
        minigpt_v2.main(["--help"])
    assert help_shown.value.code == 0
    assert "minigptv2_checkpoint.pth --llm Llama-2-7b-chat-hf" in capsys.readouterr().out
    at = system[0]
    options = ["--llm", str(at / "llm"), "--vision", str(at / "eva.pth"), "--out", str(at / "out")]
    with pytest.raises(SystemExit, match=r"minigpt_v2\.py: --out .*out exists and is not an empty folder"):
        minigpt_v2.main([str(at / "own.pth"), *options])
