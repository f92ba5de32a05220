"""Tokens out of states, without all logits at once: the likeliest ones, or the chance of one.

A softmax keeps the order of the logits, so the likeliest tokens are those of the largest logits.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

POSITIONS_PER_CHUNK = 1024
"""Positions unembedded at once, so that at most [POSITIONS_PER_CHUNK, d_vocab] logits exist.

Fewer than some 300 cost time: every chunk reads the whole unembedding matrix.
"""
ROWS_IN_CACHE = 32
"""Rows of logits that the CPU works on at once: its cache holds so many at 32,000 tokens (4 MB)."""
LOGITS_PER_GROUP = 128
"""Neighbouring logits of which only the largest is looked at first; the quickest of 32 to 256."""


def top_tokens(
    states: Float[Tensor, "point d_model"], unembed, k: int
) -> tuple[Int[Tensor, "point k"], Float[Tensor, "point k"]]:
    """The k likeliest tokens of each state and their probabilities, likeliest first.

    softmax(unembed(state)), in float32. Logits are formed for `POSITIONS_PER_CHUNK` states at a
    time and dropped.

    Tested: equals softmax(unembed(states)).topk(k) of all states at once.
    """
    ids, probs = [], []
    for chunk in states.split(POSITIONS_PER_CHUNK):
        logits = unembed(chunk)
        for part in logits.split(rows_at_once(logits.device)):
            block = part.float()
            ids.append(largest(block, k))
            probs.append(block.softmax(-1).gather(-1, ids[-1]))
    return torch.cat(ids), torch.cat(probs)


def chances(
    states: Float[Tensor, "point d_model"], unembed, ids: Int[Tensor, " point"]
) -> tuple[Float[Tensor, " point"], Int[Tensor, " point"]]:
    """The probability of one token for each normed state, and its rank, 1 for the likeliest.

    softmax(unembed(state))[id], in float32; as few logits exist at once as in `top_tokens`.
    Tested: equals the softmax of all logits.
    """
    probabilities, ranks = [], []
    for chunk, own in zip(
        states.split(POSITIONS_PER_CHUNK), ids.to(states.device).split(POSITIONS_PER_CHUNK), strict=True
    ):
        logits = unembed(chunk)
        rows = rows_at_once(logits.device)
        for part, chosen in zip(logits.split(rows), own.to(logits.device).split(rows), strict=True):
            logit = (block := part.float()).gather(-1, chosen[:, None])
            probabilities.append((logit[:, 0] - block.logsumexp(-1)).exp())
            ranks.append(1 + (block > logit).sum(-1))
    return torch.cat(probabilities), torch.cat(ranks)


def rows_at_once(device: torch.device) -> int:
    """Rows of logits that a device works on at once."""
    return ROWS_IN_CACHE if device.type == "cpu" else POSITIONS_PER_CHUNK


def largest(logits: Float[Tensor, "point d_vocab"], k: int) -> Int[Tensor, "point k"]:
    """The ids of each row's k largest logits, largest first; of equal ones any.

    1. The largest logit of each group of neighbours is found, which is quick.
    2. The k largest logits lie in the k groups of the largest of these: were one in another group,
       each of the k would hold a larger one.
    3. So only those groups, and what is left over behind the last one, are searched.

    Tested: equals topk.
    """
    n_points, d_vocab = logits.shape
    n_groups = d_vocab // LOGITS_PER_GROUP
    if n_groups < 8 * k:
        return logits.topk(k).indices
    grouped = logits[:, : n_groups * LOGITS_PER_GROUP].unflatten(-1, (n_groups, LOGITS_PER_GROUP))
    groups = grouped.amax(-1).topk(k).indices  # [point k]
    within = torch.arange(LOGITS_PER_GROUP, device=logits.device)
    rest = torch.arange(n_groups * LOGITS_PER_GROUP, d_vocab, device=logits.device).expand(n_points, -1)
    ids = torch.cat([(groups[..., None] * LOGITS_PER_GROUP + within).flatten(1), rest], -1)
    return ids.gather(-1, logits.gather(-1, ids).topk(k).indices)
