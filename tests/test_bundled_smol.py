"""scripts/bundled_smol*.py: packed rows, their loss, and where the parts that are trained start.

With a small random decoder in SmolLM2's place: grouped queries and tied embeddings like its own.
"""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, InstructBlipForConditionalGeneration

from helpers.small_decoder import WIDTH, small_decoder

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bundled_smol as smol  # noqa: E402
import bundled_smol_instructblip as smol_blip  # noqa: E402
import bundled_smol_llava as smol_llava  # noqa: E402
import evaluate_smol  # noqa: E402

from mechvlm import bundled  # noqa: E402
from mechvlm.datasets.scenes import sample_scenes  # noqa: E402

SCENES = list(sample_scenes(3, 0, "train", (1, 2)))
END = "<|im_end|>"


@cache
def decoder():
    return small_decoder()


class OfLlava:
    trained = frozenset({"projector"})
    visual = 64  # in a row

    def __init__(self):
        torch.manual_seed(1)
        self.processor = smol_llava.processor(decoder())
        tower = AutoConfig.from_pretrained(bundled.path("tiny-llava")).vision_config
        self.full = smol_llava.build(decoder(), tower)
        self.texts, self.module = smol_llava.LlavaTexts(self.processor.tokenizer), smol_llava.SmolLlava(self.full)

    def inputs(self, scene, question, answer=""):
        """As Hugging Face's processor encodes them."""
        prompt = f"<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return self.processor(images=scene.render(), text=prompt + answer, return_tensors="pt")

    def answer_ids(self, answer):
        return self.processor.tokenizer(answer).input_ids


class OfInstructBlip:
    trained = frozenset({"qformer", "query_tokens", "projection"})
    visual = 16  # of each prompt

    def __init__(self):
        torch.manual_seed(1)
        self.processor = smol_blip.processor(decoder())
        self.full = smol_blip.build(decoder(), AutoConfig.from_pretrained(bundled.path("tiny-instructblip")))
        torch.nn.init.normal_(self.full.query_tokens)
        self.texts = smol_blip.InstructBlipTexts(self.processor.tokenizer, self.processor.qformer_tokenizer)
        self.module = smol_blip.SmolInstructBlip(self.full)

    def inputs(self, scene, question, answer=""):
        """As Hugging Face's processor encodes them; its Q-Former reads the question alone."""
        text = question + (" " + answer if answer else "")
        inputs = self.processor(images=scene.render(), text=text, return_tensors="pt")
        asked = self.processor.qformer_tokenizer([question], return_tensors="pt")
        return inputs | {"qformer_input_ids": asked.input_ids, "qformer_attention_mask": asked.attention_mask}

    def answer_ids(self, answer):
        return self.processor.tokenizer(" " + answer).input_ids


@pytest.fixture(scope="module", params=[OfLlava, OfInstructBlip])
def kind(request):
    return request.param()


@pytest.fixture(scope="module")
def llava():
    return OfLlava()


def packed(model):
    rng = np.random.default_rng(0)
    rows = [model.texts.chosen(rng, scene, 3) for scene in SCENES]
    batch, kinds = model.texts.pack(rows)
    return batch | {"pixels": smol.pixels_of(SCENES, model.processor.image_processor)}, kinds, rows


def read(model, batch):
    return model.module.states(**{k: v for k, v in batch.items() if k not in ("targets", "weights", "segments")})[0]


def test_packed_rows_give_the_logits_of_separate_prompts(kind):
    """Against Hugging Face's own forward of each prompt, as its processor encodes it."""
    batch, kinds, rows = packed(kind)
    counted = batch["weights"] > 0
    with torch.no_grad():
        logits = kind.module.logits(read(kind, batch)[counted])
        expected, wanted, said = [], [], []
        for scene, row in zip(SCENES, rows, strict=True):
            for name, question, answer in row:
                inputs = kind.inputs(scene, question, answer + END)
                n = len(kind.answer_ids(answer)) + 1
                expected.append(kind.full(**inputs).logits[0, -n - 1 : -1])
                wanted += inputs["input_ids"][0, -n:].tolist()
                said += [name] * n
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert batch["targets"][counted].tolist() == wanted
    assert kinds[counted.numpy()].tolist() == said


@pytest.fixture(scope="module")
def reader(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smol")
    kind.full.save_pretrained(folder)
    kind.processor.save_pretrained(folder)
    return evaluate_smol.Reader("smol", folder)


def test_packed_answers_are_those_of_generate(kind, reader):
    """Rows of one, two and three prompts: each answer is what Hugging Face's `generate` says."""
    images = [scene.render() for scene in SCENES]
    texts = ["Describe the scene.", "How many objects are there?", "What color is the star?"]
    pairs = [(i, text) for i in range(len(images)) for text in texts[: i + 1]]
    said = reader.answers([images[i] for i, _ in pairs], [text for _, text in pairs], n=7)
    for (i, text), answer in zip(pairs, said, strict=True):
        inputs = kind.inputs(SCENES[i], text)
        tokens = kind.full.generate(**inputs, max_new_tokens=7, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == kind.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert len(set(said)) > 3


def test_packed_scores_are_those_of_separate_captions(kind, reader):
    scenes = [scene for scene in SCENES[:2] for _ in range(2)]
    shown = [scene.render() for scene in SCENES[:2]]
    images = [image for image in shown for _ in range(2)]
    captions = ["a red circle on sand.", "a blue star.", "a red circle on sand.", "a yellow square and a red ring."]
    scores = reader.scores(images, "Describe the scene.", captions)
    for scene, caption, score in zip(scenes, captions, scores, strict=True):
        inputs = kind.inputs(scene, "Describe the scene.", caption + END)
        n = len(kind.answer_ids(caption)) + 1
        with torch.no_grad():
            log_probs = kind.full(**inputs).logits[0, -n - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(1, inputs["input_ids"][0, -n:, None]).sum().item()
        assert score == pytest.approx(expected, abs=1e-3)


def test_no_loss_on_the_picture_nor_on_the_prompts(kind):
    batch, _, rows = packed(kind)
    counted = batch["weights"] > 0
    visual = batch["ids"] == kind.texts.image
    assert not counted[visual].any()
    assert not (counted & visual.roll(-1, 1)).any(), "nor on what predicts a visual token"
    assert counted.sum() == sum(len(kind.answer_ids(answer)) + 1 for row in rows for *_, answer in row)
    loss = kind.module(**batch)
    each = F.cross_entropy(kind.module.logits(read(kind, batch)[counted]), batch["targets"][counted], reduction="none")
    weights = batch["weights"][counted]
    torch.testing.assert_close(loss, (each * weights).sum() / weights.sum())


def test_shapes_of_captions_can_weigh_more(kind, monkeypatch):
    """Of captions alone: an answer may be a shape too."""
    row = [("list", "Describe the scene.", "a brown ring and a blue heart."), ("shape", "What is brown?", "ring")]
    plain, _ = kind.texts.pack([row])
    monkeypatch.setattr(kind.texts, "shape_weight", 5.0)
    batch, kinds = kind.texts.pack([row])
    moved = batch["weights"] != plain["weights"]
    assert batch["weights"][moved].tolist() == [5, 5]
    ids = [kind.answer_ids(" " + word if isinstance(kind, OfLlava) else word)[0] for word in ("ring", "heart")]
    assert batch["targets"][moved].tolist() == ids
    assert set(kinds[moved.numpy()]) == {"list"}


def test_tower_and_decoder_are_not_trained(kind):
    batch, *_ = packed(kind)
    kind.module(**batch).backward()
    trained = {n.split(".")[0] for n, p in kind.module.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == kind.trained
    assert {n.split(".")[0] for n, p in kind.module.named_parameters() if p.requires_grad} == kind.trained
    kind.module.zero_grad()


def test_the_picture_is_read_by_its_own_row_alone(kind):
    """Another picture in the second row moves that row's states, and no other's."""
    batch, *_ = packed(kind)
    with torch.no_grad():
        before = read(kind, batch)
        batch["pixels"][1] = batch["pixels"][1].flip(-1)
        moved = (read(kind, batch) - before).abs().amax((1, 2))
    assert moved[1] > 1e-4
    assert max(moved[0], moved[2]) < 1e-5


def test_the_anchor_is_the_distance_to_words(llava):
    batch, *_ = packed(llava)
    embedding = decoder().weights["embed_tokens.weight"]
    anchors = smol_llava.word_targets(SCENES, embedding, llava.texts.encode)
    with torch.no_grad():
        plain, held = llava.module(**batch), llava.module(**batch, anchors=anchors, anchor=0.5)
        distance = (llava.module.image(batch["pixels"]) - anchors).square().mean() / embedding.var()
    torch.testing.assert_close(held - plain, 0.5 * distance)


def test_the_words_of_a_patch(llava):
    """The mean of color and shape where the object is, and the ground elsewhere."""
    embedding = decoder().weights["embed_tokens.weight"]
    scene = SCENES[0]
    (target,) = smol_llava.word_targets([scene], embedding, llava.texts.encode)

    def vector(word):
        return embedding[llava.processor.tokenizer(" " + word).input_ids].mean(0)

    thing = scene.objects[0]
    at = 8 * int(thing.y * 8 / 192) + int(thing.x * 8 / 192)
    torch.testing.assert_close(target[at], (vector(thing.color) + vector(thing.shape)) / 2)
    free = next(i for i in range(64) if not scene.segmentation(96).reshape(8, 12, 8, 12)[i // 8, :, i % 8].any())
    torch.testing.assert_close(target[free], vector(scene.ground))


def test_the_projector_starts_at_its_targets(llava):
    """A target that few directions of the features determine is met."""
    torch.manual_seed(0)
    few = torch.randn(40, 64, 4)
    features, targets = few @ torch.randn(4, 128), torch.tanh(few @ torch.randn(4, WIDTH))
    projector = llava.full.model.multi_modal_projector
    before = (projector(features) - targets).square().mean().item()
    r2 = smol_llava.start_projector(projector, features, targets)
    residual = (projector(features) - targets).square().mean().item()
    assert r2 == pytest.approx(1 - residual / targets.flatten(0, 1).var(0, unbiased=False).mean().item(), abs=1e-3)
    assert r2 > 0.8
    assert residual < before / 3


def test_the_projection_starts_as_tiny_words_become_the_decoders():
    """A query that tiny's projection turns into a word's embedding starts near the decoder's."""
    model = OfInstructBlip()
    tiny = InstructBlipForConditionalGeneration.from_pretrained(bundled.path("tiny-instructblip"), dtype=torch.float32)
    smol_blip.start_projection(model.full, tiny, decoder())
    own = smol_blip.llama_tokenizer(False)
    words = ["circle", "star", "red", "blue", "left", "sand"]
    theirs = tiny.language_model.model.embed_tokens.weight[[own.get_vocab()["▁" + w] for w in words]]
    queries = torch.linalg.lstsq(tiny.language_projection.weight, (theirs - tiny.language_projection.bias).T).solution.T
    embedding = decoder().weights["embed_tokens.weight"]
    ours = torch.stack([embedding[model.processor.tokenizer(" " + w).input_ids].mean(0) for w in words])
    with torch.no_grad():
        close = F.cosine_similarity(model.full.language_projection(queries)[:, None], ours[None], dim=-1)
    assert close.argmax(1).tolist() == list(range(len(words)))
    of_unit_variance = model.full.language_projection.weight.norm().item()
    assert of_unit_variance == pytest.approx(embedding.norm(dim=-1).mean().item(), rel=0.5)
