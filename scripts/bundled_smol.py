"""What trains the smol models: readers of images before SmolLM2-135M, which is frozen.

Captions and answers pass their loss through the frozen decoder to the part that is trained. The
loss is on the answers' tokens alone: never on a visual position.

A batch holds a few scenes, each with one caption and several questions in one packed row. A mask
keeps each prompt with its answer from seeing the others, so the numbers are those of separate rows.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bundled_data import segments
from bundled_training import fit
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mechvlm.bundled.assemble import VISION_WEIGHTS
from mechvlm.bundled.smollm2 import IMAGE_TOKEN, Decoder
from mechvlm.datasets.scenes import SHAPES, Scene, sample_scene, sample_scenes

OBJECTS = (1, 1, 2, 2, 2, 3)
SEVERAL = (1, 2, 2, 2, 2, 3)
"""Objects in a scene where which color belongs to which shape is still to be learned."""
START, END = "<|im_start|>", "<|im_end|>"
QUESTIONS = 4
"""Questions about a scene in a step, beside its caption."""
WHAT = ("color", "shape", "count")
"""Kinds of questions that every scene is asked."""
WORD = 2.0
"""Loss weight of a one-word answer, beside captions of ten tokens."""
LISTS = ("list", "there")
"""Kinds of captions that name every object."""


def tokenizer(decoder: Decoder, named: bool = True) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, with a token that holds the place of a visual token.

    `named`: it knows that token by name, which LLaVA's processor needs and InstructBLIP's cannot
    read.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=decoder.tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token="<|endoftext|>",
        model_max_length=decoder.settings["max_position_embeddings"],
        **({"extra_special_tokens": {"image_token": IMAGE_TOKEN}} if named else {}),
    )


def generation(decoder: Decoder) -> GenerationConfig:
    """Greedy, and ended where SmolLM2 ends an answer."""
    ids = {name: decoder.settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**ids, do_sample=False, max_new_tokens=32)


class Texts:
    """The scenes' text as packed rows of token ids.

    A subclass says what stands before all prompts of a row, and how a prompt and its answer are
    written. The image token holds the place of each visual token.
    """

    shape_weight = 1.0
    """Loss weight of the shapes in captions. After the first color, only the shape shows whether
    the model knows which belongs to which."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer, self.cache = tokenizer, {}
        self.image, self.end = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.cache[text]

    def shared(self) -> list[int]:
        """Ids that all prompts of a row see."""
        raise NotImplementedError

    def question(self, prompt: str) -> list[int]:
        raise NotImplementedError

    def answer(self, text: str) -> list[int]:
        raise NotImplementedError

    def chosen(self, rng: np.random.Generator, scene: Scene, n: int, captions: int = 1) -> list[tuple[str, str, str]]:
        """Some captions and `n` questions, as (kind, prompt, answer).

        The first caption is at times one of places. Of the questions, one of each kind that says
        what an object is, then one about places or whether it is there, then any others.
        """
        parts = segments(scene)
        order = [parts[i] for i in rng.permutation(len(parts))]
        lists = [p for p in order if p[0] in LISTS]
        places = [p for p in order if p[0] == "places"]
        told = [*(places[:1] if rng.random() < 0.15 else []), *lists][:captions]
        questions = [p for p in order if p[0] not in (*LISTS, "places")]
        each = list({p[0]: p for p in questions if p[0] in WHAT}.values())
        each += [p for p in questions if p[0] not in WHAT][:1]
        rest = [p for p in questions if p not in each]
        parts = [*told, *[*each, *rest][:n]]
        return [(kind, prompts[rng.integers(len(prompts))], answer) for kind, prompts, answer in parts]

    def pack(self, texts: list[list[tuple]]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """Rows of one scene each, from its (kind, prompt, answer), and the kind at each position.

        An answer of None is yet to be given. `segments` numbers each row's prompts from 1; it is 0
        where all of them see, and -1 where nothing stands.
        """
        shared = self.shared()
        asked = [
            [(k, self.question(p), [] if a is None else [*self.answer(a), self.end]) for k, p, a in row]
            for row in texts
        ]
        start = len(shared)
        n, length = len(texts), start + max(sum(len(q) + len(a) for _, q, a in row) for row in asked)
        ids, segments = np.full((n, length), self.end), np.full((n, length), -1)
        positions = np.tile(np.arange(length), (n, 1))
        weights, kinds = np.zeros((n, length), dtype=np.float32), np.full((n, length), "", dtype=object)
        ids[:, :start], segments[:, :start] = shared, 0
        for i, row in enumerate(asked):
            at = start
            for number, (kind, question, answer) in enumerate(row, 1):
                says, end = at + len(question), at + len(question) + len(answer)
                ids[i, at:end], segments[i, at:end] = question + answer, number
                positions[i, at:end] = np.arange(start, start + end - at)
                # A position's target is the next token: the last of the question has the first word.
                weights[i, says - 1 : end - 1] = WORD if len(answer) == 2 else 1.0
                kinds[i, says - 1 : end - 1] = kind
                at = end
        targets = np.roll(ids, -1, 1)
        shapes = np.isin(targets, [self.encode(" " + shape)[0] for shape in SHAPES])
        weights[np.isin(kinds, LISTS) & shapes] = self.shape_weight
        seen, same = segments[:, None] == 0, segments[:, :, None] == segments[:, None]
        mask = np.tril(np.ones((length, length), dtype=bool))[None] & (seen | same)
        batch = {
            "ids": ids, "mask": mask, "positions": positions, "targets": targets, "weights": weights,
            "segments": segments,
        }  # fmt: skip
        return {name: torch.from_numpy(value) for name, value in batch.items()}, kinds


class Smol(nn.Module):
    """What reads images for the frozen decoder; called with a batch, it returns the loss."""

    def __init__(self, decoder: nn.Module, image_token: int):
        super().__init__()
        self.decoder, self.image_token = decoder.requires_grad_(False), image_token

    def image(self, pixels, **asked):
        """Embeddings of the visual tokens, [picture or prompt, token, 576]."""
        raise NotImplementedError

    def read(self, x, mask, positions, past=None):
        """The decoder's last states of the embeddings `x`, [scene, position, 576]; fills `past`."""
        allow = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        return self.decoder(
            inputs_embeds=x, attention_mask=allow[:, None], position_ids=positions, past_key_values=past,
            use_cache=past is not None,
        ).last_hidden_state  # fmt: skip

    def states(self, pixels, ids, mask, positions, past=None, **asked):
        """The last states of packed rows, and their visual tokens."""
        words, image = self.decoder.embed_tokens(ids), self.image(pixels, **asked)
        x = words.masked_scatter((ids == self.image_token)[..., None], image.to(words.dtype))
        return self.read(x, mask, positions, past), image

    def logits(self, states):
        return states @ self.decoder.embed_tokens.weight.T

    def forward(self, targets, weights, segments=None, anchors=None, anchor=0.0, **rows):
        states, image = self.states(**rows)
        counts = weights > 0
        logits = self.logits(states[counts])
        loss = F.cross_entropy(logits.float(), targets[counts], reduction="none")
        loss = (loss * weights[counts]).sum() / weights.sum()
        if anchor:
            scale = self.decoder.embed_tokens.weight.var() * anchors.shape[-1]
            loss = loss + anchor * (image - anchors).square().sum(-1).mean() / scale
        return loss


def pixels_of(scenes: list[Scene], images) -> torch.Tensor:
    return images([s.render() for s in scenes], return_tensors="pt").pixel_values


def train(
    name: str, module: Smol, texts: Texts, images, args, steps: int, lr: float,
    anchored=lambda scenes: {}, objects=OBJECTS, captions: int = 1, questions: int = QUESTIONS,
):  # fmt: skip
    """Train `module` on scenes that are drawn anew for each step, in bfloat16 on a copy.

    `anchored` gives what a batch of these scenes holds besides.
    """

    def batch(rng, step):
        shuffle = random.Random(int(rng.integers(2**62)))
        drawn = [sample_scene(shuffle, "train", objects) for _ in range(args.batch or 4)]
        packed, _ = texts.pack([texts.chosen(rng, s, questions, captions) for s in drawn])
        return packed | {"pixels": pixels_of(drawn, images)} | anchored(drawn)

    held = list(sample_scenes(32, 7, "val", (1, 2)))
    rng = np.random.default_rng(0)
    chosen = [texts.chosen(rng, s, QUESTIONS) for s in held]

    def validate(m):
        """Share of answers whose every token is right under teacher forcing, by kind."""
        right: dict[str, list[bool]] = {}
        for i in range(0, len(held), 8):
            part, kinds = texts.pack(chosen[i : i + 8])
            targets, counts, numbers = part.pop("targets"), part.pop("weights") > 0, part.pop("segments")
            states, _ = m.states(pixels=pixels_of(held[i : i + 8], images), **part)
            hit = torch.ones_like(targets, dtype=torch.bool)
            hit[counts] = m.logits(states[counts]).argmax(-1) == targets[counts]
            for row, row_kinds, segment in zip(hit.numpy(), kinds, numbers.numpy(), strict=True):
                for number in range(1, segment.max() + 1):
                    at = (segment == number) & (row_kinds != "")
                    right.setdefault(row_kinds[at][0], []).append(bool(row[at].all()))
        return " ".join(f"{k} {np.mean(v):.2f}" for k, v in sorted(right.items()))

    return fit(name, module, batch, args, steps, lr, validate=validate, every=100, warmup=20)


def save(full: nn.Module, processor, folder: Path) -> None:
    """Write all but the decoder's weights and the tokenizer's words, which SmolLM2's package holds."""
    processor.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    full.config.architectures = [type(full).__name__]
    full.config.dtype = torch.float16
    full.config.save_pretrained(folder)
    full.generation_config.save_pretrained(folder)
    own = {n: v for n, v in full.state_dict().items() if "language_model" not in n and "lm_head" not in n}
    tensors = {n.removeprefix("model."): v.half().contiguous() for n, v in own.items()}
    save_file(tensors, folder / VISION_WEIGHTS, {"format": "pt"})
