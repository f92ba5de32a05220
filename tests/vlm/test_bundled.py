"""The bundled models load offline like any checkpoint, and do what their cards say.

Checked on a few held-out scenes.
"""

import re

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mechvlm as mv
from mechvlm import bundled
from mechvlm.datasets.scenes import sample_scenes

CLASSES = {"tiny-llava": "LlavaForConditionalGeneration", "tiny-instructblip": "InstructBlipForConditionalGeneration"}


@pytest.fixture(scope="module", params=bundled.NAMES)
def loaded(request):
    folder = bundled.path(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return request.param, model, AutoProcessor.from_pretrained(folder)


def answer_of(loaded, image, text):
    name, model, processor = loaded
    prompt = f"USER: <image>\n{text} ASSISTANT:" if name == "tiny-llava" else text
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokens[-1] == processor.tokenizer.eos_token_id  # the model ends its answer itself
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_class_and_size(loaded):
    name, model, _ = loaded
    assert type(model).__name__ == CLASSES[name]
    assert sum(p.stat().st_size for p in bundled.path(name).rglob("*") if p.is_file()) <= 10_000_000
    assert {p.suffix for p in bundled.path(name).rglob("*") if p.is_file()} <= {
        ".json",
        ".safetensors",
        ".md",
        ".jinja",
        ".png",
    }
    assert (bundled.path(name) / "README.md").exists()


def test_embeddings_are_not_tied(loaded):
    _, model, _ = loaded
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_unknown_name():
    with pytest.raises(KeyError, match="tiny-llava"):
        bundled.path("tiny-flamingo")


def test_a_folder_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(bundled.path("tiny-llava"))
    vlm = mv.load("~/model", check=False)
    assert torch.equal(vlm.hf.lm_head.weight, mv.load("tiny-llava", dtype="float16", check=False).hf.lm_head.weight)


def test_one_object_captions(loaded):
    scenes = list(sample_scenes(6, seed=50, split="test", counts=(1,)))
    captions = [answer_of(loaded, s.render(), "Describe the scene.") for s in scenes]
    right = sum(f"{s.objects[0].name} " in t for s, t in zip(scenes, captions, strict=True))
    assert right >= 5, captions


def test_answers(loaded):
    right, answers = 0, []
    for scene in sample_scenes(6, seed=51, split="test", counts=(1, 2)):
        for q in [q for q in scene.questions() if q.kind in ("color", "count")][:2]:
            answer = answer_of(loaded, scene.render(), q.text)
            answers.append((q.text, q.answer, answer))
            assert re.fullmatch(r"\w+", answer)
            right += answer == q.answer
    assert right >= 0.7 * len(answers), answers
