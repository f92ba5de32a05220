"""Training batches from scenes: pixels, labels of patches, and text packed after one picture."""

from __future__ import annotations

import re

import numpy as np
import torch
from bundled_models import GRID, LIST_PROMPTS, PATCH, PIXELS, RELATION_PROMPTS, THERE_PROMPTS, processor

from mechvlm.datasets.scenes import COLORS, GROUNDS, SHAPES, sample_scenes

CELLS = GRID * GRID
TEXT = 97  # tokens after the picture in a packed row: a newline, then prompts with answers
CAPTIONS = ("list", "there", "places")
ANSWER = 3.0  # loss weight of answers: one word each, beside captions of about ten
STOP = {"a", "an", "the", "is", "are", "on", "of", "and", "there"}


class Scenes:
    """`n` scenes of a split, with their pixels and the labels of their patches."""

    def __init__(self, split: str, n: int, counts=(1, 2, 3), seed: int = 7):
        self.scenes = list(sample_scenes(n, seed, split, counts))

    def pixels(self) -> torch.Tensor:
        """The pictures after the saved processors' preprocessing, [scene, 3, 96, 96] bfloat16."""
        images = processor("tiny-llava").image_processor
        out = [
            images([s.render() for s in self.scenes[i : i + 64]], return_tensors="pt").pixel_values.bfloat16()
            for i in range(0, len(self.scenes), 64)
        ]
        return torch.cat(out)

    def labels(self, least: float = 0.25) -> torch.Tensor:
        """Labels of each patch: color, shape and ground, [scene, 3, patch].

        Color and shape are 0 where no object covers at least the share `least` of the patch.
        """
        colors, shapes, grounds = list(COLORS), list(SHAPES), list(GROUNDS)
        out = np.zeros((len(self.scenes), 3, CELLS), dtype=np.int64)
        for i, s in enumerate(self.scenes):
            cells = s.segmentation(PIXELS).reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(CELLS, -1)
            cover = np.stack([(cells == k + 1).mean(1) for k in range(len(s.objects))])
            best, shown = cover.argmax(0), cover.max(0) >= least
            out[i, 0] = np.where(shown, np.array([1 + colors.index(o.color) for o in s.objects])[best], 0)
            out[i, 1] = np.where(shown, np.array([1 + shapes.index(o.shape) for o in s.objects])[best], 0)
            out[i, 2] = grounds.index(s.ground)
        return torch.from_numpy(out)


def segments(scene):
    """All that can be said of the scene, as (kind, prompts, answer); any of the prompts fits."""
    n = len(scene.objects)
    orders = [range(n), range(n)[::-1]] if n > 1 else [range(n)]
    out = [("list", LIST_PROMPTS, scene.listing(tuple(o))) for o in orders]
    out.append(("there", THERE_PROMPTS, "there is " + scene.listing()))
    out += [("places", RELATION_PROMPTS, r) for r in scene.relations()]
    return out + [(q.kind, (q.text,), q.answer) for q in scene.questions()]


class Corpus:
    """The scenes' text as token ids."""

    def __init__(self, scenes: Scenes):
        tokenizer = processor("tiny-llava").tokenizer
        vocab = tokenizer.get_vocab()
        self.words = {i: w.replace("▁", "").lower() for w, i in vocab.items()}
        # Word pieces and bytes do not count as decoded words.
        self.stop = STOP | {w for w in self.words.values() if len(w) < 2 or not w.isalpha()}
        # Ids of words after a space, and of words that open a text.
        self.spaced, self.opening = {w[1:]: i for w, i in vocab.items() if w[0] == "▁"}, vocab
        self.marks = {c: vocab[c] for c in ".,?:"}
        self.pad, self.eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.prefix = [1, self.spaced["USER"], vocab[":"], vocab["▁"]]
        self.newline = vocab["<0x0A>"]
        self.assistant = [self.spaced["ASSISTANT"], vocab[":"]]
        self.qvocab = processor("tiny-instructblip").qformer_tokenizer.get_vocab()
        self.segments = [segments(s) for s in scenes.scenes]
        self.truth = [{w for c in s.captions() for w in re.findall(r"\w+", c)} - STOP for s in scenes.scenes]
        labels = scenes.labels().numpy()
        color = np.array([0] + [self.spaced[c] for c in COLORS])
        shape = np.array([0] + [self.spaced[s] for s in SHAPES])
        ground = np.array([self.spaced[g] for g in GROUNDS])[labels[:, 2]]
        shown = labels[:, 0] > 0
        self.cells = np.stack(
            [np.where(shown, color[labels[:, 0]], ground), np.where(shown, shape[labels[:, 1]], ground)], 1
        )
        ours = [*self.prefix[:3], self.prefix[3], vocab["<image>"], self.newline]
        ours += (
            self.encode("What color is the circle?", opening=True) + self.assistant + self.encode("a red star on sand.")
        )
        theirs = tokenizer("USER: <image>\nWhat color is the circle? ASSISTANT: a red star on sand.").input_ids
        assert theirs == ours, (theirs, ours)

    def encode(self, text: str, opening: bool = False) -> list[int]:
        """The ids that the tokenizer gives, computed faster.

        `opening`: the text follows a newline, so its first word has no leading space.
        """
        out = []
        for i, w in enumerate(re.findall(r"\w+|[^\w\s]", text)):
            out.append(self.marks[w] if w in self.marks else self.opening[w] if opening and i == 0 else self.spaced[w])
        return out

    def q_encode(self, text: str) -> list[int]:
        """The ids that the Q-Former's tokenizer gives."""
        words = [self.qvocab[w] for w in re.findall(r"\w+|[^\w\s]", text.lower())]
        return [self.qvocab["[CLS]"], *words, self.qvocab["[SEP]"]]


def pack(data, rng, n, device, text=False, features=None, first=None, kinds=False):
    """A batch of `n` rows, one scene each.

    A row is a prefix, 64 cells, a newline, then prompts with answers. The mask keeps one prompt
    with its answer from seeing another. Loss weights: 1 on captions, `ANSWER` on answers, 0.2 on
    prompts; on the cells 0.5 if they are words, 0 if they are visual tokens.

    Args:
        data: the scenes' text, a `Corpus`.
        rng: draws scenes, prompts and answers.
        n: rows.
        device: of the tensors.
        text: the cells are words. Otherwise they are the tower's `features`.
        features: the tower's output for all scenes, [scene patch width].
        first: take the scenes from this number on instead of drawing them.
        kinds: also return the kind of answer that each position belongs to, [n length].
    """
    at = rng.integers(0, len(data.segments), n) if first is None else np.arange(first, first + n)
    p, t = 4 + CELLS, 4 + CELLS + TEXT
    ids = np.full((n, t), data.pad)
    seg, pos, weight = np.full((n, t), -1), np.tile(np.arange(t), (n, 1)), np.zeros((n, t), dtype=np.float32)
    kind = np.full((n, t), "", dtype=object)
    ids[:, :4], ids[:, p], seg[:, : p + 1] = data.prefix, data.newline, 0
    for row, scene in enumerate(at):
        parts = data.segments[scene]
        # One caption, in most rows one or two relations (they are learned last), then as many
        # questions as fit.
        order = rng.permutation(len(parts)).tolist()
        captions = sorted([i for i in order if parts[i][0] in CAPTIONS], key=lambda i: parts[i][0] != "places")
        caption = captions.pop(0 if rng.random() < 0.5 else -1)
        related = [i for i in order if parts[i][0] == "relation"][: rng.integers(0, 3)]
        order = [caption, *related, *(i for i in order if i not in captions and i not in related and i != caption)]
        fill, number = p + 1, 0
        for i in order:
            name, prompts, answer = parts[i]
            ask = data.encode(prompts[rng.integers(len(prompts))], opening=True) + data.assistant
            say = [*data.encode(answer), data.eos]
            end = fill + len(ask) + len(say)
            if end > t:
                continue
            number += 1
            ids[row, fill:end], seg[row, fill:end] = ask + say, number
            pos[row, fill:end] = np.arange(p + 1, p + 1 + end - fill)
            weight[row, fill : fill + len(ask) - 1] = 0.2
            weight[row, fill + len(ask) - 1 : end - 1] = 1 if name in CAPTIONS else ANSWER
            kind[row, fill + len(ask) - 1 : end - 1] = name
            fill = end
    targets = np.roll(ids, -1, 1)
    out = {}
    if text:
        pick = rng.integers(0, 2, (n, CELLS))
        cells = data.cells[at]
        target_word = np.where(pick == 0, cells[:, 0], cells[:, 1])
        other_word = np.where(pick == 0, cells[:, 1], cells[:, 0])
        targets[:, 3 : p - 1] = target_word
        weight[:, 3 : p - 1] = 0.5
        out["cells"] = torch.from_numpy(np.stack([target_word, other_word], 1)).to(device)
        out["both"] = torch.from_numpy(rng.integers(0, 2, n)).to(device, torch.bfloat16)
    else:
        out["features"] = features[torch.from_numpy(at)].to(device)
    s = torch.from_numpy(seg).to(device)
    mask = torch.ones(t, t, dtype=torch.bool, device=device).tril()[None] & (
        (s[:, None] == 0) | (s[:, None] == s[:, :, None])
    )
    out["ids"] = torch.from_numpy(np.delete(ids, np.s_[4:p], 1)).to(device)
    out |= {"mask": mask, "positions": torch.from_numpy(pos).to(device)}
    out |= {"targets": torch.from_numpy(targets).to(device), "weights": torch.from_numpy(weight).to(device)}
    return (out, kind) if kinds else out


def single(data, rng, n, each, device, features, length=28, kinds=False):
    """A batch with one prompt per row, `each` rows for each of `n` scenes: BOS, prompt, answer.

    The Q-Former gets the prompt too, in its own ids (`q_ids`, `q_mask`). Loss weights: 1 on
    captions, `ANSWER` on answers, 0 elsewhere.
    """
    at = rng.integers(0, len(data.segments), n)
    rows = n * each
    ids, weight = np.full((rows, length), data.pad), np.zeros((rows, length), dtype=np.float32)
    q_ids, q_mask = np.zeros((rows, 16), dtype=np.int64), np.zeros((rows, 16), dtype=np.int64)
    names, row = [], 0
    for scene in at:
        parts = data.segments[scene]
        captions = [i for i, p in enumerate(parts) if p[0] in CAPTIONS]
        others = [i for i in range(len(parts)) if i not in captions]
        related = [i for i in others if parts[i][0] == "relation"]
        lists = [i for i in captions if parts[i][0] != "places"]
        questions = [rng.choice(others), rng.choice(related or others)]
        chosen = [*rng.choice(lists, each - 3), rng.choice(captions), *questions]
        for i in chosen:
            name, prompts, answer = parts[i]
            prompt = prompts[rng.integers(len(prompts))]
            ask, say, q = [1, *data.encode(prompt)], [*data.encode(answer), data.eos], data.q_encode(prompt)
            end = len(ask) + len(say)
            ids[row, :end] = ask + say
            weight[row, len(ask) - 1 : end - 1] = 1 if name in CAPTIONS else ANSWER
            q_ids[row, : len(q)], q_mask[row, : len(q)] = q, 1
            names.append(name)
            row += 1
    out = {
        k: torch.from_numpy(v).to(device)
        for k, v in {"ids": ids, "q_ids": q_ids, "q_mask": q_mask, "weights": weight}.items()
    }
    out["targets"] = torch.from_numpy(np.roll(ids, -1, 1)).to(device)
    out["features"] = features[torch.from_numpy(at)].repeat_interleave(each, 0).to(device)
    return (out, names) if kinds else out
