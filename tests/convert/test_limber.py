"""LiMBeR's linear map in transformers, against a plain restatement of the original."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    FastVlmForConditionalGeneration,
    LlavaForConditionalGeneration,
    TimmWrapperConfig,
    TimmWrapperModel,
)

import mechvlm
from helpers import older
from helpers.images import noise_image
from helpers.older_files import LLM_WIDTH, beit_folder, gptj_folder, projection, random_tensors

sys.path.insert(0, str(Path(mechvlm.__file__).parents[1] / "scripts" / "convert"))
import limber
from tensors import ConversionError

pytestmark = pytest.mark.long

PROMPT = "<|image|>A picture of"
FILES = ("proj.ckpt", "llm", "encoder", "out")


def write_map(path: Path, columns: int) -> dict[str, torch.Tensor]:
    """proj.ckpt: the state of a torch.nn.Linear."""
    own = {name.removeprefix("llama_proj."): tensor for name, tensor in projection(columns).items()}
    torch.save(own, path)
    return own


def convert(at: Path, **changed: str) -> None:
    """With the files of a folder; `changed` names others, by the arguments of `limber.convert`."""
    names = dict(zip(("checkpoint", "llm", "vision", "out"), FILES, strict=True)) | changed
    limber.convert(**{name: str(at / file) for name, file in names.items()})


@pytest.fixture(scope="module", params=["pt22k-ft22k", "pt22k"])
def system(tmp_path_factory, request):
    """The files, their models, and the folder that was made of them."""
    at = tmp_path_factory.mktemp("limber")
    own, (llm, tokenizer) = write_map(at / "proj.ckpt", 24), gptj_folder(at / "llm")
    tower = beit_folder(at / "encoder", shared=request.param == "pt22k")
    convert(at)
    llm.resize_token_embeddings(len(tokenizer))  # as the original does
    return at, own, tower, llm, tokenizer


@torch.no_grad()
def test_the_logits_are_the_originals(system):
    """Measured: 2e-7 of the largest; GPT-J's bias at the unembedding is among them."""
    at, own, tower, llm, tokenizer = system
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(at / "out"),
        AutoProcessor.from_pretrained(at / "out"),
    )
    assert isinstance(model, LlavaForConditionalGeneration)
    batch = processor(images=noise_image(0), text=PROMPT, return_tensors="pt")
    image = tower(batch["pixel_values"]).last_hidden_state[:, 1:] @ own["weight"].T + own["bias"]
    want = older.around_image(llm, tokenizer, PROMPT, "<|image|>", image)
    got = model(**batch).logits
    assert got.shape == want.shape
    assert (got - want).abs().max() < 2e-6 * want.abs().max()
    new = model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert new[0, -1] == want[0, -1].argmax()


def test_the_image_stands_where_the_prompt_says(system):
    """One word a patch; the words are GPT-2's and the image's, GPT-J's spare ones are gone."""
    at, _, _, _, plain = system
    processor = AutoProcessor.from_pretrained(at / "out")
    assert processor.tokenizer.get_vocab() == plain.get_vocab()
    ids = processor(images=noise_image(0), text="Look: <|image|>A picture of").input_ids[0]
    image_id = plain.convert_tokens_to_ids("<|image|>")
    assert ids == [*plain("Look: ").input_ids, *[image_id] * 16, *plain("A picture of").input_ids]
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A picture of"}]}
    assert processor.apply_chat_template([question], add_generation_prompt=True) == PROMPT


@pytest.mark.parametrize("total", [0, LLM_WIDTH, -LLM_WIDTH])
def test_the_bias_goes_into_the_norm(total):
    """On any state, whatever the norm's biases over its weights add up to; no weight may be 0."""
    scale, shift = torch.rand(LLM_WIDTH) + 0.1, torch.randn(LLM_WIDTH)
    shift += scale * (total / LLM_WIDTH - (shift / scale).mean())
    weight, bias = torch.randn(50, LLM_WIDTH), 10 * torch.randn(50)
    names = ("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight", "lm_head.bias")
    tensors = dict(zip(names, (scale, shift, weight, bias), strict=True))
    state = 3 * torch.randn(7, LLM_WIDTH) + 5
    want = torch.nn.functional.layer_norm(state, scale.shape, scale, shift) @ weight.T + bias
    limber.fold_bias(tensors)
    assert set(tensors) == set(names[:3])
    got = torch.nn.functional.layer_norm(state, scale.shape, scale, tensors[names[1]]) @ tensors[names[2]].T
    assert (got - want).abs().max() < 3e-6 * want.abs().max()
    scale[3] = 0
    with pytest.raises(ConversionError, match=r"logits would differ by nan .* smallest weight is 0\.0e\+00"):
        limber.fold_bias(dict(zip(names, (scale, shift, weight, bias), strict=True)))


@torch.no_grad()
def test_with_clips_resnet(tmp_path, monkeypatch):
    """timm's smaller CLIP ResNet, of the same plan as RN50x16, on 3 x 3 patches. Measured: 2e-7."""
    pytest.importorskip("timm", reason="CLIP's ResNet is timm's")
    monkeypatch.setattr(limber, "CLIP_SIZE", 96)
    encoder = TimmWrapperModel(TimmWrapperConfig(architecture="resnet50_clip_gap")).eval()
    for seed, (name, values) in enumerate(encoder.state_dict().items()):
        if ".bn." in name and values.is_floating_point():
            noise = random_tensors({name: values.shape}, seed)[name]
            values.copy_(noise if "mean" in name or "bias" in name else (1 + noise).abs() + 0.1)
    encoder.save_pretrained(tmp_path / "encoder")
    own, (llm, tokenizer) = write_map(tmp_path / "proj.ckpt", 2048), gptj_folder(tmp_path / "llm")
    convert(tmp_path)
    llm.resize_token_embeddings(len(tokenizer))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert isinstance(model, FastVlmForConditionalGeneration)
    batch = AutoProcessor.from_pretrained(tmp_path / "out")(images=noise_image(0), text=PROMPT, return_tensors="pt")
    tower = {name.removeprefix("timm_model."): tensor for name, tensor in encoder.state_dict().items()}
    patches = older.clip_resnet(tower, batch["pixel_values"])
    assert patches.shape[1] == 9
    want = older.around_image(llm, tokenizer, PROMPT, "<|image|>", patches @ own["weight"].T + own["bias"])
    got = model(**batch).logits
    assert got.shape == want.shape
    assert (got - want).abs().max() < 3e-6 * want.abs().max()


def test_what_is_refused(system, tmp_path):
    at = system[0]
    write_map(at / "wide.ckpt", 2048)
    with pytest.raises(ConversionError, match="maps 2048 numbers to 32; --vision has 24, --llm 32"):
        convert(at, checkpoint="wide.ckpt", out="new")
    torch.save({"weight": torch.ones(32, 24)}, at / "half.ckpt")
    with pytest.raises(ConversionError, match="lacks bias; it holds weight"):
        convert(at, checkpoint="half.ckpt", out="new")
    torch.save({"weight": torch.ones(32, 24), "bias": torch.ones(32), "ln.weight": torch.ones(32)}, at / "more.ckpt")
    with pytest.raises(ConversionError, match=r"no place in the model: ln\.weight"):
        convert(at, checkpoint="more.ckpt", out="new")
    beit_folder(tmp_path / "normed", shared=False, use_mean_pooling=False)
    with pytest.raises(ConversionError, match="is a beit; a BEiT without a last norm"):
        convert(at, vision=str(tmp_path / "normed"), out="new")
    with pytest.raises(ConversionError, match="is a gptj; a BEiT"):
        convert(at, vision="llm", out="new")
    with pytest.raises(ConversionError, match=r"--vision .*nowhere cannot be read"):
        convert(at, vision="nowhere", out="new")
    assert not (at / "new").exists()


def test_the_command(system, capsys):
    with pytest.raises(SystemExit) as help_shown:
        limber.main(["--help"])
    assert help_shown.value.code == 0
    assert "limber_weights/beit_ft_linear/proj.ckpt" in capsys.readouterr().out
    at = system[0]
    limber.main(
        [str(at / "proj.ckpt"), "--llm", str(at / "llm"), "--vision", str(at / "encoder"), "--out", str(at / "again")]
    )
    assert json.loads((at / "again" / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]
