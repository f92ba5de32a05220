"""Evaluate the bundled models on held-out scenes, and write their model cards.

    python scripts/evaluate_bundled.py

Every number on a card comes from this run: greedy decoding, with the weights as they ship (stored
in float16, computed in float32).
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import torch
from bundled_card import draw_attention, draw_lens, write_card
from transformers import AutoModelForImageTextToText, AutoProcessor

import mechvlm as mv
from mechvlm.datasets.scenes import COLORS, GROUNDS, SHAPES, sample_scenes
from mechvlm.datasets.swaps import attribute_swaps, relation_swaps

BUNDLED = Path(__file__).resolve().parent.parent / "mechvlm" / "bundled"
CAPTION, PLACES = "Describe the scene.", "Where are the objects?"
SEED = 100  # gives scenes that training and tuning never drew, of a split that training never uses


def prompt(name: str, text: str) -> str:
    return f"USER: <image>\n{text} ASSISTANT:" if name == "tiny-llava" else text


class Model:
    """A bundled model with its processor: greedy answers, and log-probabilities of captions."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "right"

    def encode(self, images, texts):
        return self.processor(images=images, text=texts, return_tensors="pt", padding=True)

    @torch.no_grad()
    def answers(self, images, texts, n=32) -> list[str]:
        """Greedy answers of at most `n` tokens. Batches hold prompts of one length: no padding."""
        groups, out = defaultdict(list), [""] * len(texts)
        for i, t in enumerate(texts):
            ids = self.processor.tokenizer(t).input_ids
            query = len(self.processor.qformer_tokenizer(t).input_ids) if self.name == "tiny-instructblip" else 0
            groups[len(ids), query].append(i)
        for members in groups.values():
            for part in (members[i : i + 64] for i in range(0, len(members), 64)):
                batch = self.encode([images[i] for i in part], [prompt(self.name, texts[i]) for i in part])
                tokens = self.model.generate(**batch, max_new_tokens=n, do_sample=False)
                # `generate` may return the prompt in front of the answer.
                if tokens.shape[1] > batch["input_ids"].shape[1]:
                    tokens = tokens[:, batch["input_ids"].shape[1] :]
                for i, text in zip(
                    part, self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True
                ):
                    out[i] = text.strip()
        return out

    @torch.no_grad()
    def scores(self, images, text, captions) -> list[float]:
        """Log-probability of each image's caption in nats, with its end-of-sequence token."""
        tokenizer, groups, out = self.processor.tokenizer, defaultdict(list), [0.0] * len(images)
        caption_ids = [[*tokenizer(c, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for c in captions]
        for i, ids in enumerate(caption_ids):
            groups[len(ids)].append(i)
        for members in groups.values():
            for part in (members[i : i + 64] for i in range(0, len(members), 64)):
                batch = self.encode([images[i] for i in part], [prompt(self.name, text)] * len(part))
                n, more = batch["input_ids"].shape[1], torch.tensor([caption_ids[i] for i in part])
                batch["input_ids"] = torch.cat([batch["input_ids"], more], 1)
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                logits = self.model(**batch).logits[:, n - 1 : -1].log_softmax(-1)
                for i, value in zip(part, logits.gather(2, more[..., None]).sum((1, 2)).tolist(), strict=True):
                    out[i] = value
        return out


def named(caption: str) -> Counter:
    """The (color, shape) pairs that a caption names."""
    pairs = re.findall(r"([a-z]+) ([a-z]+)", re.sub(r"\b(a|an|and|there|is|on)\b", ".", caption))
    return Counter(p for p in pairs if p[0] in COLORS and p[1] in SHAPES)


def rate(hits) -> dict:
    """Share of hits with its binomial standard error; NaN without any trial."""
    n = len(hits)
    p = sum(hits) / n if n else math.nan
    return {"n": n, "value": p, "se": math.sqrt(p * (1 - p) / n) if n else math.nan}


def captions(model, scenes, images) -> dict:
    """Rate of captions that name exactly the scene's objects, by their number, and its ground."""
    texts, out = model.answers(images, [CAPTION] * len(images)), defaultdict(list)
    for scene, text in zip(scenes, texts, strict=True):
        n = len(scene.objects)
        out[n].append(named(text) == Counter((o.color, o.shape) for o in scene.objects))
        out["ground"].append(text.rstrip(".").split(" ")[-1] == scene.ground)
    return {k: rate(v) for k, v in sorted(out.items(), key=str)}


def questions(model, scenes, images) -> dict:
    """Rate of right answers by kind of question; chance is always giving the commonest answer."""
    posed = [(i, q) for i, s in enumerate(scenes) for q in one_of_each_kind(s)]
    texts = model.answers([images[i] for i, _ in posed], [q.text for _, q in posed], 4)
    hits, answers = defaultdict(list), defaultdict(Counter)
    for (_, q), text in zip(posed, texts, strict=True):
        hits[q.kind].append(text.rstrip(".") == q.answer)
        answers[q.kind][q.answer] += 1
    return {k: rate(v) | {"chance": max(answers[k].values()) / len(v)} for k, v in hits.items()}


def one_of_each_kind(scene):
    """One question of each kind, chosen by a hash, so that "yes" and "no" are about as frequent."""
    shuffled = sorted(scene.questions(), key=lambda q: hash_of(scene.content + q.text))
    return list({q.kind: q for q in shuffled}.values())


def hash_of(text: str) -> int:
    """A hash that is the same in every process, unlike Python's own."""
    value = 0
    for c in text:
        value = (value * 131 + ord(c)) % 1_000_003
    return value


def swaps(model, pairs, text) -> dict:
    """Winoground's three scores (Thrush et al. 2022); chance is 1/4, 1/4 and 1/6."""
    pairs = list(pairs)
    images = [image for pair in pairs for image in pair.images() for _ in range(2)]
    log_probs = model.scores(images, text, [c for pair in pairs for _ in range(2) for c in pair.captions])
    # log_probs go by pair, then image, then caption: [pair image caption].
    scores = mv.pair_scores(torch.tensor(log_probs, dtype=torch.float64).reshape(-1, 2, 2).mT)
    return {k: rate(v.tolist()) for k, v in scores._asdict().items()}


def lens(vlm, scenes, images) -> dict:
    """Precision and recall of the words that the logit lens decodes on visual tokens, by layer.

    The words are the top-1 tokens, compared with the scene's captions, each word once ("word") or
    as often as it occurs ("token"). "objects" is the precision without words of the grounds,
    "other" the precision against another scene's captions.
    """
    out = {by: {m: [[] for _ in range(vlm.n_layers + 1)] for m in ("precision", "recall")} for by in ("word", "token")}
    objects, other = ([[] for _ in range(vlm.n_layers + 1)] for _ in range(2))
    for i in range(0, len(images), 25):
        inputs = vlm.inputs(images[i : i + 25], CAPTION)
        result = mv.logit_lens(vlm, inputs, k=1)
        for j, scene in enumerate(scenes[i : i + 25]):
            own, elsewhere = scene.captions(), scenes[(i + j + 1) % len(scenes)].captions()
            for layer, points in result.pieces(j).items():
                pieces = [*points.values()]
                for by, measures in out.items():
                    scores = mv.precision_recall(pieces, own, by=by)
                    for m in measures:
                        measures[m][layer].append(getattr(scores, m))
                without_grounds = [p for p in pieces if p[0].strip() not in GROUNDS]
                objects[layer].append(mv.precision_recall(without_grounds, own).precision)
                other[layer].append(mv.precision_recall(pieces, elsewhere).precision)
    for measures in out.values():
        for m, layers in measures.items():
            measures[m] = [mean(v) for v in layers]
    return out | {"objects": [mean(v) for v in objects], "other": [mean(v) for v in other]}


def mean(values) -> dict:
    """Mean and standard error of the values that are not NaN."""
    t = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    se = (t.std() / math.sqrt(len(t))).item() if len(t) > 1 else math.nan
    return {"n": len(t), "value": t.mean().item() if len(t) else math.nan, "se": se}


def attention(vlm, scenes, images, answering: bool) -> dict:
    """Norm-based attention, by layer, from the position that names a color to the named object.

    The mean over the object's patches, divided by the mean over all patches ("ratio"). In scenes of
    several objects, the same ("several") and that of the other objects' patches ("other").
    "example" is (image, object's name, norms [layer patch]) of the first such scene.

    `answering`: the color is the answer to a question about one object ("What color is the
    heart?"). Otherwise the prompt opens a caption with "a", and the object is the one whose color
    is the likeliest next token.
    """
    own, several, others = ([[] for _ in range(vlm.n_layers)] for _ in range(3))
    example = None
    for scene, image in zip(scenes, images, strict=True):
        unique = len({o.color for o in scene.objects}) == len({o.shape for o in scene.objects}) == len(scene.objects)
        for named_object in scene.objects if answering and unique else scene.objects[:1] if unique else ():
            text = f"What color is the {named_object.shape}?" if answering else prompt("tiny-llava", CAPTION) + " a"
            inputs = vlm.inputs(image, text)
            norms, top = mv.read(vlm, inputs, mv.NormAttention(dst="last"), mv.LogitLens(k=1, positions="last"))
            color = top.words(state=vlm.n_layers, position=-1).index[0]
            target = next((o for o in scene.objects if o.color == color), None)
            if target is None or (answering and target is not named_object):
                continue
            tokens = inputs.tokens
            covered = {o.name: tokens.grids[0].covered(o.box()).flatten() >= 0.5 for o in scene.objects}
            own_patches = covered.pop(target.name)
            patches = norms.norm[:, 0, 0][:, tokens.image]
            for layer, written in enumerate(patches / patches.mean(-1, keepdim=True)):
                own[layer].append(written[own_patches].mean().item())
                if covered:
                    several[layer].append(own[layer][-1])
                    others[layer].append(written[torch.stack(list(covered.values())).any(0)].mean().item())
            if example is None and covered:
                example = image, target.name, patches
    ratios = {"ratio": own, "several": several, "other": others}
    return {k: [mean(v) for v in layers] for k, layers in ratios.items()} | {"example": example}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["tiny-llava", "tiny-instructblip"], help="models (default: both)")
    parser.add_argument("--folder", type=Path, default=BUNDLED, help="where the models' folders are")
    parser.add_argument("--scenes", type=int, default=300, help="held-out scenes (default: 300)")
    parser.add_argument("--pairs", type=int, default=200, help="swap pairs of each kind (default: 200)")
    args = parser.parse_args()
    scenes = list(sample_scenes(args.scenes, SEED, "test"))
    images = [s.render() for s in scenes]
    for name in args.names:
        folder = args.folder / name
        model = Model(name, folder)
        measured = {
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "captions": captions(model, scenes, images),
            "questions": questions(model, scenes, images),
            "attribute": swaps(model, attribute_swaps(args.pairs, SEED), CAPTION),
            "relation": swaps(model, relation_swaps(args.pairs, SEED), PLACES),
        }
        vlm = mv.load(str(folder), dtype="float32")
        measured["lens"] = lens(vlm, scenes[:200], images[:200])
        draw_lens(measured["lens"], folder / "lens.png")
        if name == "tiny-llava":
            measured["attention"] = attention(vlm, scenes[:200], images[:200], answering=True)
            measured["attention while describing"] = attention(vlm, scenes[:200], images[:200], answering=False)
            draw_attention(measured["attention"], folder / "norm-attention.png")
        write_card(name, folder, measured, args)
        print((folder / "README.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
