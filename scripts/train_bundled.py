"""Train the bundled models from scratch, on CPU or GPU; seeded and resumable.

    python scripts/train_bundled.py

Four stages. Each keeps its checkpoints in `--work` and resumes from the last one:

1. `decoder`: a small Llama, on text alone. A document is a scene written as an 8 x 8 grid of words,
   then captions, questions and answers about it; every next word counts. Each word of the grid
   carries a code for its row and column.
2. `towers`: a CLIP vision tower, on each patch's color, shape, ground, row and column. Its weights
   then initialise InstructBLIP's tower.
3. `llava`: the decoder reads the frozen tower through the projector. The loss is on text alone,
   never on a visual position.
4. `instructblip`: the same decoder reads the tower through a Q-Former. The loss is on text alone.

`decoder` and `towers` do not depend on each other, nor do `llava` and `instructblip`: with
`--stage`, the two can run side by side. Two more stages run only when they are named: `smol-llava`,
a projector from the frozen tower to SmolLM2, and `smol-instructblip`, a Q-Former before SmolLM2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bundled_data import Corpus, Scenes, pack, single
from bundled_models import GRID, WIDTH, build, decoder_config, fourier_positions, processor, save, start_from_clip
from bundled_training import fit
from torch import nn
from transformers import LlamaForCausalLM

CELLS = GRID * GRID
OBJECTS = (1, 2, 2, 3)  # objects per scene: more scenes of two, where relations are clearest
BUNDLED = Path(__file__).resolve().parent.parent / "mechvlm" / "bundled"


# ---- stages 1 and 3: a decoder over 64 cells ----
class Reader(nn.Module):
    """A decoder that reads a scene of 64 cells, then text.

    The cells are words, or patches through the projector.
    """

    def __init__(self, lm, projector=None):
        super().__init__()
        self.lm, self.projector = lm, projector
        self.row = nn.Parameter(torch.randn(GRID, 1, WIDTH) * 0.05)
        self.col = nn.Parameter(torch.randn(1, GRID, WIDTH) * 0.05)

    def states(self, ids, mask, positions, cells=None, features=None, both=None, **keep):
        embed = self.lm.model.embed_tokens
        if features is not None:
            image = self.projector(features)
        else:
            # Where `both` is 1, a cell is the sum of its two words, as a patch shows color and
            # shape at once.
            words = embed(cells)
            image = words[:, 0] + both[:, None, None] * words[:, 1] + (self.row + self.col).reshape(1, CELLS, WIDTH)
        x = embed(ids)
        x = torch.cat([x[:, :4], image.to(x.dtype), x[:, 4:]], 1)
        allow = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -1e4)
        return self.lm.model(
            inputs_embeds=x, attention_mask=allow[:, None], position_ids=positions, use_cache=False, **keep
        )

    def forward(self, ids, mask, positions, targets, weights, cells=None, features=None, both=None):
        h = self.states(ids, mask, positions, cells, features, both).last_hidden_state
        logits = self.lm.lm_head(h).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (loss * weights.flatten()).sum() / weights.sum()


def decoder(args):
    """Stage 1: the first 400 steps of a schedule of 1200 (or of `--steps`)."""
    torch.manual_seed(args.seed)
    vocab = len(processor("tiny-llava").tokenizer)
    data = Corpus(Scenes("train", args.scenes))
    module = Reader(LlamaForCausalLM(decoder_config(vocab)))
    module.lm.set_attn_implementation("eager")

    def batch(rng, step):
        return pack(data, rng, args.batch or 32, args.device, text=True)

    val = Corpus(Scenes("val", 128))
    return fit(
        "decoder",
        module,
        batch,
        args,
        args.steps or 1200,
        2e-3,
        validate=lambda m: accuracy(m, val, args, text=True),
        stop=400,
    )


def accuracy(module, data, args, text, features=None):
    """Share of answer tokens that are right under teacher forcing, by kind."""
    hit, n = {}, {}
    for i in range(2):
        b, kinds = pack(
            data, np.random.default_rng(i), 64, args.device, text=text, features=features, first=64 * i, kinds=True
        )
        h = module.states(**{k: v for k, v in b.items() if k not in ("targets", "weights")}).last_hidden_state
        right = (module.lm.lm_head(h).argmax(-1) == b["targets"]).cpu().numpy()
        weight = b["weights"].cpu().numpy()
        for kind in set(kinds.flatten()) - {""}:
            at = (kinds == kind) & (weight >= 1)
            hit[kind] = hit.get(kind, 0) + int(right[at].sum())
            n[kind] = n.get(kind, 0) + int(at.sum())
    return " ".join(f"{k} {hit[k] / max(n[k], 1):.3f}" for k in sorted(n))


# ---- stage 2: the vision towers ----
class Tower(nn.Module):
    """A vision tower with a linear head for each thing a patch shows."""

    def __init__(self, vision):
        super().__init__()
        self.vision = vision
        self.heads = nn.ModuleList([nn.Linear(WIDTH, n) for n in (9, 9, 4, GRID, GRID)])

    def features(self, pixels):
        return self.vision(pixel_values=pixels).last_hidden_state

    def forward(self, pixels, labels):
        x = self.features(pixels)[:, 1:]
        losses = [F.cross_entropy(h(x).float().flatten(0, 1), labels[:, i].flatten()) for i, h in enumerate(self.heads)]
        return losses[0] + 2 * losses[1] + 0.3 * losses[2] + 0.3 * (losses[3] + losses[4])


def towers(args):
    """Stage 2: CLIP's tower, then InstructBLIP's from CLIP's weights."""
    torch.manual_seed(args.seed)
    dense, plain, val = Scenes("train", 8000, counts=(4, 5, 6, 7)), Scenes("train", 4000), Scenes("val", 128)
    sets = [
        (torch.cat([d.pixels(), p.pixels()]), torch.cat([d.labels(), p.labels()]))
        for d, p in [(dense, plain), (val, val)]
    ]
    rows = torch.arange(CELLS)

    def labelled(at, pixels, labels):
        place = torch.stack([rows // GRID, rows % GRID])[None].expand(len(at), -1, -1)
        return {
            "pixels": pixels[at].to(args.device, torch.bfloat16),
            "labels": torch.cat([labels[at], place], 1).to(args.device),
        }

    def batch(rng, step):
        return labelled(torch.from_numpy(rng.integers(0, len(sets[0][0]), 64)), *sets[0])

    def validate(m):
        b = labelled(torch.arange(128), *sets[1])
        x = m.features(b["pixels"])[:, 1:]
        shown = b["labels"][:, 0] > 0
        out = []
        for i, h in enumerate(m.heads):
            right = h(x).argmax(-1) == b["labels"][:, i]
            out.append(f"{right[shown].float().mean():.3f}" if i < 2 else f"{right.float().mean():.3f}")
        return "color, shape, ground, row, column of patches: " + " ".join(out)

    clip = Tower(build("tiny-llava").model.vision_tower)
    emb = clip.vision.embeddings if hasattr(clip.vision, "embeddings") else clip.vision.vision_model.embeddings
    emb.position_embedding.weight.data[1:] = fourier_positions()
    fit("tower-clip", clip, batch, args, args.steps or 1600, 2e-3, validate=validate)
    clip.float().cpu()
    blip = Tower(build("tiny-instructblip").vision_model)
    start_from_clip(blip.vision, getattr(clip.vision, "vision_model", clip.vision), sets[0][0][:256])
    blip.heads.load_state_dict(clip.heads.state_dict())
    fit("tower-blip", blip, batch, args, (args.steps or 1600) // 2, 1e-3, validate=validate, stop=600)


def load(args, name, module):
    """The module with the weights of the last checkpoint of that name."""
    module.load_state_dict(torch.load(args.work / f"{name}.pt", map_location="cpu")["model"])
    return module


@torch.no_grad()
def cached(tower, scenes, args):
    """The frozen tower's output for all scenes: class token, then patches.

    [scene, 65, width], bfloat16.
    """
    tower.eval().to(args.device)
    return torch.cat([tower.features(p.float().to(args.device)).bfloat16() for p in scenes.pixels().split(256)])


# ---- stage 3 ----
def llava(args):
    """Stage 3: decoder and projector on scenes. Writes tiny-llava's folder."""
    torch.manual_seed(args.seed + 1)
    full = build("tiny-llava")
    tower = load(args, "tower-clip", Tower(full.model.vision_tower))
    train, val = Scenes("train", args.scenes, counts=OBJECTS), Scenes("val", 128)
    vocab = len(processor("tiny-llava").tokenizer)
    start = load(args, "decoder", Reader(LlamaForCausalLM(decoder_config(vocab))))
    start.lm.set_attn_implementation("eager")
    module = Reader(start.lm, full.model.multi_modal_projector)
    module.row, module.col = start.row, start.col
    features, val_features = cached(tower, train, args)[:, 1:], cached(tower, val, args)[:, 1:]
    with torch.no_grad():  # patches enter the decoder on the scale of words
        size = start.lm.model.embed_tokens.weight.std() * 2
        last = module.projector.linear_2
        last.weight.mul_(size / module.projector(features[:64].float().to("cpu")).std())
    data, val_data = Corpus(train), Corpus(val)

    def batch(rng, step):
        if step % 8 == 7:  # some batches of text alone, so that the language is not forgotten
            return pack(data, rng, args.batch or 32, args.device, text=True)
        return pack(data, rng, args.batch or 32, args.device, features=features)

    def validate(m):
        return accuracy(m, val_data, args, False, val_features) + " | lens " + lens(m, val_data, args, val_features)

    # A warm restart: the second schedule continues at step 2600, with the rate it has there.
    for steps in [args.steps] if args.steps else (2600, 4000):
        fit("llava", module, batch, args, steps, 1e-3, validate=validate)
    module.float().cpu()
    full.model.language_model.load_state_dict(module.lm.model.state_dict())
    full.lm_head.load_state_dict(module.lm.lm_head.state_dict())
    full.model.multi_modal_projector.load_state_dict(module.projector.state_dict())
    save(full, "tiny-llava", args.out / "tiny-llava")


def lens(module, data, args, features):
    """Unique-word precision of the logit lens on visual positions, by layer."""
    b = pack(data, np.random.default_rng(0), 64, args.device, features=features, first=0)
    keep = {k: v for k, v in b.items() if k not in ("targets", "weights")}
    states = module.states(**keep, output_hidden_states=True).hidden_states
    out = []
    for i, h in enumerate(states):
        h = h[:, 4 : 4 + CELLS]
        top = module.lm.lm_head(h if i == len(states) - 1 else module.lm.model.norm(h)).argmax(-1)
        hits = total = 0
        for j in range(64):
            words = {data.words[t] for t in top[j].tolist()} - data.stop
            hits += len(words & data.truth[j])
            total += len(words)
        out.append(f"{hits / max(total, 1):.2f}")
    return " ".join(out)


# ---- stage 4 ----
class Blip(nn.Module):
    """The Q-Former, its projection and a decoder."""

    def __init__(self, full, lm):
        super().__init__()
        self.query_tokens, self.qformer = full.query_tokens, full.qformer
        self.projection, self.lm = full.language_projection, lm

    def logits(self, ids, features, q_ids, q_mask):
        n = len(ids)
        query = self.query_tokens.expand(n, -1, -1)
        allow = torch.cat([torch.ones(n, query.shape[1], dtype=q_mask.dtype, device=q_mask.device), q_mask], 1)
        out = self.qformer(input_ids=q_ids, attention_mask=allow, query_embeds=query, encoder_hidden_states=features)
        image = self.projection(out.last_hidden_state[:, : query.shape[1]])
        x = torch.cat([image, self.lm.model.embed_tokens(ids)], 1)
        t = x.shape[1]
        causal = torch.full((t, t), -1e4, device=x.device, dtype=x.dtype).triu(1)[None, None].expand(n, -1, -1, -1)
        h = self.lm.model(inputs_embeds=x, attention_mask=causal, use_cache=False).last_hidden_state
        return self.lm.lm_head(h[:, query.shape[1] :])

    def forward(self, ids, features, q_ids, q_mask, targets, weights):
        loss = F.cross_entropy(
            self.logits(ids, features, q_ids, q_mask).float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        return (loss * weights.flatten()).sum() / weights.sum()


def instructblip(args):
    """Stage 4: Q-Former, projection and decoder on scenes. Writes tiny-instructblip's folder."""
    torch.manual_seed(args.seed + 2)
    full = build("tiny-instructblip")
    tower = load(args, "tower-blip", Tower(full.vision_model))
    train, val = Scenes("train", args.scenes, counts=OBJECTS), Scenes("val", 128)
    vocab = len(processor("tiny-llava").tokenizer)
    lm = load(args, "decoder", Reader(LlamaForCausalLM(decoder_config(vocab)))).lm
    lm.set_attn_implementation("eager")
    module = Blip(full, lm)
    features, val_features = cached(tower, train, args), cached(tower, val, args)
    data, val_data = Corpus(train), Corpus(val)

    def batch(rng, step):
        return single(data, rng, args.batch or 24, 5, args.device, features)

    def validate(m):
        b, kinds = single(val_data, np.random.default_rng(0), 128, 5, args.device, val_features, kinds=True)
        targets, weights = b.pop("targets"), b.pop("weights")
        right = ((m.logits(**b).argmax(-1) == targets) & (weights >= 1)).cpu()
        out = []
        for kind in sorted(set(kinds)):
            at = torch.tensor([k == kind for k in kinds])
            out.append(f"{kind} {right[at].sum() / (weights[at] >= 1).sum():.3f}")
        return " ".join(out)

    fit("instructblip", module, batch, args, args.steps or 2200, 1e-3, validate=validate)
    module.float().cpu()
    full.language_model.load_state_dict(module.lm.state_dict())
    save(full, "tiny-instructblip", args.out / "tiny-instructblip")


def smol_llava(args):
    """The projector of smol-llava, before SmolLM2. Writes smol-llava's folder."""
    import bundled_smol_llava  # apart: it needs SmolLM2

    bundled_smol_llava.stage(args)


def smol_instructblip(args):
    """The Q-Former of smol-instructblip, before SmolLM2. Writes smol-instructblip's folder."""
    import bundled_smol_instructblip  # apart: it needs SmolLM2

    bundled_smol_instructblip.stage(args)


TINY = {"decoder": decoder, "towers": towers, "llava": llava, "instructblip": instructblip}
STAGES = TINY | {"smol-llava": smol_llava, "smol-instructblip": smol_instructblip}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all", help="stage to run (default: all)")
    parser.add_argument("--work", type=Path, default=Path("build/bundled"), help="where the checkpoints are")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="where the models' folders are written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--steps", type=int, default=0, help="length of the schedule; 0: the stage's own")
    parser.add_argument("--batch", type=int, default=0, help="scenes per step; 0: the stage's own, 32 or 24")
    parser.add_argument("--scenes", type=int, default=12000, help="training scenes (default: 12000)")
    parser.add_argument(
        "--anchor",
        type=float,
        default=0,
        help="smol-llava: hold its visual tokens to words, by this weight (default: 0)",
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do not use torch.compile")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    for name, stage in STAGES.items():
        if args.stage == name or (args.stage == "all" and name in TINY):
            stage(args)


if __name__ == "__main__":
    main()
