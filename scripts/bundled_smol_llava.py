"""smol-llava: a projector is trained between tiny-llava's tower and SmolLM2-135M.

1. The projector starts as a ridge regression, from what the tower says of a patch to the embeddings
   of words: its color and shape, or its ground.
2. It is trained on captions and answers, as `bundled_smol` says, behind the frozen tower.
3. Tower and projector are trained together, in the same way, and then on more captions of several
   objects.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from bundled_models import GRID, MEAN, PATCH, PIXELS, STD, CLIPImageProcessor
from bundled_smol import SEVERAL, Smol, Texts, generation, pixels_of, save, tokenizer, train
from einops import rearrange
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from mechvlm import bundled
from mechvlm.bundled.smollm2 import Decoder, read_decoder
from mechvlm.datasets.scenes import Scene, sample_scenes

CELLS = GRID * GRID
OPENING, CLOSING = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'text') %}{{ item['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
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
    model.generation_config = generation(decoder)
    return model


class LlavaTexts(Texts):
    """A chat's opening and the picture, which all prompts of a row share."""

    def shared(self):
        return [*self.encode(OPENING), *[self.image] * CELLS, *self.encode("\n")]

    def question(self, prompt):
        return self.encode(prompt + CLOSING)

    def answer(self, text):
        return self.encode(text)


class SmolLlava(Smol):
    """The projector between the tower, frozen at first, and the frozen decoder."""

    def __init__(self, full: LlavaForConditionalGeneration):
        super().__init__(full.model.language_model, full.config.image_token_index)
        self.tower, self.projector = full.model.vision_tower.requires_grad_(False), full.model.multi_modal_projector

    def image(self, pixels):
        """One for each patch, [picture, 64, 576]."""
        pixels = pixels.to(self.projector.linear_1.weight.dtype)
        return self.projector(self.tower(pixel_values=pixels).last_hidden_state[:, 1:])


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
    images, texts = processor(decoder).image_processor, LlavaTexts(tokenizer(decoder))
    module = SmolLlava(full)
    embedding = decoder.weights["embed_tokens.weight"]
    scenes = list(sample_scenes(400, 7, "train", (1, 2, 3)))
    with torch.no_grad():
        features = full.model.vision_tower(pixel_values=pixels_of(scenes, images)).last_hidden_state[:, 1:]
    r2 = start_projector(module.projector, features, word_targets(scenes, embedding, texts.encode))
    print(f"smol-llava: the projector starts at words, R2 {r2:.3f}", flush=True)

    def anchored(drawn):
        return {"anchors": word_targets(drawn, embedding, texts.encode), "anchor": args.anchor} if args.anchor else {}

    name = "smol-llava-anchored" if args.anchor else "smol-llava"
    train(f"{name}-projector", module, texts, images, args, args.steps or 2000, 1.5e-3, anchored)
    module.tower.requires_grad_(True)
    train(f"{name}-tower", module, texts, images, args, args.steps or 1000, 2.5e-4, anchored)
    train(
        name, module, texts, images, args, args.steps or 700, 2e-4, anchored, objects=SEVERAL, captions=2, questions=2
    )
    save(full, processor(decoder), args.out / name)
