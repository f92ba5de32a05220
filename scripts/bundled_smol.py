"""smol-llava: a projector is trained between tiny-llava's tower and SmolLM2-135M, both frozen.

1. The projector starts as a ridge regression, from what the tower says of a patch to the embeddings
   of words: its color and shape, or its ground.
2. Captions and answers pass their loss through the frozen decoder to the projector. The loss is on
   the answers' tokens alone: never on a visual position.

A batch holds a few scenes, each with one caption and several questions behind one picture. A mask
keeps each prompt with its answer from seeing the others, so the numbers are those of separate rows.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bundled_data import segments
from bundled_models import GRID, MEAN, PATCH, PIXELS, STD, CLIPImageProcessor
from bundled_training import fit
from einops import rearrange
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mechvlm import bundled
from mechvlm.bundled.assemble import VISION_WEIGHTS
from mechvlm.bundled.smollm2 import IMAGE_TOKEN, Decoder, read_decoder
from mechvlm.datasets.scenes import Scene, sample_scene, sample_scenes

CELLS = GRID * GRID
OBJECTS = (1, 1, 2, 2, 2, 3)
OPENING, CLOSING, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'text') %}{{ item['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORD = 2.0
"""Loss weight of a one-word answer, beside captions of ten tokens."""


def tokenizer(decoder: Decoder) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, with a token that holds the place of a visual token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=decoder.tokenizer,
        bos_token="<|im_start|>",
        eos_token=END,
        pad_token=END,
        unk_token="<|endoftext|>",
        model_max_length=decoder.settings["max_position_embeddings"],
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )


def processor(decoder: Decoder) -> LlavaProcessor:
    images = CLIPImageProcessor(
        do_resize=True, size={"shortest_edge": PIXELS}, do_center_crop=True,
        crop_size={"height": PIXELS, "width": PIXELS}, do_rescale=True, do_normalize=True,
        image_mean=MEAN, image_std=STD, do_convert_rgb=True, resample=3,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer(decoder), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def build(decoder: Decoder, tower: CLIPVisionConfig) -> LlavaForConditionalGeneration:
    """The model with the decoder's weights, and a fresh tower and projector."""
    vocab = decoder.settings["vocab_size"]
    config = LlavaConfig(
        vision_config=tower,
        text_config={"model_type": "llama", **decoder.settings},
        image_token_index=vocab - 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=CELLS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(decoder.weights)
    model.tie_weights()
    ids = {name: decoder.settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=32)
    return model


class Smol(nn.Module):
    """The projector between the frozen tower and decoder; called with a batch, it returns the loss."""

    def __init__(self, full: LlavaForConditionalGeneration, before: int):
        super().__init__()
        self.before = before  # tokens before the picture
        self.tower, self.projector = full.model.vision_tower.requires_grad_(False), full.model.multi_modal_projector
        self.decoder = full.model.language_model.requires_grad_(False)

    def image(self, pixels):
        """Embeddings of the visual tokens, [scene, 64, 576]."""
        pixels = pixels.to(self.projector.linear_1.weight.dtype)
        return self.projector(self.tower(pixel_values=pixels).last_hidden_state[:, 1:])

    def read(self, x, mask, positions, past=None):
        """The decoder's last states of the embeddings `x`, [scene, position, 576]; fills `past`."""
        allow = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        return self.decoder(
            inputs_embeds=x, attention_mask=allow[:, None], position_ids=positions, past_key_values=past,
            use_cache=past is not None,
        ).last_hidden_state  # fmt: skip

    def states(self, pixels, ids, mask, positions, past=None):
        """The last states of packed rows, and their visual tokens."""
        words, image = self.decoder.embed_tokens(ids), self.image(pixels)
        x = torch.cat([words[:, : self.before], image, words[:, self.before :]], 1)
        return self.read(x, mask, positions, past), image

    def logits(self, states):
        return states @ self.decoder.embed_tokens.weight.T

    def forward(self, pixels, ids, mask, positions, targets, weights, segments=None, anchors=None, anchor=0.0):
        states, image = self.states(pixels, ids, mask, positions)
        logits = self.logits(states[weights > 0])
        counts = weights > 0
        loss = F.cross_entropy(logits.float(), targets[counts], reduction="none")
        loss = (loss * weights[counts]).sum() / weights.sum()
        if anchor:
            scale = self.decoder.embed_tokens.weight.var() * anchors.shape[-1]
            loss = loss + anchor * (image - anchors).square().sum(-1).mean() / scale
        return loss


class Texts:
    """The scenes' text as packed rows of token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer, self.cache = tokenizer, {}
        self.prefix, self.newline = self.encode(OPENING), self.encode("\n")
        self.end = tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.cache[text]

    def chosen(self, rng: np.random.Generator, scene: Scene, n: int) -> list[tuple[str, str, str]]:
        """A caption and `n` questions of different kinds where there are, as (kind, prompt, answer)."""
        parts = segments(scene)
        order = [parts[i] for i in rng.permutation(len(parts))]
        lists = [p for p in order if p[0] in ("list", "there")]
        places = [p for p in order if p[0] == "places"]
        caption = places[0] if places and rng.random() < 0.3 else lists[0]
        questions = [p for p in order if p[0] not in ("list", "there", "places")]
        first = list({p[0]: p for p in questions}.values())
        rng.shuffle(first)
        rest = [p for p in questions if p not in first]
        parts = [caption, *[*first, *rest][:n]]
        return [(kind, prompts[rng.integers(len(prompts))], answer) for kind, prompts, answer in parts]

    def pack(self, texts: list[list[tuple]]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """Rows of one scene each, from its (kind, prompt, answer), and the kind at each position.

        An answer of None is yet to be given. `segments` numbers each row's prompts from 1; it is 0
        where all of them see, and -1 where nothing stands.
        """
        before, start = len(self.prefix), len(self.prefix) + CELLS + 1
        asked = [
            [(k, self.encode(p + CLOSING), [] if a is None else [*self.encode(a), self.end]) for k, p, a in row]
            for row in texts
        ]
        n, length = len(texts), start + max(sum(len(q) + len(a) for _, q, a in row) for row in asked)
        ids, segments = np.full((n, length), self.end), np.full((n, length), -1)
        positions = np.tile(np.arange(length), (n, 1))
        weights, kinds = np.zeros((n, length), dtype=np.float32), np.full((n, length), "", dtype=object)
        ids[:, :before], ids[:, start - 1], segments[:, :start] = self.prefix, self.newline[0], 0
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
        shared, same = segments[:, None] == 0, segments[:, :, None] == segments[:, None]
        mask = np.tril(np.ones((length, length), dtype=bool))[None] & (shared | same)
        batch = {
            "ids": np.delete(ids, np.s_[before : before + CELLS], 1), "mask": mask, "positions": positions,
            "targets": np.roll(ids, -1, 1), "weights": weights, "segments": segments,
        }  # fmt: skip
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}, kinds


def pixels_of(scenes: list[Scene], images) -> torch.Tensor:
    return images([s.render() for s in scenes], return_tensors="pt").pixel_values


def word_targets(scenes: list[Scene], embedding: torch.Tensor, encode) -> torch.Tensor:
    """Where the projector starts: each patch as the mean of its words' embeddings, [scene, 64, width].

    The words are the color and the shape of the object that covers a quarter of the patch, or the
    ground.
    """

    def vector(word: str) -> torch.Tensor:
        return embedding[encode(" " + word)].mean(0)

    out = torch.empty(len(scenes), CELLS, embedding.shape[1])
    for i, scene in enumerate(scenes):
        cells = rearrange(scene.segmentation(PIXELS), "(r p) (c q) -> (r c) (p q)", p=PATCH, q=PATCH)
        shown = [vector(scene.ground)] + [(vector(o.color) + vector(o.shape)) / 2 for o in scene.objects]
        cover = np.stack([(cells == k).mean(1) for k in range(1, len(shown))])
        best = np.where(cover.max(0) >= 0.25, cover.argmax(0) + 1, 0)
        out[i] = torch.stack(shown)[torch.from_numpy(best)]
    return out


def start_projector(projector: nn.Module, features: torch.Tensor, targets: torch.Tensor) -> float:
    """Set the projector by ridge regression of `targets` on random features. Returns its R²."""
    x, y = features.flatten(0, 1), targets.flatten(0, 1)
    mu, sd = x.mean(0), x.std(0) + 1e-3
    width = projector.linear_1.out_features
    with torch.no_grad():
        w = torch.randn(width, x.shape[1]) / math.sqrt(x.shape[1]) / sd
        projector.linear_1.weight.copy_(w)
        projector.linear_1.bias.copy_(0.3 * torch.randn(width) - w @ mu)
        hidden = torch.cat([F.gelu(projector.linear_1(x)), torch.ones(len(x), 1)], 1).double()
        ridge = hidden.T @ hidden + 1e-1 * torch.eye(width + 1).double()
        solution = torch.linalg.solve(ridge, hidden.T @ y.double()).float()
        projector.linear_2.weight.copy_(solution[:-1].T)
        projector.linear_2.bias.copy_(solution[-1])
        return 1 - ((projector(x) - y).square().sum() / (y - y.mean(0)).square().sum()).item()


def stage(args) -> None:
    """Train the projector, and write smol-llava's folder."""
    torch.manual_seed(args.seed + 3)
    decoder = read_decoder()
    tiny = LlavaForConditionalGeneration.from_pretrained(bundled.path("tiny-llava"), dtype=torch.float32)
    full = build(decoder, tiny.config.vision_config)
    full.model.vision_tower.load_state_dict(tiny.model.vision_tower.state_dict())
    images, texts = processor(decoder).image_processor, Texts(tokenizer(decoder))
    module = Smol(full, len(texts.prefix))
    embedding = decoder.weights["embed_tokens.weight"]
    scenes = list(sample_scenes(400, 7, "train", (1, 2, 3)))
    with torch.no_grad():
        features = full.model.vision_tower(pixel_values=pixels_of(scenes, images)).last_hidden_state[:, 1:]
    r2 = start_projector(module.projector, features, word_targets(scenes, embedding, texts.encode))
    print(f"smol-llava: the projector starts at words, R2 {r2:.3f}", flush=True)

    def batch(rng, step):
        shuffle = random.Random(int(rng.integers(2**62)))
        drawn = [sample_scene(shuffle, "train", OBJECTS) for _ in range(args.batch or 4)]
        packed, _ = texts.pack([texts.chosen(rng, s, 6) for s in drawn])
        packed["pixels"] = pixels_of(drawn, images)
        if args.anchor:
            packed |= {"anchors": word_targets(drawn, embedding, texts.encode), "anchor": args.anchor}
        return packed

    held = list(sample_scenes(32, 7, "val", (1, 2)))
    rng = np.random.default_rng(0)
    val, kinds = texts.pack([texts.chosen(rng, s, 6) for s in held])
    val["pixels"] = pixels_of(held, images)

    def validate(m):
        """Share of answers whose every token is right under teacher forcing, by kind."""
        right: dict[str, list[bool]] = {}
        for i in range(0, len(held), 8):
            part = {k: v[i : i + 8] for k, v in val.items()}
            targets, counts, _ = part.pop("targets"), part.pop("weights") > 0, part.pop("segments")
            states, _ = m.states(**part)
            hit = torch.ones_like(targets, dtype=torch.bool)
            hit[counts] = m.logits(states[counts]).argmax(-1) == targets[counts]
            for row, row_kinds in zip(hit.numpy(), kinds[i : i + 8], strict=True):
                for kind in set(row_kinds) - {""}:
                    right.setdefault(kind, []).append(bool(row[row_kinds == kind].all()))
        return " ".join(f"{k} {np.mean(v):.2f}" for k, v in sorted(right.items()))

    name = "smol-llava-anchored" if args.anchor else "smol-llava"
    fit(
        name,
        module,
        batch,
        args,
        args.steps or 400,
        1.5e-3,
        validate=validate,
        every=100,
        warmup=20,
    )
    save(full, processor(decoder), args.out / name)


def save(full: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write all but the decoder's weights and the tokenizer's words, which SmolLM2's package holds."""
    processor.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    full.config.architectures = [type(full).__name__]
    full.config.dtype = torch.float16
    full.config.save_pretrained(folder)
    full.generation_config.save_pretrained(folder)
    parts = {"vision_tower": full.model.vision_tower, "multi_modal_projector": full.model.multi_modal_projector}
    tensors = {f"{part}.{n}": v.half().contiguous() for part, m in parts.items() for n, v in m.state_dict().items()}
    save_file(tensors, folder / VISION_WEIGHTS, {"format": "pt"})
