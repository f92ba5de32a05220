"""What mechvlm costs, in bare forwards of the same model on the same weights and inputs.

    python scripts/benchmark.py [--layers 32] [--width 256] [--repeats 5] [--json FILE]

The model is a LLaVA of random weights in LLaVA-1.5's token geometry: 576 visual tokens of about 620, a vocabulary of 32064,
batch size 1. A bare forward is the model's own, with `logits_to_keep=1` and its default attention. Each time is the median of
several runs, taken in turn so that a slow moment of the machine meets all of them; what runs whole forwards is run once.
"""

import argparse
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import nnsight
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import mechvlm as mv

VOCABULARY = 32064
IMAGE = 32000
QUESTION = " ".join(f"w{i}" for i in range(40))


def llava(layers: int, width: int) -> mv.VLM:
    """A LLaVA with LLaVA-1.5's tokens: 24 x 24 patches, words that are made up."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(IMAGE - 3)), "<image>", "<pad>"]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336,
            patch_size=14, projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=int(width * 2.6875), num_hidden_layers=layers,
            num_attention_heads=width // 128, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return mv.load(LlavaForConditionalGeneration(config).eval(), processor)


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (336, 336, 3), dtype=np.uint8))


def times(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each case; they take turns. The first of several turns is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + (repeats > 1)):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if turn or repeats == 1:
                taken[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in taken.items()}


def sweeps(layers: int, width: int, repeats: int) -> list[dict]:
    """Sweeps over all windows of one layer: each experiment as it is, and as one whole forward per window.

    `image -> question` changes the words behind the image, `image -> last` the last position alone, and `causal trace` all
    from the first visual token on, so that there only the layers below a window are saved. Every time holds all that the
    experiment does, its clean (and its corrupted) forward too.
    """
    vlm = llava(layers, width)
    inputs = vlm.inputs(noise(0), QUESTION)
    tokens, answer = inputs.tokens, 7
    behind = [p for p in tokens.question.tolist() if p > tokens.last_image]

    def p_of(change: Callable[[int], object], layer: int) -> float:
        with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1, use_cache=False):
            change(layer)
            logits = nnsight.save(vlm.logits)
        return float(logits[0, -1].softmax(-1)[answer])

    def whole_flow(dst) -> list[float]:
        return [p_of(lambda at: mv.knock_out(vlm, tokens.image, dst, at), layer) for layer in range(layers)]

    def whole_trace() -> list[float]:
        with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1, use_cache=False):
            clean = nnsight.save([])
            for layer in range(layers):
                clean.append(vlm.resid_pre[layer])
        old = clean[0][:, tokens.image]
        broken = old + 3 * old.std() * torch.randn(old.shape, generator=torch.Generator().manual_seed(0))

        def restore(layer: int) -> None:
            mv.patch(vlm, broken, tokens.image, 0, at="resid_pre")
            mv.patch(vlm, clean[layer], tokens.image, layer, at="resid_pre")

        return [p_of(restore, layer) for layer in range(layers)]

    def flow(name: str) -> list[float]:
        return mv.information_flow(vlm, inputs, answer, window=1, flows=[name]).p_knocked.flatten().tolist()

    def trace() -> list[float]:
        return mv.causal_trace(vlm, inputs, answer, groups=["image"]).p_restored.flatten().tolist()

    found: dict[str, list[float]] = {}

    def kept(name: str, case: Callable[[], list[float]]) -> Callable[[], None]:
        return lambda: found.update({name: case()})

    @torch.no_grad()
    def bare() -> None:
        vlm.hf(**vlm.encoding(inputs), logits_to_keep=1, use_cache=False)

    pairs = {
        "image -> question": (lambda: flow("image -> question"), lambda: whole_flow(behind)),
        "image -> last": (lambda: flow("image -> last"), lambda: whole_flow(tokens.last)),
        "causal trace, image": (trace, whole_trace),
    }
    fast = {name: kept(name, case) for name, (case, _) in pairs.items()}
    whole = {f"{name}, whole forwards": kept(f"{name}, whole forwards", case) for name, (_, case) in pairs.items()}
    seconds = times({"bare forward": bare} | fast, repeats) | times(whole, 1)
    rows = []
    for name, s in seconds.items():
        row = {"case": name, "seconds": s, "of n bare forwards": s / seconds["bare forward"] / layers}
        if name in pairs:
            naive = found[f"{name}, whole forwards"]
            row["largest relative difference"] = max(abs(a / b - 1) for a, b in zip(found[name], naive, strict=True))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32, help="of the decoder (default: 32)")
    parser.add_argument("--width", type=int, default=256, help="d_model, a multiple of 128 (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each case (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    title = f"Sweeps over all {args.layers} windows, width {args.width}, float32, batch size 1; {machine}"
    rows = sweeps(args.layers, args.width, args.repeats)
    table = Table("case", "seconds", "of n bare forwards", "largest relative difference", title=title)
    for row in rows:
        apart = row.get("largest relative difference")
        table.add_row(
            row["case"],
            f"{row['seconds']:.3f}",
            f"{row['of n bare forwards']:.3f}",
            "" if apart is None else f"{apart:.1e}",
        )
    Console(width=130).print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"title": title, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
