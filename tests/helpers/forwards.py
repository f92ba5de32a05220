"""Forwards to compare interventions with: Hugging Face's own with a mask, and plain traces."""

from contextlib import contextmanager

import nnsight
import torch

LOWEST = torch.finfo(torch.float32).min


def forward(vlm, inputs, change=lambda: None):
    """The logits of a trace in which `change` is called."""
    with torch.no_grad(), vlm.trace(inputs):
        change()
        logits = nnsight.save(vlm.logits)
    return logits


def decoder_of(vlm):
    hf = vlm.hf
    return hf.language_model.model if type(hf).__name__.startswith("InstructBlip") else hf.model.language_model


def first_states(vlm, inputs) -> torch.Tensor:
    """What enters the first layer [batch pos d_model]."""
    with torch.no_grad():
        return vlm.hf(**vlm.encoding(inputs), output_hidden_states=True).hidden_states[0]


def naive_curve(vlm, inputs, embeddings: torch.Tensor) -> torch.Tensor:
    """s(l) [state example], all pairs, of a plain forward with other states at its first layer."""
    decoder, states = decoder_of(vlm), []
    hooks = [decoder.layers[0].register_forward_pre_hook(lambda _, args: (embeddings, *args[1:]))]
    hooks += [
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        for layer in [*decoder.layers, decoder.norm]
    ]
    try:
        with torch.no_grad():
            vlm.hf(**vlm.encoding(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    curve = torch.zeros(len(states), len(inputs))
    for number, state in enumerate(states):
        for row, tokens in enumerate(inputs.token_maps):
            image, text = state[row, tokens.image, None], state[row, None, tokens.text]
            curve[number, row] = torch.cosine_similarity(image, text, dim=-1).mean()
    return curve


@contextmanager
def decoder_calls(vlm):
    """A list that gets the number of positions of every call of the decoder meanwhile."""
    calls: list[int] = []
    hook = decoder_of(vlm).layers[0].register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    try:
        yield calls
    finally:
        hook.remove()


def with_mask(vlm, inputs, blocked):
    """The logits of Hugging Face's own forward under a 4-D mask.

    The mask is causal, and blocks padding and the edges in `blocked` [batch head dest src].
    """
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
    """A mask [batch head dest src], True at the edges: each is (row, heads, dst, src)."""
    n = len(inputs.token_maps[0])
    mask = torch.zeros(len(inputs), vlm.n_heads, n, n, dtype=torch.bool)
    for row, heads, dst, src in edges:
        for head in heads:
            mask[row, head, torch.as_tensor(dst)[:, None], torch.as_tensor(src)] = True
    return mask


def states(vlm, inputs, site):
    """A site's activations of every layer, as a list."""
    with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1):
        by_layer = nnsight.save([])
        for layer in range(vlm.n_layers):
            by_layer.append(getattr(vlm, site)[layer].clone())
    return by_layer


def out_of_memory_above(vlm, monkeypatch, most: int, error=torch.OutOfMemoryError, text="CUDA out of memory."):
    """Let the decoder fail as on a device without room for more than `most` examples in a batch.

    Gives the list of batch sizes that it was called with.
    """
    layer, sizes = decoder_of(vlm).layers[1].mlp, []
    forward = layer.forward

    def limited(x):
        sizes.append(len(x))
        if len(x) > most:
            raise error(f"{text} Tried to allocate 20.00 MiB")
        return forward(x)

    monkeypatch.setattr(layer, "forward", limited)
    return sizes
