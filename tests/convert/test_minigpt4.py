"""MiniGPT-4's checkpoint in transformers, against a plain restatement of the original."""

import json
import sys
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    BlipImageProcessor,
    LlavaProcessor,
)

import mechvlm
from helpers import older
from helpers.images import noise_image
from helpers.models import llama_tokenizer
from helpers.older_files import (
    BLOCKS,
    LAYERS,
    QUERIES,
    QUERY_WIDTH,
    WIDTH,
    eva_file,
    gptj_folder,
    llama_folder,
    projection,
    qformer_file,
    trained_file,
)

sys.path.insert(0, str(Path(mechvlm.__file__).parents[1] / "scripts" / "convert"))
import minigpt4
from folder import add_word, with_llama_spaces
from tensors import ConversionError

pytestmark = pytest.mark.long

PROMPT = "###Human: <Img><ImageHere></Img> What is it?###Assistant: "
ONE = torch.ones(1)
FILES = ("own.pth", "llm", "eva.pth", "qformer.pth", "out")


def convert(at: Path, **changed: str) -> None:
    """With a folder's files; `changed` names others, by the arguments of `minigpt4.convert`."""
    names = dict(zip(("checkpoint", "llm", "vision", "qformer", "out"), FILES, strict=True)) | changed
    minigpt4.convert(**{name: str(at / file) for name, file in names.items()}, blocks=BLOCKS)


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """The files, their tensors, and the folder that was made of them."""
    at = tmp_path_factory.mktemp("minigpt4")
    tower, blip, own = eva_file(at / "eva.pth", grid=4), qformer_file(at / "qformer.pth"), projection(QUERY_WIDTH)
    trained_file(at / "own.pth", own, arch="mini_gpt4", image_size=56)
    llm = llama_folder(at / "llm")
    convert(at)
    return at, own, tower, blip, llm


@pytest.fixture(scope="module")
def loaded(system):
    at = system[0]
    return AutoModelForImageTextToText.from_pretrained(at / "out"), AutoProcessor.from_pretrained(at / "out")


@torch.no_grad()
def original(system, pixels: torch.Tensor, prompt: str) -> torch.Tensor:
    _, own, tower, blip, llm = system
    image = older.minigpt4_image(own, tower, blip, pixels, BLOCKS, LAYERS)
    return older.around_image(llm, llama_tokenizer(()), prompt, "<ImageHere>", image)


@torch.no_grad()
def test_the_logits_are_the_originals(system, loaded):
    """Measured: 5e-7 of the largest. Without ln_vision the difference is 0.5."""
    model, processor = loaded
    assert isinstance(model, Blip2ForConditionalGeneration)
    batch = processor(images=noise_image(0), text=PROMPT, return_tensors="pt")
    want, got = original(system, batch["pixel_values"], PROMPT), model(**batch).logits
    assert got.shape == (*want.shape[:2], 32001)
    assert (got[..., :32000] - want).abs().max() < 3e-6 * want.abs().max()
    # The image's word reads as <unk> does: never above all words.
    assert torch.equal(got[..., 32000], got[..., 0])
    new = model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert new[0, -1] == want[0, -1].argmax()


@torch.no_grad()
def test_batches_of_prompts_and_images(system, loaded):
    model, processor = loaded
    prompts = [PROMPT, "Look. <Img><ImageHere></Img> Go on with this one, which is longer, please, by far."]
    batch = processor(images=[noise_image(1), noise_image(2)], text=prompts, return_tensors="pt", padding=True)
    assert not batch["attention_mask"].all()
    logits = model(**batch).logits[..., :32000]
    for row, prompt in enumerate(prompts):
        want = original(system, batch["pixel_values"][row : row + 1], prompt)
        assert (logits[row, -want.shape[1] :] - want[0]).abs().max() < 1e-5 * want.abs().max()


def test_the_image_stands_where_the_prompt_says(loaded):
    """Between the pieces of the prompt, which are tokenized apart: both begin with a space."""
    _, processor = loaded
    assert isinstance(processor, LlavaProcessor)
    tokenizer = processor.tokenizer
    written = tokenizer.convert_ids_to_tokens(processor(images=noise_image(0), text=PROMPT).input_ids[0])
    start = ["<s>", "▁###", "H", "uman", ":", "▁<", "Img", ">"]
    assert written[: len(start)] == start
    assert written[len(start) : len(start) + QUERIES] == ["<ImageHere>"] * QUERIES
    assert written[len(start) + QUERIES :][:6] == ["▁</", "Img", ">", "▁What", "▁is", "▁it"]
    text = "What is it? A cup, on a table."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert (processor.image_token, processor.image_token_id) == ("<ImageHere>", 32000)
    assert isinstance(processor.image_processor, BlipImageProcessor)


@pytest.mark.parametrize(
    "prompt",
    [PROMPT, "[INST] <Img><ImageHere></Img> [vqa]  two  spaces, and é [/INST]", "<ImageHere> what\nis", "a<ImageHere>b"],
)  # fmt: skip
def test_the_pieces_are_sentencepieces(prompt, tmp_path):
    """From a folder as LLaMA's first ones, with a tokenizer.model alone, which sentencepiece itself
    reads; the original gives it the pieces of the prompt one by one."""
    text = ["Human: <Img></Img> What is it? Assistant: the image once I provide it to you. [INST] [vqa] [/INST]"] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = with_llama_spaces(AutoTokenizer.from_pretrained(tmp_path))
    word = add_word(tokenizer, "<ImageHere>")
    spm = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    before, after = prompt.split("<ImageHere>")
    assert tokenizer(prompt).input_ids == [spm.bos_id(), *spm.encode(before), word, *spm.encode(after)]


def test_the_chat_template_is_the_originals(loaded):
    """As github.com/Vision-CAIR/MiniGPT-4 writes a conversation with Vicuna."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]}
    more = {"role": "user", "content": [{"type": "text", "text": "Whose?"}]}
    text = loaded[1].apply_chat_template([question, answer, more], add_generation_prompt=True)
    assert text == (
        "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. Please "
        "answer my questions.###Human: <Img><ImageHere></Img> What is it?###Assistant: A cup.###Human: Whose?###Assistant: "
    )


def test_every_tensor_that_is_taken_matters(system, capsys):
    """The restatement reads what the conversion takes, and nothing of what it leaves out."""
    at, own, tower, blip, _ = system
    files = {"own.pth": own, "eva.pth": tower, "qformer.pth": blip}
    grown = {
        f: {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in held.items()} for f, held in files.items()
    }
    pixels = torch.ones(1, 3, 56, 56)
    image = older.minigpt4_image(*(grown[f] for f in ("own.pth", "eva.pth", "qformer.pth")), pixels, BLOCKS, LAYERS)
    image.square().sum().backward()
    unread = {f: {n for n, t in held.items() if t.grad is None} for f, held in grown.items()}
    assert unread["own.pth"] == set()
    assert unread["qformer.pth"] == {"t5_proj.weight", "t5_proj.bias", "Qformer.bert.embeddings.position_ids"}
    assert {name.rsplit(".", 1)[0].split(".attn")[0].split(".mlp")[0] for name in unread["eva.pth"]} == {
        "blocks.2", "blocks.2.norm1", "blocks.2.norm2", "norm", "head",
    }  # fmt: skip
    convert(at, out="again")
    said = capsys.readouterr().out
    assert "eva.pth: blocks.2.norm1.weight" in said
    assert "and 5 more not used: the tower is read after 2 blocks." in said
    assert "eva.pth: norm.weight, norm.bias, head.weight, head.bias not used: the original's" in said
    assert "qformer.pth: t5_proj.weight, t5_proj.bias not used" in said
    assert "own.pth: llama_model.model.layers.0.self_attn.rotary_emb.inv_freq, llama_model.model.layers.1" in said


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("own", {"llama_proj.bias": None}, r"lacks llama_proj\.bias; it holds llama_model\.\S+, \S+, llama_proj\.weight"),
        ("own", {"llm.extra": ONE}, r"no place in the model: llm\.extra\. Nothing was written"),
        ("own", projection(4 * WIDTH), r"reads 704 numbers a token; the Q-Former gives 128.*use minigpt_v2\.py"),
        ("eva", {"blocks.1.attn.v_bias": None}, r"eva\.pth lacks blocks\.1\.attn\.v_bias"),
        ("eva", {"blocks.0.gamma_1": ONE}, r"eva\.pth holds tensors that have no place in the model: blocks\.0\.gamma_1"),
        ("qformer", {"Qformer.bert.encoder.layer.2.crossattention.self.key.weight": None}, r"lacks Qformer\.bert\S*key\.weight"),
        ("qformer", {"Qformer.bert.encoder.layer.1.crossattention.self.key.weight": ONE}, "no place in the model: Qformer"),
        ("qformer", {"ln_vision.weight": None, "query_tokens": None}, r"lacks ln_vision\.weight, query_tokens"),
    ],
)  # fmt: skip
def test_a_file_with_missing_or_other_tensors(system, tmp_path, file, change, message):
    data = torch.load(system[0] / f"{file}.pth", weights_only=True)
    held = data.get("model", data)
    held |= change
    for name in [name for name, tensor in change.items() if tensor is None]:
        del held[name]
    torch.save(data, tmp_path / f"{file}.pth")
    for other in ("own.pth", "eva.pth", "qformer.pth", "llm"):
        if other != f"{file}.pth":
            (tmp_path / other).symlink_to(system[0] / other)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path)
    assert not (tmp_path / "out").exists()


class Runs:
    def __reduce__(self):
        return print, ("code that a checkpoint runs",)


def test_a_language_model_in_float16(system, tmp_path):
    """Everything is written in its format but the Q-Former, which the class keeps in float32."""
    at, _, _, blip, llm = system
    llama_folder(tmp_path / "llm").to(torch.float16).save_pretrained(tmp_path / "llm")
    convert(at, llm=str(tmp_path / "llm"), out=str(tmp_path / "out"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    kinds = {name: tensor.dtype for name, tensor in model.named_parameters()}
    floats = {name for name, kind in kinds.items() if kind == torch.float32}
    assert floats == {name for name in kinds if name.startswith(("qformer.", "query_tokens"))}
    assert set(kinds.values()) == {torch.float32, torch.float16}
    query = blip["Qformer.bert.encoder.layer.0.attention.self.query.weight"]
    assert torch.equal(model.qformer.encoder.layer[0].attention.attention.query.weight, query), "not rounded either"
    head = model.language_model.lm_head.weight[:32000]
    assert torch.equal(head, llm.lm_head.weight.to(torch.float16))


def test_files_that_are_refused(system, tmp_path, capsys):
    at = system[0]
    torch.save({"model": {"llama_proj.weight": Runs()}}, at / "runs.pth")
    with pytest.raises(ConversionError, match="no file of tensors and plain data"):
        convert(at, checkpoint="runs.pth", out="new")
    assert "code that" not in capsys.readouterr().out
    with pytest.raises(ConversionError, match="There is no file"):
        convert(at, checkpoint="none.pth", out="new")
    torch.save({"epoch": 3}, at / "empty.pth")
    with pytest.raises(
        ConversionError, match=r"holds no tensors under 'model' or at its top: its keys are \['epoch'\]"
    ):
        convert(at, checkpoint="empty.pth", out="new")
    gptj_folder(tmp_path / "gptj")
    with pytest.raises(ConversionError, match="is a gptj; the checkpoint belongs to a llama"):
        convert(at, llm=str(tmp_path / "gptj"), out="new")
    with pytest.raises(ConversionError, match="cannot be read"):
        convert(at, llm="nowhere", out="new")
    with pytest.raises(ConversionError, match="exists and is not an empty folder"):
        convert(at)
    assert not (at / "new").exists()


def test_the_command(system, capsys):
    at = system[0]
    with pytest.raises(SystemExit) as help_shown:
        minigpt4.main(["--help"])
    assert help_shown.value.code == 0
    assert "pretrained_minigpt4_7b.pth --llm vicuna-7b-v0" in capsys.readouterr().out
    options = [
        str(at / "own.pth"),
        "--llm",
        str(at / "llm"),
        "--qformer",
        str(at / "qformer.pth"),
        "--out",
        str(at / "new"),
    ]
    # As published, 39 blocks are expected.
    with pytest.raises(SystemExit, match=r"minigpt4\.py: .*eva\.pth lacks blocks\.3"):
        minigpt4.main([*options, "--vision", str(at / "eva.pth")])
