"""The host's part of a study: all that it does outside of the model's forward.

The geometry is that of LLaVA-1.5-7B: 32 layers of width 4096 and 32 heads, 576 visual tokens of
about 600, a vocabulary of 32,064. No model of that size runs. A stand-in for the device waits some
milliseconds an example, without holding the interpreter, and gives the probes random rows of that
geometry. Everything before and after it is the study's own code, from files of images to shards on
the disk.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar
from unittest import mock

import benchmark_models
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import mechvlm as mv
from mechvlm.datasets import Dataset, Example, fingerprint
from mechvlm.inputs.images import open_image
from mechvlm.study.running import shards
from mechvlm.study.running.plan import Plan
from mechvlm.study.running.rows import ShardRows
from mechvlm.study.running.settings import shard_size
from mechvlm.study.running.workers import LocalWorker

LAYERS, WIDTH = 32, 4096
BATCH, EXAMPLES, CAPTIONS = 16, 96, 5
IMAGE_SIZE = 640, 480
"""Of the JPEG files, as of most of COCO's."""
DEVICE_MS = 50.0
"""Milliseconds that the stand-in takes for an example."""
MOST_MS, LEAST_RATE = 15.0, 0.9
"""Bars: the host's milliseconds an example besides decoding, and the share of the device's rate."""
VOCABULARY = benchmark_models.VOCABULARY - 64
"""Ids that the stand-in's lens reads."""


def host(repeats: int) -> list[dict]:
    """One row a part of the host's work, one for their sum, and one for a study's rate.

    Milliseconds are those that the processor was busy with an example, in all threads together,
    once every token's word is known:

    - decoding: opening the images' files.
    - inputs: resizing, normalizing and tokenizing.
    - results: the probes' rows joined on the host.
    - rows and words: what goes into the tables.
    - shards and the loop: the rest, files and threads included.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(benchmark_models, "_tokenizer", tokenizer):
        vlm, _ = benchmark_models.build("llava", LAYERS, 128)
        local = LocalWorker(plan_of(Path(folder)), [vlm], {}, {})
        local.load(0, lambda: None)
        first = busy(local)
        runs = [busy(local) for _ in range(repeats)]
        local.plan = plan_of(Path(folder), times=3)
        share = rate(local)
    rows: list[dict] = [{"case": part, "ms an example": median(run[part] for run in runs)} for part in runs[0]]
    besides = [run.total() - run["decoding"] for run in runs]
    rows.append({"case": "host, besides decoding", "ms an example": median(besides), "most ms": MOST_MS})
    once = (first.total() - median(run.total() for run in runs)) * EXAMPLES / 1000
    rows.append({"case": "every word looked up, once a study", "seconds": once})
    case = f"a study on a device of {DEVICE_MS:.0f} ms an example"
    rows.append({"case": case, "of the device's rate": share, "least rate": LEAST_RATE})
    return rows


def clocked(spent: Counter[str], part: str, work: Callable) -> Callable:
    """The same function, whose thread's busy seconds are added to a part of what was spent."""

    def run(*args, **kwargs):
        start = time.thread_time()
        try:
            return work(*args, **kwargs)
        finally:
            spent[part] += time.thread_time() - start

    return run


def busy(local: LocalWorker) -> Counter[str]:
    """Busy milliseconds an example by part, with a device that takes no time."""
    spent: Counter[str] = Counter()
    device = clocked(spent, "results", StandIn(0))
    start = time.process_time()
    with ExitStack() as stack:
        for target, part, work in (
            ("mechvlm.inputs.build.open_image", "decoding", open_image),
            ("mechvlm.study.running.workers.inputs_of", "inputs", shards.inputs_of),
            ("mechvlm.study.running.rows.ShardRows.add", "rows and words", ShardRows.add),
        ):
            stack.enter_context(mock.patch(target, clocked(spent, part, work)))
        make(local, device)
    spent["inputs"] -= spent["decoding"]
    spent["shards and the loop"] = time.process_time() - start - spent.total()
    return Counter({part: seconds / EXAMPLES * 1000 for part, seconds in spent.items()})


def rate(local: LocalWorker) -> float:
    """A study's examples a second, as a share of the device's; beginning and end included."""
    start = time.perf_counter()
    make(local, StandIn(DEVICE_MS / 1000))
    return len(local.plan.data) * DEVICE_MS / 1000 / (time.perf_counter() - start)


def make(local: LocalWorker, device: Callable) -> None:
    """Make all shards in a folder of their own."""
    plan = local.plan
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(shards, "read_batch", device):
        local.plan = replace(plan, folder=Path(folder))
        local.make_shards(0, list(range(len(plan))), lambda done: None)
        local.plan = plan


class StandIn:
    """In place of `read_batch`: waits, and gives the probes random rows of the geometry.

    The lens's tokens are drawn with chances proportional to 1 / rank, as words in a text are.
    """

    rows: ClassVar[dict[int, list]] = {}
    """Made once for each size of a batch."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, vlm: mv.VLM, inputs: mv.Inputs, *probes) -> tuple:
        plans = [probe.prepare(vlm, inputs) for probe in probes]
        if len(inputs) not in self.rows:
            self.rows[len(inputs)] = random_rows(len(inputs), len(inputs.token_maps[0]), len(plans[0].position))
        time.sleep(self.seconds * len(inputs))
        parts = zip(probes, plans, self.rows[len(inputs)], strict=True)
        return tuple(probe.result(plan, rows, vlm, inputs) for probe, plan, rows in parts)


def random_rows(batch: int, length: int, points: int) -> list[list[dict[str, torch.Tensor]]]:
    """The rows of a study's three probes."""
    draw, chance = np.random.default_rng(0), 1 / np.arange(1, VOCABULARY + 1)
    ids = draw.permutation(VOCABULARY)

    def tokens() -> torch.Tensor:
        return torch.from_numpy(ids[draw.choice(VOCABULARY, (points, 1), p=chance / chance.sum())])

    lens = [{"tokens": tokens(), "probs": torch.rand(points, 1)} for _ in range(LAYERS + 1)]
    sums = ("sum_image", "sum_text")
    context = [{"dots": torch.rand(3, batch), **{name: torch.rand(WIDTH) for name in sums}} for _ in range(LAYERS + 1)]
    norms = [
        {
            "norm": torch.rand(batch, 2, length), "weight": torch.rand(batch, 1, 2, length),
            "value_norm": torch.rand(batch, 1, length), "divisor": torch.ones(batch, 2),
        }
        for _ in range(LAYERS)
    ]  # fmt: skip
    return [lens, context, norms]


def plan_of(folder: Path, times: int = 1) -> Plan:
    """Images with captions, each so many times, in batches and shards of a study's sizes."""
    draw = np.random.default_rng(0)
    examples = []
    for number in range(EXAMPLES * times):
        path, (width, height) = folder / f"{number % EXAMPLES}.jpg", IMAGE_SIZE
        coarse = draw.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(IMAGE_SIZE, Image.Resampling.BICUBIC).save(path, quality=90)
        captions = tuple(" ".join(word(int(i)) for i in draw.integers(0, 2000, 10)) for _ in range(CAPTIONS))
        examples.append(Example(str(number), path, captions))
    data = Dataset("made", tuple(examples), (), fingerprint(tuple(examples)))
    return Plan(folder, ("llava",), data, "w1 w2 w3 w4 w5 w6 w7 w8", BATCH, shard_size(BATCH), views=False)


def word(number: int) -> str:
    """A made-up word of syllables, another one for each number."""
    written, number = "", number + 2000
    while number:
        number, syllable = divmod(number, 95)
        written += "bcdfghjklmnprstvwzx"[syllable % 19] + "aeiou"[syllable // 19]
    return written


def tokenizer() -> PreTrainedTokenizerFast:
    """The benchmark's tokenizer with words of letters, which a lens can read."""
    n_other = 43
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(n_other - 3))]
    words += [f"▁{word(i)}" for i in range(benchmark_models.IMAGE - n_other)] + ["<image>", "<pad>"]
    backend = Tokenizer(WordLevel({text: i for i, text in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<image>"], **names)
