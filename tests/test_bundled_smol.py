"""scripts/bundled_smol.py: packed rows, their loss, and where the projector starts.

With a small random decoder in SmolLM2's place: grouped queries and tied embeddings like its own.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.small_decoder import WIDTH, small_decoder

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bundled_smol as smol  # noqa: E402
import evaluate_smol  # noqa: E402
from bundled_models import _TOWER, CLIPVisionConfig  # noqa: E402

from mechvlm.datasets.scenes import sample_scenes  # noqa: E402

SCENES = list(sample_scenes(3, 0, "train", (1, 2)))


@pytest.fixture(scope="module")
def decoder():
    return small_decoder()


@pytest.fixture(scope="module")
def full(decoder):
    torch.manual_seed(1)
    return smol.build(decoder, CLIPVisionConfig(**_TOWER, hidden_act="gelu"))


def module_of(decoder, full):
    return smol.Smol(full, len(smol.Texts(smol.tokenizer(decoder)).prefix))


def packed(decoder):
    texts = smol.Texts(smol.tokenizer(decoder))
    rng = np.random.default_rng(0)
    rows = [texts.chosen(rng, scene, 3) for scene in SCENES]
    batch, kinds = texts.pack(rows)
    pixels = smol.pixels_of(SCENES, smol.processor(decoder).image_processor)
    return batch | {"pixels": pixels}, kinds, rows


def test_packed_rows_give_the_logits_of_separate_prompts(decoder, full):
    """Against Hugging Face's own forward of each prompt, as its processor encodes it."""
    batch, kinds, rows = packed(decoder)
    processor = smol.processor(decoder)
    module, counted = module_of(decoder, full), batch["weights"] > 0
    with torch.no_grad():
        states, _ = module.states(*(batch[name] for name in ("pixels", "ids", "mask", "positions")))
        logits = module.logits(states[counted])
        expected, wanted, said = [], [], []
        for scene, row in zip(SCENES, rows, strict=True):
            for kind, question, answer in row:
                prompt = f"<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n"
                inputs = processor(images=scene.render(), text=prompt + answer + "<|im_end|>", return_tensors="pt")
                n = len(processor.tokenizer(answer).input_ids) + 1
                expected.append(full(**inputs).logits[0, -n - 1 : -1])
                wanted += inputs["input_ids"][0, -n:].tolist()
                said += [kind] * n
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert batch["targets"][counted].tolist() == wanted
    assert kinds[counted.numpy()].tolist() == said


@pytest.fixture(scope="module")
def folder(decoder, full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smol")
    full.save_pretrained(folder)
    smol.processor(decoder).save_pretrained(folder)
    return folder


def test_packed_answers_are_those_of_generate(folder, full):
    """Rows of one, two and three prompts: each answer is what Hugging Face's `generate` says."""
    reader = evaluate_smol.Reader("smol-llava", folder)
    images = [scene.render() for scene in SCENES]
    texts = ["Describe the scene.", "How many objects are there?", "What color is the star?"]
    pairs = [(image, text) for i, image in enumerate(images) for text in texts[: i + 1]]
    said = reader.answers(*map(list, zip(*pairs, strict=True)), n=7)
    for (image, text), answer in zip(pairs, said, strict=True):
        prompt = f"<|im_start|>user\n<image>\n{text}<|im_end|>\n<|im_start|>assistant\n"
        inputs = reader.processor(images=image, text=prompt, return_tensors="pt")
        tokens = full.generate(**inputs, max_new_tokens=7, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = reader.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert answer == expected
    assert len(set(said)) > 3


def test_packed_scores_are_those_of_separate_captions(folder, full):
    reader = evaluate_smol.Reader("smol-llava", folder)
    images = [image for scene in SCENES[:2] for image in [scene.render()] * 2]
    captions = ["a red circle on sand.", "a blue star.", "a red circle on sand.", "a yellow square and a red ring."]
    scores = reader.scores(images, "Describe the scene.", captions)
    for image, caption, score in zip(images, captions, scores, strict=True):
        prompt = "<|im_start|>user\n<image>\nDescribe the scene.<|im_end|>\n<|im_start|>assistant\n"
        inputs = reader.processor(images=image, text=prompt + caption + "<|im_end|>", return_tensors="pt")
        n = len(reader.processor.tokenizer(caption).input_ids) + 1
        with torch.no_grad():
            log_probs = full(**inputs).logits[0, -n - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(1, inputs["input_ids"][0, -n:, None]).sum().item()
        assert score == pytest.approx(expected, abs=1e-3)


def test_no_loss_on_the_picture_nor_on_the_prompts(decoder, full):
    batch, _, rows = packed(decoder)
    counted = batch["weights"] > 0
    assert not counted[:, : len(smol.Texts(smol.tokenizer(decoder)).prefix) + 64 + 1].any()
    assert counted.sum() == sum(len(smol.tokenizer(decoder)(a).input_ids) + 1 for row in rows for *_, a in row)
    module = module_of(decoder, full)
    loss = module(**batch)
    states, _ = module.states(*(batch[name] for name in ("pixels", "ids", "mask", "positions")))
    each = F.cross_entropy(module.logits(states[counted]), batch["targets"][counted], reduction="none")
    weights = batch["weights"][counted]
    torch.testing.assert_close(loss, (each * weights).sum() / weights.sum())


def test_only_the_projector_is_trained(decoder, full):
    module = module_of(decoder, full)
    batch, *_ = packed(decoder)
    module(**batch).backward()
    trained = {n.split(".")[0] for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"projector"}
    assert {n.split(".")[0] for n, p in module.named_parameters() if p.requires_grad} == {"projector"}
    module.zero_grad()


def test_the_anchor_is_the_distance_to_words(decoder, full):
    module = module_of(decoder, full)
    batch, *_ = packed(decoder)
    embedding = decoder.weights["embed_tokens.weight"]
    anchors = smol.word_targets(SCENES, embedding, smol.Texts(smol.tokenizer(decoder)).encode)
    with torch.no_grad():
        plain, held = module(**batch), module(**batch, anchors=anchors, anchor=0.5)
        distance = (module.image(batch["pixels"]) - anchors).square().mean() / embedding.var()
    torch.testing.assert_close(held - plain, 0.5 * distance)


def test_the_words_of_a_patch(decoder):
    """The mean of color and shape where the object is, and the ground elsewhere."""
    texts, embedding = smol.Texts(smol.tokenizer(decoder)), decoder.weights["embed_tokens.weight"]
    scene = SCENES[0]
    (target,) = smol.word_targets([scene], embedding, texts.encode)

    def vector(word):
        return embedding[smol.tokenizer(decoder)(" " + word).input_ids].mean(0)

    thing = scene.objects[0]
    at = 8 * int(thing.y * 8 / 192) + int(thing.x * 8 / 192)
    torch.testing.assert_close(target[at], (vector(thing.color) + vector(thing.shape)) / 2)
    free = next(i for i in range(64) if not scene.segmentation(96).reshape(8, 12, 8, 12)[i // 8, :, i % 8].any())
    torch.testing.assert_close(target[free], vector(scene.ground))


def test_the_projector_starts_at_its_targets(full):
    """A target that few directions of the features determine is met."""
    torch.manual_seed(0)
    few = torch.randn(40, 64, 4)
    features, targets = few @ torch.randn(4, 128), torch.tanh(few @ torch.randn(4, WIDTH))
    projector = full.model.multi_modal_projector
    before = (projector(features) - targets).square().mean().item()
    r2 = smol.start_projector(projector, features, targets)
    residual = (projector(features) - targets).square().mean().item()
    assert r2 == pytest.approx(1 - residual / targets.flatten(0, 1).var(0, unbiased=False).mean().item(), abs=1e-3)
    assert r2 > 0.8
    assert residual < before / 3
