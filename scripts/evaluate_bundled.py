"""Evaluate the bundled models on held-out scenes, and write their model cards.

    python scripts/evaluate_bundled.py

Every number on a card comes from this run: greedy decoding, with the weights as they ship (stored
in float16, computed in float32). Each seed draws scenes and swap pairs of its own. A figure is the
mean over the seeds, with the sample standard deviation between them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bundled_card import draw_attention, draw_lens, write_card
from evaluate_smol import Reader
from transformers import AutoModelForImageTextToText, AutoProcessor

import mechvlm as mv
from mechvlm.bundled.assemble import assembled
from mechvlm.datasets.scenes import COLORS, GROUNDS, SHAPES, sample_scenes
from mechvlm.datasets.swaps import attribute_swaps, relation_swaps

BUNDLED = Path(__file__).resolve().parent.parent / "mechvlm" / "bundled"
CAPTION, PLACES = "Describe the scene.", "Where are the objects?"
# Seeds on which nothing was chosen. Training drew 1 and 7 (of other splits); tests and tutorials draw
# seeds below 100; the figures of earlier cards, by which the models were judged good enough to ship,
# come from 100.
SEEDS = (1001, 1002, 1003, 1004, 1005)
KINDS = ("color", "shape", "count", "exists", "where", "relation")


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


def mean(values) -> dict:
    """Mean of the values that are not NaN, and their number. The mean of none is NaN."""
    kept = [float(v) for v in values if not math.isnan(v)]
    return {"n": len(kept), "value": sum(kept) / len(kept) if kept else math.nan}


def over_seeds(measured: list):
    """Figures of several seeds, joined: {"n": sum, "value": mean, "sd": between the seeds}.

    `measured` holds each seed's figures in the same nesting of dicts and lists. "chance" is joined
    like "value". A figure that one seed lacks (NaN) is NaN: a mean over the other seeds would look
    like the others on the card. "sd" is the sample standard deviation, NaN with one seed.
    """
    first = measured[0]
    if isinstance(first, list):
        return [over_seeds(list(part)) for part in zip(*measured, strict=True)]
    if "value" not in first:
        assert all(part.keys() == first.keys() for part in measured), [list(part) for part in measured]
        return {key: over_seeds([part[key] for part in measured]) for key in first}
    values = [part["value"] for part in measured]
    joined = {"n": sum(part["n"] for part in measured), "value": sum(values) / len(values)}
    has_spread = len(values) > 1 and not any(map(math.isnan, values))
    joined["sd"] = statistics.stdev(values) if has_spread else math.nan
    if "chance" in first:
        joined["chance"] = sum(part["chance"] for part in measured) / len(measured)
    return joined


def captions(model, scenes, images) -> dict:
    """Rate of captions that name exactly the scene's objects, by their number, and its ground."""
    texts = model.answers(images, [CAPTION] * len(images))
    hits: dict = {k: [] for k in (1, 2, 3, "1 and 2", "ground")}
    for scene, text in zip(scenes, texts, strict=True):
        n = len(scene.objects)
        hits[n].append(named(text) == Counter((o.color, o.shape) for o in scene.objects))
        hits["ground"].append(text.rstrip(".").split(" ")[-1] == scene.ground)
    hits["1 and 2"] = hits[1] + hits[2]
    return {k: mean(v) for k, v in hits.items()}


def questions(model, scenes, images) -> dict:
    """Rate of right answers by kind of question; chance is always giving the commonest answer."""
    posed = [(i, q) for i, s in enumerate(scenes) for q in one_of_each_kind(s)]
    texts = model.answers([images[i] for i, _ in posed], [q.text for _, q in posed], 4)
    hits: dict = {kind: [] for kind in KINDS}
    answers = {kind: Counter() for kind in KINDS}
    for (_, q), text in zip(posed, texts, strict=True):
        hits[q.kind].append(text.rstrip(".") == q.answer)
        answers[q.kind][q.answer] += 1
    rates = {
        k: mean(v) | {"chance": max(answers[k].values(), default=math.nan) / max(len(v), 1)} for k, v in hits.items()
    }
    return rates | {"color, shape and count": mean(hits["color"] + hits["shape"] + hits["count"])}


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
    return {k: mean(v.tolist()) for k, v in scores._asdict().items()}


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


def attention(vlm, scenes, images, answering: bool) -> dict:
    """Norm-based attention, by layer, from the position that names a color to the named object.

    The mean over the object's patches, divided by the mean over all patches ("ratio"). In scenes of
    several objects, the same ("several") and that of the other objects' patches ("other").
    While answering, "example" is (image, object's name, norms [layer patch]) of the first such scene.

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
    figures = {k: [mean(v) for v in layers] for k, layers in ratios.items()}
    return figures | {"example": example} if answering else figures


def measure(model, vlm, seed: int, n_scenes: int, n_pairs: int, n_lens: int = 200) -> dict:
    """All figures of a model on one seed's scenes and pairs, each as `mean` gives it.

    The lens is read on the first `n_lens` scenes. The "example" of "attention" is for the card's
    picture.
    """
    scenes = list(sample_scenes(n_scenes, seed, "test"))
    images = [s.render() for s in scenes]
    figures = {
        "captions": captions(model, scenes, images),
        "questions": questions(model, scenes, images),
        "attribute": swaps(model, attribute_swaps(n_pairs, seed), CAPTION),
        "relation": swaps(model, relation_swaps(n_pairs, seed), PLACES),
        "lens": lens(vlm, scenes[:n_lens], images[:n_lens]),
    }
    if model.name == "tiny-llava":
        for name, answering in (("attention", True), ("attention while describing", False)):
            figures[name] = attention(vlm, scenes[:200], images[:200], answering)
    return figures


def measured_once(path: Path | None, measured: Callable[[], dict]) -> dict:
    """A seed's figures: those that are kept at `path`, or measured now and kept there."""
    if path is None:
        return measured()
    if not path.is_file():
        figures = measured()
        figures.get("attention", {}).pop("example", None)  # a picture, which JSON does not hold
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures), encoding="utf-8")
    # Numbers of objects are keys, which JSON holds as text.
    figures = json.loads(path.read_text(encoding="utf-8"))
    return figures | {"captions": {int(k) if k.isdigit() else k: v for k, v in figures["captions"].items()}}


def draws(args: argparse.Namespace) -> str:
    """The card's sentence about the scenes. Only of the default seeds can it say more."""
    fresh = ", on which nothing was chosen" if tuple(args.seeds) == SEEDS else ""
    return (
        f"{len(args.seeds)} draws of {args.scenes} scenes and {args.pairs} pairs of each kind, by the seeds "
        f"{', '.join(map(str, args.seeds))}{fresh}."
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*mv.bundled.NAMES], help="models (default: those that ship whole)")
    parser.add_argument("--folder", type=Path, default=BUNDLED, help="where the models' folders are")
    parser.add_argument("--scenes", type=int, default=300, help="held-out scenes of each seed (default: 300)")
    parser.add_argument("--pairs", type=int, default=200, help="swap pairs of each kind and seed (default: 200)")
    parser.add_argument("--lens", type=int, default=200, help="of them, scenes for the lens (default: 200)")
    parser.add_argument("--keep", type=Path, help="folder in which each seed's figures are kept, and found again")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=SEEDS,
        help=f"of scenes and pairs (default: {' '.join(map(str, SEEDS))})",
    )
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"a seed is given twice: {' '.join(map(str, args.seeds))}")
    if args.threads:
        torch.set_num_threads(args.threads)
    for name in args.names:
        folder = args.folder / name
        whole = assembled(folder) if name in mv.bundled.WITH_SMOLLM2 else folder
        model = (Reader if name in mv.bundled.WITH_SMOLLM2 else Model)(name, whole)
        vlm, by_seed = mv.load(str(whole), dtype="float32"), []
        for seed in args.seeds:
            kept = args.keep and args.keep / f"{name}-{seed}-{args.scenes}-{args.pairs}-{args.lens}.json"
            work = partial(measure, model, vlm, seed, args.scenes, args.pairs, args.lens)
            by_seed.append(measured_once(kept, work))
            print(f"{name}: seed {seed} measured", flush=True)
        examples = [figures["attention"].pop("example", None) for figures in by_seed if "attention" in figures]
        measured = over_seeds(by_seed) | {"parameters": sum(p.numel() for p in model.model.parameters())}
        draw_lens(measured["lens"], folder / "lens.png")
        if example := next(filter(None, examples), None):
            draw_attention(measured["attention"], example, folder / "norm-attention.png")
        write_card(name, folder, measured, draws(args), args.lens)
        print((folder / "README.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
