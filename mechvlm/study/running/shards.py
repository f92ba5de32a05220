"""The work of a study, cut into shards: which are missing, and how one is made.

A shard is a run of consecutive examples of one model. It is made whole, in batches that never cross its borders, from the
settings alone: so it holds the same numbers whoever makes it, and whatever happened before. Of Winoground, whose examples are
sides of pairs, further shards hold runs of pairs; they are numbered on, and made and counted like the others.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import torch
from PIL import Image

from mechvlm.datasets import Dataset, Example, Pair, pairs_of
from mechvlm.errors import InputError, NonFiniteError
from mechvlm.experiments.winoground import read_pairs
from mechvlm.experiments.winoground_result import PairScores, WinogroundResult
from mechvlm.inputs.tokens import TokenMap
from mechvlm.ndif.connection import retrying
from mechvlm.probes.contextualization import Contextualization
from mechvlm.probes.logit_lens import LogitLens
from mechvlm.probes.norm_attention import NormAttention
from mechvlm.study.report import gallery
from mechvlm.study.running.atomic import write_piece
from mechvlm.study.running.rows import ContextRows, LensRows, NormRows, as_tables, frequent_words
from mechvlm.study.running.settings import pair_shard_size, pairs_a_batch
from mechvlm.tracing.reading import read
from mechvlm.vlm.vlm import VLM

GALLERY = 6
"""Examples that the report shows."""
SMALL = 20_000_000
"""Parameters below which a model runs on one thread."""
ANSWERS = pa.schema([(name, pa.string()) for name in ("model", "example", "answer")])
VIEWS = pa.schema(
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


@dataclass(frozen=True)
class Plan:
    """What a worker needs to make any of a study's shards.

    Attributes:
        folder: where they go.
        names: the models', in order.
        data: the examples, in order.
        prompt: of every example.
        batch_size: examples a forward.
        shard: examples a shard, the last one of a model less.
        views: whether the gallery has patch views.
    """

    folder: Path
    names: tuple[str, ...]
    data: Dataset
    prompt: str
    batch_size: int
    shard: int
    views: bool

    def __len__(self) -> int:
        """Shards of examples of each model."""
        return -(-len(self.data) // self.shard)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Winoground's pairs of which both sides are among the examples; of any other data set there is none."""
        try:
            return tuple(pairs_of(self.data.examples))
        except InputError:
            return ()

    @property
    def pair_numbers(self) -> range:
        """The numbers of each model's shards of pairs, after those of its shards of examples."""
        return range(len(self), len(self) + -(-len(self.pairs) // pair_shard_size(self.batch_size)))

    @property
    def readings(self) -> int:
        """Examples that each model reads: all of them, and both sides of each pair once more."""
        return len(self.data) + 2 * len(self.pairs)

    def at(self, model: int, number: int) -> Path:
        if number < len(self):
            return self.folder / f"{model}-{number:05}"
        return self.folder / f"{model}-pairs-{number - len(self):05}"

    def gallery(self, model: int) -> Path:
        return self.folder / f"{model}-gallery"

    def examples(self, number: int) -> Sequence[int]:
        """Which examples, by their index in the data set; of a shard of pairs, both sides of each."""
        if number < len(self):
            return range(number * self.shard, min((number + 1) * self.shard, len(self.data)))
        ids = {self.pairs[index].id for index in self.of_pairs(number)}
        return [index for index, example in enumerate(self.data.examples) if example.meta.get("pair") in ids]

    def of_pairs(self, number: int) -> range:
        """Which pairs, by their index in `pairs`."""
        first, each = number - len(self), pair_shard_size(self.batch_size)
        return range(first * each, min((first + 1) * each, len(self.pairs)))


def missing(plan: Plan, model: int) -> list[int]:
    """The numbers of a model's shards that are not there yet."""
    return [n for n in (*range(len(plan)), *plan.pair_numbers) if not plan.at(model, n).is_dir()]


def make_shard(
    plan: Plan, vlm: VLM, model: int, number: int, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Read one shard's examples, or its pairs, and write it. `progress` is called with the examples done so far.

    An example that cannot be read is set aside with its reason; so is one that does not fit into memory by itself, after its
    batch was halved until it stood alone.
    """
    if number not in range(len(plan)):
        _make_pairs(plan, vlm, model, number, progress)
        return
    clock = time.perf_counter()
    name, all_examples, indices = plan.names[model], plan.data.examples, plan.examples(number)
    probes = LogitLens(k=1, positions="all"), Contextualization(), NormAttention(dst=("last_text", "last_image"))
    lens_rows, context_rows, norm_rows = LensRows(name), ContextRows(name), NormRows(name)
    aside: list[dict] = []
    halved: list[dict] = []
    words: list[dict] = []
    shown = done = 0

    def read_examples(some: Sequence[Example]) -> tuple:
        inputs = vlm.inputs([e.image for e in some], plan.prompt)
        return inputs.token_maps, read(vlm, inputs, *probes)

    with threads_for(vlm):
        stop = indices[-1] + 1
        for start in range(indices[0], stop, plan.batch_size):
            batch = range(start, min(start + plan.batch_size, stop))
            for some, (maps, (lens, context, norms)) in _reads(vlm, all_examples, batch, read_examples, aside, halved):
                for row, (index, tokens) in enumerate(zip(some, maps, strict=True)):
                    example, other = all_examples[index], all_examples[(index + 1) % len(all_examples)]
                    own = lens.of(row)
                    lens_rows.add(example, other, tokens, own)
                    # The gallery shows the first that could be read, of whichever shard.
                    if shown < GALLERY:
                        words += frequent_words(name, example, tokens, own)
                        shown += 1
                examples = [all_examples[i] for i in some]
                context_rows.add(examples, context)
                norm_rows.add(examples, maps, norms)
            done += len(batch)
            progress(done)
    curves, sums = context_rows.frames()
    frames = {
        "contextualization": curves, "context_sums": sums, "lens": lens_rows.frame(), "norm_sums": norm_rows.frame(),
        "attention_share": norm_rows.share(),
        "words": pd.DataFrame(words), "skipped": pd.DataFrame([{"model": name, **one} for one in aside]),
    }  # fmt: skip
    about = {
        "read": len(context_rows.ids),
        "first": context_rows.ids[:GALLERY],
        "halved": halved,
        "seconds": round(time.perf_counter() - clock, 3),
    }  # fmt: skip
    write_piece(plan.at(model, number), as_tables(frames), about)


def make_gallery(plan: Plan, vlm: VLM, model: int, shown: list[Example], progress: Callable[[int], None]) -> None:
    """Answer, and with `plan.views` explore, the examples that the report shows; write it as a piece beside the shards.

    What does not fit into memory is left out, with its reason.
    """
    clock = time.perf_counter()
    name = plan.names[model]
    answers: list[dict] = []
    views: list[dict] = []
    left_out: list[dict] = []
    with threads_for(vlm) as threads:
        texts = _answers(vlm, shown, plan.prompt, plan.batch_size)
        for done, example in enumerate(shown):
            progress(done)
            try:
                if example.id not in texts:
                    raise MemoryError("its answer does not fit into memory")
                if plan.views:
                    page = retrying(partial(gallery.show, vlm, example.image, plan.prompt))
                    heat = BytesIO()
                    page.heat.save(heat, "PNG")
                    keys = {"model": name, "example": example.id, "heat": heat.getvalue()}
                    views.append(keys | {"html": page.html, "token": page.token, "layer": page.layer})
                answers.append({"model": name, "example": example.id, "answer": texts[example.id]})
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                left_out.append({"example": example.id, "reason": _first_line(error)})
    about = {
        "class": vlm.record.hf_class, "revision": vlm.revision,
        "dtype": str(retrying(lambda: vlm.dtype)).removeprefix("torch."),
        "device": str(vlm.device) if vlm.has_weights else "ndif", "n_layers": vlm.n_layers, "threads": threads,
        "left_out": left_out,
        "seconds": round(time.perf_counter() - clock, 3),
    }  # fmt: skip
    tables = {"answers": pa.Table.from_pylist(answers, ANSWERS), "views": pa.Table.from_pylist(views, VIEWS)}
    write_piece(plan.gallery(model), tables, about)


def _make_pairs(plan: Plan, vlm: VLM, model: int, number: int, progress: Callable[[int], None]) -> None:
    """Measure one shard's pairs as `mechvlm.winoground` does, and write it. What cannot be read is set aside, as of examples."""
    clock = time.perf_counter()
    name, pairs = plan.names[model], plan.of_pairs(number)
    tags = {e.meta["pair"]: e.meta.get("tag") for e in plan.data.examples if "pair" in e.meta}
    aside: list[dict] = []
    halved: list[dict] = []
    used: list[Pair] = []
    found: list[torch.Tensor] = []
    each = pairs_a_batch(plan.batch_size)
    with threads_for(vlm):
        for start in range(pairs.start, pairs.stop, each):
            batch = range(start, min(start + each, pairs.stop))
            for some, values in _reads(
                vlm, plan.pairs, batch, lambda two: read_pairs(vlm, two, plan.prompt), aside, halved
            ):
                used += [plan.pairs[index] for index in some]
                found.append(values)
            progress(2 * (batch.stop - pairs.start))
    frames = {table: pd.DataFrame(columns=schema.names) for table, schema in PAIR_SCHEMAS.items()}
    if used:
        ids = tuple(pair.id for pair in used)
        result = WinogroundResult(torch.cat(found, 2), ids, (), plan.prompt, name)
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
        "read": len(used),
        "aside": aside,
        "halved": halved,
        "seconds": round(time.perf_counter() - clock, 3),
    }  # fmt: skip
    write_piece(plan.at(model, number), tables, about)


def _reads(
    vlm: VLM,
    among: Sequence[Example] | Sequence[Pair],
    batch: range,
    read_some: Callable[[list], Any],
    aside: list,
    halved: list,
) -> Iterator[tuple]:
    """The batch in one forward; where one of it spoils it or memory does not hold it, halves, until each stands alone."""
    some = [among[index] for index in batch]
    kind = "pair" if isinstance(some[0], Pair) else "example"
    try:
        results = retrying(lambda: read_some(some))
    except (InputError, NonFiniteError) as error:
        reason = str(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = f"it does not fit into the memory of {vlm.device}, even alone ({_first_line(error)})"
        if len(batch) > 1:
            halved.append({"first": some[0].id, f"{kind}s": len(batch)})
    else:
        yield batch, results
        return
    # Only here is what the failed forward held free again: while an error is handled, its traceback holds the tensors.
    if vlm.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(batch) == 1:
        aside.append({kind: some[0].id, "reason": reason})
        return
    half = len(batch) // 2
    yield from _reads(vlm, among, batch[:half], read_some, aside, halved)
    yield from _reads(vlm, among, batch[half:], read_some, aside, halved)


def _answers(vlm: VLM, shown: list[Example], prompt: str, batch_size: int) -> dict[str, str]:
    """The model's answers by example id; without those that do not fit into memory."""
    texts: dict[str, str] = {}
    for start in range(0, len(shown), batch_size):
        some = shown[start : start + batch_size]
        try:
            inputs = vlm.inputs([e.image for e in some], prompt)
            texts |= zip((e.id for e in some), retrying(partial(vlm.generate, inputs)), strict=True)
            continue
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if len(some) > 1:
            texts |= _answers(vlm, some, prompt, len(some) // 2)
    return texts


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short. PyTorch says so in several ways, by device."""
    said = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "out of memory" in said
        or "can't allocate memory" in said
        or "alloc_failed" in said
    )


def check_prompt(vlm: VLM, prompt: str) -> None:
    """What is wrong with the prompt is wrong with every example: said once, and before the first."""
    tokens: TokenMap = vlm.inputs(Image.new("RGB", (64, 64)), prompt).tokens
    if not len(tokens.text):
        raise InputError(f"The prompt {prompt!r} leaves {vlm.name} without a text token to compare with the image's.")


@contextmanager
def threads_for(vlm: VLM) -> Iterator[int]:
    """One thread for a small model on the CPU; gives the number in use, and sets it back afterwards.

    Its products are so small that threads gain nothing, and where another process runs too they wait for each other at
    every one of them: on two busy cores the bundled models took seven times as long.
    """
    before = torch.get_num_threads()
    small = sum(p.numel() for p in vlm.hf.parameters()) < SMALL and vlm.device.type == "cpu"
    torch.set_num_threads(1 if small else before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
