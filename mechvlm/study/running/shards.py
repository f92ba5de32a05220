"""How one shard of a study is made, and a model's gallery.

A shard is made whole, in batches that never cross its borders, from the plan alone: it holds the
same numbers whoever makes it, and whatever was made before. `mechvlm.study.running.plan` says which
examples it holds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO

import pandas as pd
import pyarrow as pa
import torch
from PIL import Image

from mechvlm.datasets import Example, Pair
from mechvlm.errors import InputError
from mechvlm.experiments.winoground import read_pairs
from mechvlm.experiments.winoground_result import PairScores, WinogroundResult
from mechvlm.inputs.tokens import TokenMap
from mechvlm.ndif.connection import retrying
from mechvlm.probes.contextualization import Contextualization
from mechvlm.probes.logit_lens import LogitLens
from mechvlm.probes.norm_attention import NormAttention
from mechvlm.study.report import gallery
from mechvlm.study.running.atomic import write_folder
from mechvlm.study.running.memory import read_or_halve
from mechvlm.study.running.plan import GALLERY_EXAMPLES, Plan
from mechvlm.study.running.rows import ContextRows, LensRows, NormRows, as_tables, frequent_words
from mechvlm.study.running.settings import pairs_per_batch
from mechvlm.tracing.memory import first_line, out_of_memory
from mechvlm.tracing.reading import read_batch
from mechvlm.vlm.vlm import VLM

SMALL_MODEL = 20_000_000
"""Parameters below which a model runs on one thread."""
ANSWER_SCHEMA = pa.schema([(name, pa.string()) for name in ("model", "example", "answer")])
VIEW_SCHEMA = pa.schema(
    {
        "model": pa.string(),
        "example": pa.string(),
        "html": pa.large_string(),
        "heat": pa.binary(),
        "token": pa.string(),
        "layer": pa.int64(),
    }
)
PAIR_SCHEMAS = {
    "pair_scores": pa.schema(
        [
            *((name, pa.string()) for name in ("model", "pair", "tag")),
            *((name, pa.bool_()) for name in PairScores._fields),
        ]
    ),
    "pairs": pa.schema(
        {
            "model": pa.string(),
            "pair": pa.string(),
            "image": pa.int64(),
            "measure": pa.string(),
            "layer": pa.int64(),
            "condition": pa.string(),
            "value": pa.float32(),
        }
    ),
}


def make_shard(
    plan: Plan, vlm: VLM, model: int, number: int, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Read the examples, or the pairs, of one shard and write it.

    An example that cannot be read is set aside with its reason. So is one that does not fit into
    memory alone, after its batch was halved down to it.

    Args:
        plan: of the study.
        vlm: the model.
        model: its number in the plan.
        number: of the shard.
        progress: called with the number of examples done so far.
    """
    if number not in range(len(plan)):
        _make_pair_shard(plan, vlm, model, number, progress)
        return
    clock = time.perf_counter()
    name, all_examples, indices = plan.names[model], plan.data.examples, plan.example_indices(number)
    probes = LogitLens(k=1, positions="all"), Contextualization(), NormAttention(dst=("last_text", "last_image"))
    lens_rows, context_rows, norm_rows = LensRows(name), ContextRows(name), NormRows(name)
    set_aside: list[dict] = []
    halved: list[dict] = []
    words: list[dict] = []
    n_with_words = done = 0

    def read_examples(examples: Sequence[Example]) -> tuple:
        inputs = vlm.inputs([e.image for e in examples], plan.prompt)
        return inputs.token_maps, read_batch(vlm, inputs, *probes)

    with threads_for(vlm):
        stop = indices[-1] + 1
        for start in range(indices[0], stop, plan.batch_size):
            batch = range(start, min(start + plan.batch_size, stop))
            parts = read_or_halve(vlm, all_examples, batch, read_examples, set_aside, halved)
            for part, (maps, (lens, context, norms)) in parts:
                for row, (index, tokens) in enumerate(zip(part, maps, strict=True)):
                    example, other = all_examples[index], all_examples[(index + 1) % len(all_examples)]
                    own = lens.of(row)
                    lens_rows.add(example, other, tokens, own)
                    # The gallery shows the first examples that could be read. Which shards they
                    # come from is not known here, so each shard keeps as many as it might need.
                    if n_with_words < GALLERY_EXAMPLES:
                        words += frequent_words(name, example, tokens, own)
                        n_with_words += 1
                examples = [all_examples[i] for i in part]
                context_rows.add(examples, context)
                norm_rows.add(examples, maps, norms)
            done += len(batch)
            progress(done)
    curves, sums = context_rows.frames()
    frames = {
        "contextualization": curves, "context_sums": sums, "lens": lens_rows.frame(), "norm_sums": norm_rows.frame(),
        "attention_share": norm_rows.share(),
        "words": pd.DataFrame(words), "skipped": pd.DataFrame([{"model": name, **row} for row in set_aside]),
    }  # fmt: skip
    about = {
        "read": len(context_rows.ids),
        "first": context_rows.ids[:GALLERY_EXAMPLES],
        "halved": halved,
        "seconds": round(time.perf_counter() - clock, 3),
    }
    write_folder(plan.shard_folder(model, number), as_tables(frames), about)


def _make_pair_shard(plan: Plan, vlm: VLM, model: int, number: int, progress: Callable[[int], None]) -> None:
    """Measure the pairs of one shard as `mechvlm.winoground` does, and write it.

    A pair that cannot be read is set aside, as an example would be.
    """
    clock = time.perf_counter()
    name, indices = plan.names[model], plan.pair_indices(number)
    tags = {e.meta["pair"]: e.meta.get("tag") for e in plan.data.examples if "pair" in e.meta}
    set_aside: list[dict] = []
    halved: list[dict] = []
    pairs_read: list[Pair] = []
    values: list[torch.Tensor] = []  # each [measure layer pair caption image]
    size = pairs_per_batch(plan.batch_size)
    with threads_for(vlm):
        for start in range(indices.start, indices.stop, size):
            batch = range(start, min(start + size, indices.stop))
            parts = read_or_halve(
                vlm, plan.pairs, batch, lambda pairs: read_pairs(vlm, pairs, plan.prompt), set_aside, halved
            )
            for part, part_values in parts:
                pairs_read += [plan.pairs[index] for index in part]
                values.append(part_values)
            progress(2 * (batch.stop - indices.start))
    frames = {table: pd.DataFrame(columns=schema.names) for table, schema in PAIR_SCHEMAS.items()}
    if pairs_read:
        ids = tuple(pair.id for pair in pairs_read)
        result = WinogroundResult(torch.cat(values, 2), ids, (), plan.prompt, name)
        right = {score: part.tolist() for score, part in result.scores._asdict().items()}
        tag = [None if tags[id] is None else str(tags[id]) for id in ids]
        frames = {
            "pair_scores": pd.DataFrame({"model": name, "pair": ids, "tag": tag, **right}),
            "pairs": result.to_frame().assign(model=name),
        }
    tables = {
        table: pa.Table.from_pandas(frames[table][schema.names], schema, preserve_index=False).replace_schema_metadata()
        for table, schema in PAIR_SCHEMAS.items()
    }
    about = {
        "read": len(pairs_read),
        "aside": set_aside,
        "halved": halved,
        "seconds": round(time.perf_counter() - clock, 3),
    }
    write_folder(plan.shard_folder(model, number), tables, about)


def make_gallery(plan: Plan, vlm: VLM, model: int, examples: list[Example], progress: Callable[[int], None]) -> None:
    """Answer the examples that the report shows, and write the answers beside the shards.

    With `plan.views`, also make each example's patch view. An example that does not fit into memory
    is left out, with its reason.
    """
    clock = time.perf_counter()
    name = plan.names[model]
    answers: list[dict] = []
    views: list[dict] = []
    left_out: list[dict] = []
    with threads_for(vlm) as threads:
        texts = _answers(vlm, examples, plan.prompt, plan.batch_size)
        for done, example in enumerate(examples):
            progress(done)
            try:
                if example.id not in texts:
                    raise MemoryError("its answer does not fit into memory")
                if plan.views:
                    page = retrying(partial(gallery.read_view, vlm, example.image, plan.prompt))
                    heat = BytesIO()
                    page.heat.save(heat, "PNG")
                    keys = {"model": name, "example": example.id, "heat": heat.getvalue()}
                    views.append(keys | {"html": page.html, "token": page.token, "layer": page.layer})
                answers.append({"model": name, "example": example.id, "answer": texts[example.id]})
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                left_out.append({"example": example.id, "reason": first_line(error)})
    about = {
        "class": vlm.record.hf_class, "revision": vlm.revision,
        "dtype": str(retrying(lambda: vlm.dtype)).removeprefix("torch."),
        "device": str(vlm.device) if vlm.has_weights else "ndif", "n_layers": vlm.n_layers, "threads": threads,
        "left_out": left_out,
        "seconds": round(time.perf_counter() - clock, 3),
    }  # fmt: skip
    tables = {
        "answers": pa.Table.from_pylist(answers, ANSWER_SCHEMA),
        "views": pa.Table.from_pylist(views, VIEW_SCHEMA),
    }
    write_folder(plan.gallery_folder(model), tables, about)


def _answers(vlm: VLM, examples: list[Example], prompt: str, batch_size: int) -> dict[str, str]:
    """The model's answers by example id, without those that do not fit into memory."""
    texts: dict[str, str] = {}
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        try:
            inputs = vlm.inputs([e.image for e in batch], prompt)
            texts |= zip((e.id for e in batch), retrying(partial(vlm.generate, inputs)), strict=True)
            continue
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if len(batch) > 1:
            texts |= _answers(vlm, batch, prompt, len(batch) // 2)
    return texts


def check_prompt(vlm: VLM, prompt: str) -> None:
    """Try the prompt on a blank image: an error that every example would meet is raised once.

    Raises:
        InputError: where the prompt leaves no text token, or cannot be used at all.
    """
    tokens: TokenMap = vlm.inputs(Image.new("RGB", (64, 64)), prompt).tokens
    if not len(tokens.text):
        raise InputError(
            f"The prompt {prompt!r} leaves {vlm.name} without a text token to compare with the image's. Give one with words."
        )


@contextmanager
def threads_for(vlm: VLM) -> Iterator[int]:
    """One thread for a small model on the CPU; gives the number in use, and resets it afterwards.

    A small model's matrix products gain nothing from threads. Where another process runs too, the
    threads wait for each other at every product: on two busy cores the bundled models took seven
    times as long.
    """
    before = torch.get_num_threads()
    small = sum(p.numel() for p in vlm.hf.parameters()) < SMALL_MODEL and vlm.device.type == "cpu"
    torch.set_num_threads(1 if small else before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
