"""Hugging Face's own forwards, with and without a mask, and plain traces, to hold interventions to."""

import nnsight
import torch

LOWEST = torch.finfo(torch.float32).min


def forward(vlm, inputs, change=lambda: None):
    with torch.no_grad(), vlm.trace(inputs):
        change()
        logits = nnsight.save(vlm.logits)
    return logits


def decoder_of(vlm):
    hf = vlm.hf
    return hf.language_model.model if type(hf).__name__.startswith("InstructBlip") else hf.model.language_model


def with_mask(vlm, inputs, blocked):
    """HF's own forward with a 4-D mask: causal, padding out, and `blocked` [batch head dest src] out as well."""
    encoding = vlm.encoding(inputs)
    n = encoding["input_ids"].shape[1]
    open_ = torch.ones(n, n).tril().bool() & encoding["attention_mask"][:, None, None].bool() & ~blocked
    mask = torch.zeros(open_.shape).masked_fill(~open_, LOWEST)
    hook = decoder_of(vlm).register_forward_pre_hook(
        lambda _, args, kw: (args, kw | {"attention_mask": mask}), with_kwargs=True
    )
    try:
        with torch.no_grad():
            return vlm.hf(**encoding).logits
    finally:
        hook.remove()


def blocked(vlm, inputs, *edges):
    """[batch head dest src], True where an edge (row, heads, dst, src) is out."""
    n = len(inputs.token_maps[0])
    out = torch.zeros(len(inputs), vlm.n_heads, n, n, dtype=torch.bool)
    for row, heads, dst, src in edges:
        for h in heads:
            out[row, h, torch.as_tensor(dst)[:, None], torch.as_tensor(src)] = True
    return out


def states(vlm, inputs, site):
    with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1):
        got = nnsight.save([])
        for layer in range(vlm.n_layers):
            got.append(getattr(vlm, site)[layer].clone())
    return got
