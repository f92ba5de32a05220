"""Measures the bundled models on held-out scenes and writes each one's model card: `python scripts/evaluate_bundled.py`.

Everything on a card is measured by this run, on the weights as they ship (float16, computed in float32), decoded greedily.
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

HERE = Path(__file__).resolve().parent.parent / "mechvlm" / "bundled"
CAPTION, PLACES = "Describe the scene.", "Where are the objects?"
SEED = 100  # scenes that neither training nor tuning drew, of a split that training never shows


def prompt(name: str, text: str) -> str:
    return f"USER: <image>\n{text} ASSISTANT:" if name == "tiny-llava" else text


class Model:
    def __init__(self, name: str, folder: Path):
        self.name = name
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "right"

    def encode(self, images, texts):
        return self.processor(images=images, text=texts, return_tensors="pt", padding=True)

    @torch.no_grad()
    def answers(self, images, texts, n=32) -> list[str]:
        """Greedy answers. Prompts of one length go together, so that nothing is padded."""
        groups, out = defaultdict(list), [""] * len(texts)
        for i, t in enumerate(texts):
            ids = self.processor.tokenizer(t).input_ids
            query = len(self.processor.qformer_tokenizer(t).input_ids) if self.name == "tiny-instructblip" else 0
            groups[len(ids), query].append(i)
        for at in groups.values():
            for part in (at[i : i + 64] for i in range(0, len(at), 64)):
                batch = self.encode([images[i] for i in part], [prompt(self.name, texts[i]) for i in part])
                tokens = self.model.generate(**batch, max_new_tokens=n, do_sample=False)
                if tokens.shape[1] > batch["input_ids"].shape[1]:
                    tokens = tokens[:, batch["input_ids"].shape[1] :]
                for i, text in zip(
                    part, self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True
                ):
                    out[i] = text.strip()
        return out

    @torch.no_grad()
    def scores(self, images, text, captions) -> list[float]:
        """Log-probability of each image's caption (nats), the end of the sentence with it."""
        tokenizer, groups, out = self.processor.tokenizer, defaultdict(list), [0.0] * len(images)
        told = [[*tokenizer(c, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for c in captions]
        for i, ids in enumerate(told):
            groups[len(ids)].append(i)
        for at in groups.values():
            for part in (at[i : i + 64] for i in range(0, len(at), 64)):
                batch = self.encode([images[i] for i in part], [prompt(self.name, text)] * len(part))
                n, more = batch["input_ids"].shape[1], torch.tensor([told[i] for i in part])
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
    n = len(hits)
    p = sum(hits) / n if n else math.nan
    return {"n": n, "value": p, "se": math.sqrt(p * (1 - p) / n) if n else math.nan}


def captions(model, scenes, images) -> dict:
    said, out = model.answers(images, [CAPTION] * len(images)), defaultdict(list)
    for scene, text in zip(scenes, said, strict=True):
        n = len(scene.objects)
        out[n].append(named(text) == Counter((o.color, o.shape) for o in scene.objects))
        out["ground"].append(text.rstrip(".").split(" ")[-1] == scene.ground)
    return {k: rate(v) for k, v in sorted(out.items(), key=str)} | {"said": said}


def questions(model, scenes, images) -> dict:
    asked = [(i, q) for i, s in enumerate(scenes) for q in one_each(s)]
    said = model.answers([images[i] for i, _ in asked], [q.text for _, q in asked], 4)
    hits, answers = defaultdict(list), defaultdict(Counter)
    for (_, q), text in zip(asked, said, strict=True):
        hits[q.kind].append(text.rstrip(".") == q.answer)
        answers[q.kind][q.answer] += 1
    out = {k: rate(v) | {"chance": max(answers[k].values()) / len(v)} for k, v in hits.items()}
    return out | {"asked": [(i, q.text, q.answer, t) for (i, q), t in zip(asked, said, strict=True)]}


def one_each(scene):
    """Of each kind the first question, in an order that the scene's content decides; yes and no alike often."""
    found = sorted(scene.questions(), key=lambda q: hash_of(scene.content + q.text))
    return list({q.kind: q for q in found}.values())


def hash_of(text: str) -> int:
    value = 0
    for c in text:
        value = (value * 131 + ord(c)) % 1_000_003
    return value


def swaps(model, pairs, text) -> dict:
    """Winoground's three scores (Thrush et al. 2022); chance is 1/4, 1/4 and 1/6."""
    pairs = list(pairs)
    images = [image for pair in pairs for image in pair.images() for _ in range(2)]
    told = model.scores(images, text, [c for pair in pairs for _ in range(2) for c in pair.captions])
    # Image by image, and of each both captions.
    found = mv.pair_scores(torch.tensor(told, dtype=torch.float64).reshape(-1, 2, 2).mT)
    return {k: rate(v.tolist()) for k, v in found._asdict().items()}


def lens(vlm, name, scenes, images) -> dict:
    """Precision and recall of the words that the logit lens reads off the visual tokens (top 1), by layer."""
    out = {by: {m: [[] for _ in range(vlm.n_layers + 1)] for m in ("precision", "recall")} for by in ("word", "token")}
    objects, other = ([[] for _ in range(vlm.n_layers + 1)] for _ in range(2))
    for i in range(0, len(images), 25):
        inputs = vlm.inputs(images[i : i + 25], CAPTION)
        result = mv.logit_lens(vlm, inputs, k=1)
        for j, scene in enumerate(scenes[i : i + 25]):
            said, elsewhere = scene.captions(), scenes[(i + j + 1) % len(scenes)].captions()
            for layer, pieces in enumerate(result.of(j).pieces()):
                for by, measures in out.items():
                    found = mv.precision_recall(pieces, said, by=by)
                    for m in measures:
                        measures[m][layer].append(getattr(found, m))
                things = [p for p in pieces if p[0].strip("▁") not in GROUNDS]
                objects[layer].append(mv.precision_recall(things, said).precision)
                other[layer].append(mv.precision_recall(pieces, elsewhere).precision)
    for measures in out.values():
        for m, layers in measures.items():
            measures[m] = [mean(v) for v in layers]
    return out | {"objects": [mean(v) for v in objects], "other": [mean(v) for v in other]}


def mean(values) -> dict:
    t = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    se = (t.std() / math.sqrt(len(t))).item() if len(t) > 1 else math.nan
    return {"n": len(t), "value": t.mean().item() if len(t) else math.nan, "se": se}


def attention(vlm, scenes, images, asked: bool) -> dict:
    """Norm-based attention from the position that names a color, on the named object's patches over the mean patch.

    `asked`: the color is the answer to a question about one object ("What color is the heart?"). Else a caption has been
    begun with its article, and the object is the one whose color comes out on top.
    """
    own, several, others = ([[] for _ in range(vlm.n_layers)] for _ in range(3))
    drawn = None
    for scene, image in zip(scenes, images, strict=True):
        unique = len({o.color for o in scene.objects}) == len({o.shape for o in scene.objects}) == len(scene.objects)
        for named_object in scene.objects if asked and unique else scene.objects[:1] if unique else ():
            text = f"What color is the {named_object.shape}?" if asked else prompt("tiny-llava", CAPTION) + " a"
            inputs = vlm.inputs(image, text)
            norms, top = mv.read(vlm, inputs, mv.NormAttention(dst="last"), mv.LogitLens(k=1, positions="last"))
            color = top.pieces()[-1][0][0].strip("▁")
            target = next((o for o in scene.objects if o.color == color), None)
            if target is None or (asked and target is not named_object):
                continue
            tokens = inputs.tokens
            covered = {o.name: tokens.grids[0].covered(o.box()).flatten() >= 0.5 for o in scene.objects}
            mine = covered.pop(target.name)
            patches = norms.norm[:, 0, 0][:, tokens.image]
            for layer, written in enumerate(patches / patches.mean(-1, keepdim=True)):
                own[layer].append(written[mine].mean().item())
                if covered:
                    several[layer].append(own[layer][-1])
                    others[layer].append(written[torch.stack(list(covered.values())).any(0)].mean().item())
            if drawn is None and covered:
                drawn = image, target.name, patches
    found = {"ratio": own, "several": several, "other": others}
    return {k: [mean(v) for v in layers] for k, layers in found.items()} | {"drawn": drawn}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["tiny-llava", "tiny-instructblip"])
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=200)
    args = parser.parse_args()
    scenes = list(sample_scenes(args.scenes, SEED, "test"))
    images = [s.render() for s in scenes]
    for name in args.names:
        folder = args.folder / name
        model = Model(name, folder)
        found = {
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "captions": captions(model, scenes, images),
            "questions": questions(model, scenes, images),
            "attribute": swaps(model, attribute_swaps(args.pairs, SEED), CAPTION),
            "relation": swaps(model, relation_swaps(args.pairs, SEED), PLACES),
        }
        vlm = mv.load(str(folder), dtype="float32")
        found["lens"] = lens(vlm, name, scenes[:200], images[:200])
        draw_lens(found["lens"], folder / "lens.png")
        if name == "tiny-llava":
            found["attention"] = attention(vlm, scenes[:200], images[:200], asked=True)
            found["attention while describing"] = attention(vlm, scenes[:200], images[:200], asked=False)
            draw_attention(found["attention"], folder / "norm-attention.png")
        write_card(name, folder, found, args)
        print((folder / "README.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
