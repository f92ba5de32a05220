"""The training loop of every bundled model: seeded, and resumed from its checkpoint."""

from __future__ import annotations

import copy
import math
import time

import numpy as np
import torch
from torch import nn


def fit(name, module, batch, args, steps, lr, validate=None, stop=None, dtype=torch.bfloat16, every=200, warmup=100):
    """Train `module` with AdamW and a cosine schedule, from its checkpoint where there is one.

    The optimizer holds float32 weights; forward and backward run on a copy in `dtype`. Batch `i`
    depends on (seed, i) alone, so a resumed run sees the batches of an uninterrupted one. Frozen
    parameters (without gradient) stay as they are, and out of the checkpoint.

    Args:
        name: of the checkpoint, `name`.pt in `args.work`.
        module: returns its loss when called with a batch.
        batch: makes the batch of a step from (rng, step).
        args: the command line's.
        steps: length of the schedule.
        lr: the highest learning rate.
        validate: its report on the copy in `dtype` is printed with each checkpoint.
        stop: end the schedule early, at this step.
        dtype: of forward and backward; float32 trains the module itself.
        every: steps between checkpoints.
        warmup: steps in which the learning rate rises.
    """
    path = args.work / f"{name}.pt"
    module.to(args.device)
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    frozen = {n for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for _, p in named], lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    start = 0
    if path.exists():
        saved = torch.load(path, map_location=args.device)
        module.load_state_dict(module.state_dict() | saved["model"])
        if saved["step"] < steps:
            optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    half = module if dtype == torch.float32 else copy.deepcopy(module).to(dtype)
    halves = dict(half.named_parameters())
    run = torch.compile(half, dynamic=False) if args.compile else half
    clock, losses = time.time(), []
    for step in range(start, min(steps, stop or steps)):
        rate = lr * min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for g in optimizer.param_groups:
            g["lr"] = rate
        loss = run(**batch(np.random.default_rng((args.seed, step)), step))
        half.zero_grad(set_to_none=True)
        loss.backward()
        for n, p in named:
            q = halves[n]
            p.grad = None if q.grad is None else q.grad.float()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_([halves[n] for n, _ in named], [p.detach() for _, p in named])
        losses.append(loss.detach())
        if (step + 1) % min(every, 50) == 0 or step == start + 2:
            mean = torch.stack(losses).mean().item()
            print(
                f"{name} {step + 1}/{steps} loss {mean:.4f} {(time.time() - clock) / len(losses):.3f} s/step",
                flush=True,
            )
            clock, losses = time.time(), []
        if (step + 1) % every == 0 or step + 1 == steps:
            part = path.with_suffix(".part")
            model = {n: value for n, value in module.state_dict().items() if n not in frozen}
            torch.save({"model": model, "optimizer": optimizer.state_dict(), "step": step + 1}, part)
            part.replace(path)
            if validate:
                with torch.no_grad():
                    print(f"{name} {step + 1} {validate(half)}", flush=True)
            clock = time.time()
    return module
