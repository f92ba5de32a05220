"""How one shard of a study is made, and a model's gallery.

A shard is made whole, in batches that never cross its borders, from the plan alone: it holds the
same numbers whoever makes it, and whatever was made before. `mechvlm.study.running.plan` says which
examples it holds.
"""

import time
from collections.abc import Callable, Iterator
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
from mechvlm.inputs.answer import Answer
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import TokenMap
from mechvlm.measures.vocabulary import VocabularyWords
from mechvlm.ndif.connection import retrying
from mechvlm.probes.contextualization import Contextualization
from mechvlm.probes.logit_lens import LogitLens
from mechvlm.study.report import gallery
from mechvlm.study.running.answer_rows import read_with_answers
from mechvlm.study.running.atomic import write_folder
from mechvlm.study.running.beside import Beside
from mechvlm.study.running.controls import read_controls
from mechvlm.study.running.memory import read_or_halve
from mechvlm.study.running.plan import GALLERY_EXAMPLES, Plan
from mechvlm.study.running.rows import MeanOfHeads, ShardRows, as_tables
from mechvlm.study.running.settings import CONTROL_EXAMPLES, pairs_per_batch
from mechvlm.tracing.memory import first_line, out_of_memory
from mechvlm.tracing.reading import read_batch
from mechvlm.vlm.encoding import page_locked
from mechvlm.vlm.vlm import VLM

PROBES = (
    LogitLens(k=1, positions="all"),
    Contextualization(),
    MeanOfHeads(dst=("last_text", "last_image")),
)
"""What reads the prompt of every example."""
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
    plan: Plan, vlm: VLM, model: int, number: int, progress: Callable[[int], None], beside: Beside[Inputs],
    words: VocabularyWords,
) -> None:  # fmt: skip
    """Read the examples, or the pairs, of one shard, and have it written beside what follows.

    An example that cannot be read is set aside with its reason. So is one that does not fit into
    memory alone, after its batch was halved down to it.

    Args:
        plan: of the study.
        vlm: the model.
        model: its number in the plan.
        number: of the shard.
        progress: called with the number of examples read so far.
        beside: prepares the batches' inputs and collects their rows while the model reads.
        words: of the model's vocabulary.
    """
    if number not in range(len(plan)):
        beside.finish()  # shards are written in their order
        _make_pair_shard(plan, vlm, model, number, progress)
        return
    clock = time.perf_counter()
    rows = ShardRows(plan.names[model], plan.data.examples, words)
    set_aside: list[dict] = []
    halved: list[dict] = []
    done = 0

    def read_part(part: range) -> tuple:
        inputs = beside.inputs(part)
        if plan.answers:
            return read_with_answers(vlm, inputs, PROBES)
        return inputs.token_maps, read_batch(vlm, inputs, *PROBES), None

    for batch in plan.batches(number):
        for part, read in read_or_halve(vlm, plan.data.examples, batch, read_part, set_aside, halved):
            beside.collect(partial(rows.add, part, *read))
        done += len(batch)
        progress(done)
    seconds = time.perf_counter() - clock
    beside.collect(lambda: write_shard(plan, model, number, rows, set_aside, halved, seconds))


def write_shard(
    plan: Plan, model: int, number: int, rows: ShardRows, set_aside: list[dict], halved: list[dict], seconds: float
) -> None:
    """Write a shard of examples, once all its rows are collected."""
    ids = rows.context.ids
    about = plan.shard_identity(model, number) | {
        "read": len(ids),
        "first": ids[: max(GALLERY_EXAMPLES, CONTROL_EXAMPLES)],
        "halved": halved,
        "seconds": round(seconds, 3),
    }
    tables = as_tables(rows.frames(set_aside)) | (rows.answers.tables() if plan.answers else {})
    write_folder(plan.shard_folder(model, number), tables, about)


def inputs_of(plan: Plan, vlm: VLM, batch: range) -> Inputs:
    """The inputs of the examples with these indices, ready to be copied to a GPU."""
    return page_locked(vlm.inputs([plan.data.examples[index].image for index in batch], plan.prompt), vlm)


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
    for start in range(indices.start, indices.stop, size):
        batch = range(start, min(start + size, indices.stop))
        parts = read_or_halve(
            vlm, plan.pairs, batch, lambda part: read_pairs(vlm, plan.pairs[part.start : part.stop], plan.prompt),
            set_aside, halved,
        )  # fmt: skip
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
    about = plan.shard_identity(model, number) | {
        "read": len(pairs_read),
        "aside": set_aside,
        "halved": halved,
        "seconds": round(time.perf_counter() - clock, 3),
    }
    write_folder(plan.shard_folder(model, number), tables, about)


def make_gallery(plan: Plan, vlm: VLM, model: int, examples: list[Example], progress: Callable[[int], None]) -> None:
    """Answer the examples that the report shows, and write the answers beside the shards.

    With `plan.views`, also make each example's patch view. An example that does not fit into memory
    is left out, with its reason. The gallery holds the first `GALLERY_EXAMPLES` of the examples;
    the controls of the model's curve, which are written with it, are read on all of them.
    """
    clock = time.perf_counter()
    name = plan.names[model]
    answers: list[dict] = []
    views: list[dict] = []
    left_out: list[dict] = []
    with threads_for(vlm) as threads:
        shown = examples[:GALLERY_EXAMPLES]
        texts = _answers(vlm, shown, plan.prompt, plan.batch_size)
        for done, example in enumerate(shown):
            progress(done)
            try:
                if example.id not in texts:
                    raise MemoryError("its answer does not fit into memory")
                if plan.views:
                    inputs = gallery.page_inputs(vlm, example.image, plan.prompt, texts[example.id])
                    page = retrying(partial(gallery.read_view, vlm, inputs))
                    heat = BytesIO()
                    page.heat.save(heat, "PNG")
                    keys = {"model": name, "example": example.id, "heat": heat.getvalue()}
                    views.append(keys | {"html": page.html, "token": page.token, "layer": page.layer})
                answers.append({"model": name, "example": example.id, "answer": texts[example.id]})
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                left_out.append({"example": example.id, "reason": first_line(error)})
        progress(len(shown))
        controls, about_controls = read_controls(plan, vlm, model, examples)
    about = plan.identity(plan.gallery_folder(model), examples) | {
        "class": vlm.record.hf_class, "revision": vlm.revision,
        "dtype": str(retrying(lambda: vlm.dtype)).removeprefix("torch."),
        "device": str(vlm.device) if vlm.has_weights else "ndif", "n_layers": vlm.n_layers, "threads": threads,
        "left_out": left_out, "controls": about_controls,
        "seconds": round(time.perf_counter() - clock, 3),
    }  # fmt: skip
    tables = {
        "answers": pa.Table.from_pylist(answers, ANSWER_SCHEMA),
        "views": pa.Table.from_pylist(views, VIEW_SCHEMA),
        "controls": controls,
    }
    write_folder(plan.gallery_folder(model), tables, about)


def _answers(vlm: VLM, examples: list[Example], prompt: str, batch_size: int) -> dict[str, Answer]:
    """The model's answers by example id, without those that do not fit into memory."""
    texts: dict[str, Answer] = {}
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
