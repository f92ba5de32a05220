"""run(): the study of Wei et al. 2024 on any models and any data set. One loop over batches, one forward a batch."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from PIL import Image

from mechvlm import bundled
from mechvlm.datasets import Dataset, Example, SetAside, fingerprint, load_dataset
from mechvlm.errors import InputError, NonFiniteError
from mechvlm.images import open_image
from mechvlm.loading import class_of, load
from mechvlm.phases import Phases, fit_phases
from mechvlm.probes.contextualization import Contextualization
from mechvlm.probes.logit_lens import LogitLens
from mechvlm.probes.norm_attention import NormAttention
from mechvlm.reading import read
from mechvlm.study.collect import ContextRows, LensRows, NormRows, frequent_words
from mechvlm.study.study import Study
from mechvlm.tokens import TokenMap
from mechvlm.vlm import VLM
from mechvlm.words import caption_words

if TYPE_CHECKING:
    from mechvlm.study.gallery import Shown

PROMPT = "Describe the scene."
GALLERY = 6
"""Examples that the report shows."""
THUMBNAIL = 256
SMALL = 20_000_000
"""Parameters below which a model runs on one thread."""

Progress = Callable[[str, int, int], None]


def run(
    models: Sequence[str | VLM] = bundled.NAMES,
    dataset: str | Dataset = "scenes",
    *,
    prompt: str = PROMPT,
    n: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Study:
    """The four-phase study: logit lens, contextualization and norm-based attention of every example, by layer.

    Args:
        models: bundled names, hub ids, folders, or models that `mechvlm.load` gave.
        dataset: as `mechvlm.datasets.load_dataset` takes it, or what it gave.
        prompt: of every example; the family's template is put around it.
        n: examples to draw; 200 scenes, or all of a folder, by default.
        seed: of the draw and of the bootstraps.
        device: as `mechvlm.load` takes it.
        dtype: as `mechvlm.load` takes it.
        batch_size: examples a forward. It changes speed and memory, not results.
        out: a folder for report, views, figures, tables and `run.json`: new or empty. None writes nothing.
        progress: called with what is going on, how much of it is done, and how much there is.

    Beside the one forward a batch, each of the `GALLERY` examples that the report shows is answered, and with `out` read
    once more by itself: for its patch view, which needs more destinations than the whole data set could afford.

    An example that cannot be read is set aside with its reason, and the rest goes on.

    Source: Wei et al. 2024, "A Study on Multi-modal Interaction in Vision Large Language Models".

    Raises:
        InputError: for a data set, prompt or folder that cannot be used, or where no example could be read.
        ModelError: for a model that cannot be loaded.
    """
    started = time.perf_counter()
    progress = progress or (lambda stage, done, total: None)
    names = [m.name if isinstance(m, VLM) else str(m) for m in models]
    if not names or len(set(names)) < len(names):
        raise InputError(f"Give one or more models, each once; got {names}.")
    if batch_size < 1:
        raise InputError(f"A batch of {batch_size} examples was asked for; at least 1 is needed.")
    if seed < 0:
        raise InputError(f"The seed {seed} was given; seeds are 0 or more.")
    for model in models:
        if isinstance(model, str):
            class_of(model)  # before the first model runs, not after it
    check_device(device)
    folder = None if out is None else Path(out)
    if folder is not None:
        _check_folder(folder)
    data = _worded(dataset if isinstance(dataset, Dataset) else load_dataset(dataset, n, seed))
    settings = {
        "models": names, "dataset": data.name, "prompt": prompt, "n": len(data), "seed": seed, "device": device,
        "dtype": dtype, "batch_size": batch_size, "out": None if out is None else str(out),
    }  # fmt: skip

    parts: list[dict[str, pd.DataFrame]] = []
    about: dict[str, dict[str, Any]] = {}
    found: dict[str, Phases | None] = {}
    gallery: dict[str, tuple[Example, Image.Image]] = {}
    views: dict[tuple[str, str], Shown] = {}
    skipped = [{"model": "", "example": one.id, "reason": one.reason} for one in data.set_aside]
    for name, model in zip(names, models, strict=True):
        clock = time.perf_counter()
        progress(f"{name}: loading", 0, 0)
        vlm = model if isinstance(model, VLM) else load(model, device=device, dtype=dtype)
        with _threads_for(vlm) as threads:
            tables, aside, shown = _measure(vlm, name, data, prompt, batch_size, progress)
            if folder is not None:
                views |= _explore(vlm, name, shown, prompt, progress)
        progress(f"{name}: phases", 0, 0)
        found[name] = _phases(tables["contextualization"], seed)
        tables["phases"] = _phase_table(name, found[name])
        parts.append(tables)
        skipped += [{"model": name, "example": e.id, "reason": reason} for e, reason in aside]
        for example in shown:
            gallery.setdefault(example.id, (example, _thumbnail(example)))
        about[name] = {
            "class": vlm.record.hf_class, "revision": vlm.revision, "dtype": str(vlm.dtype).removeprefix("torch."),
            "device": str(vlm.device), "n_layers": vlm.n_layers, "n_examples": len(data) - len(aside),
            "threads": threads, "seconds": round(time.perf_counter() - clock, 2),
        }  # fmt: skip
        del vlm
    study = Study(
        tables={key: pd.concat([p[key] for p in parts], ignore_index=True) for key in parts[0]},
        phases=found,
        skipped=pd.DataFrame(skipped, columns=["model", "example", "reason"]),
        settings=settings,
        models=about,
        dataset={"name": data.name, "n": len(data), "fingerprint": data.fingerprint},
        gallery=list(gallery.values()),
        views=views,
        seconds=round(time.perf_counter() - started, 2),
    )
    if folder is not None:
        # Only here, so that a study without a folder needs neither matplotlib nor jinja2.
        from mechvlm.study import store

        study = store.write(study, folder, progress, started)
    return study


def _measure(vlm: VLM, name: str, data: Dataset, prompt: str, batch_size: int, progress: Progress):
    """One model over all examples: its tables, what was set aside as (example, reason), and the gallery's examples."""
    _check_prompt(vlm, prompt)
    probes = LogitLens(k=1, positions="all"), Contextualization(), NormAttention(dst=("last_text", "last_image"))
    lens_rows, context_rows, norm_rows = LensRows(name), ContextRows(name), NormRows(name)
    aside: list[tuple[Example, str]] = []
    shown: list[Example] = []
    words: list[dict] = []
    done = 0
    for start in range(0, len(data), batch_size):
        batch = list(data.examples[start : start + batch_size])
        progress(f"{name}: reading", start, len(data))
        for examples, maps, (lens, context, norms) in _reads(vlm, batch, prompt, probes, aside):
            for row, (example, tokens) in enumerate(zip(examples, maps, strict=True)):
                own = lens.of(row)
                lens_rows.add(example, tokens, own)
                if len(shown) < GALLERY:
                    shown.append(example)
                    words += frequent_words(example, tokens, own)
            context_rows.add(examples, context)
            norm_rows.add(maps, norms)
            done += len(examples)
    progress(f"{name}: reading", len(data), len(data))
    if not done:
        raise InputError(
            f"None of the {len(data)} examples could be read by {name}. The first, {aside[0][0].id}: {aside[0][1]}"
        )
    progress(f"{name}: answers", 0, 0)
    answers = []
    for start in range(0, len(shown), batch_size):
        some = shown[start : start + batch_size]
        texts = vlm.generate(vlm.inputs([e.image for e in some], prompt))
        answers += [{"model": name, "example": e.id, "answer": t} for e, t in zip(some, texts, strict=True)]
    curves, baseline = context_rows.frames()
    word_table = pd.DataFrame(words, columns=["example", "layer", "word", "positions"])
    word_table.insert(0, "model", name)
    tables = {
        "contextualization": curves,
        "baseline": baseline,
        "lens": lens_rows.frame(),
        "norm_attention": norm_rows.frame(),
        "answers": pd.DataFrame(answers, columns=["model", "example", "answer"]),
        "words": word_table,
    }
    return tables, aside, shown


def _explore(
    vlm: VLM, name: str, shown: list[Example], prompt: str, progress: Progress
) -> "dict[tuple[str, str], Shown]":
    """The gallery's patch views, by (model, example id)."""
    from mechvlm.study import gallery  # only with a folder: it needs matplotlib

    views = {}
    for done, example in enumerate(shown):
        progress(f"{name}: patch views", done, len(shown))
        views[name, example.id] = gallery.show(vlm, example.image, prompt)
    return views


def _reads(vlm: VLM, batch: list[Example], prompt: str, probes: tuple, aside: list) -> Iterator[tuple]:
    """The batch in one forward; where an example spoils it, halves, until those that do stand alone."""
    try:
        inputs = vlm.inputs([e.image for e in batch], prompt)
        results = read(vlm, inputs, *probes)
    except (InputError, NonFiniteError) as error:
        if len(batch) == 1:
            aside.append((batch[0], str(error)))
            return
        half = len(batch) // 2
        yield from _reads(vlm, batch[:half], prompt, probes, aside)
        yield from _reads(vlm, batch[half:], prompt, probes, aside)
    else:
        yield batch, inputs.token_maps, results


def _worded(data: Dataset) -> Dataset:
    """Without the examples whose captions hold no word to look for: their precision would be 0 whatever is decoded."""
    aside = [e for e in data.examples if not caption_words(e.captions)]
    if not aside:
        return data
    kept = tuple(e for e in data.examples if e not in aside)
    reason = "its captions hold no word that counts (two letters or more, no stop word)"
    if not kept:
        raise InputError(
            f"None of the {len(aside)} examples of {data.name} can be used. The first, {aside[0].id}: {reason}"
        )
    return Dataset(data.name, kept, (*data.set_aside, *(SetAside(e.id, reason) for e in aside)), fingerprint(kept))


def _check_prompt(vlm: VLM, prompt: str) -> None:
    """What is wrong with the prompt is wrong with every example: said once, and before the first."""
    tokens: TokenMap = vlm.inputs(Image.new("RGB", (64, 64)), prompt).tokens
    if not len(tokens.text):
        raise InputError(f"The prompt {prompt!r} leaves {vlm.name} without a text token to compare with the image's.")


def _phases(curves: pd.DataFrame, seed: int) -> Phases | None:
    by_pair = {
        pair: part.pivot(index="example", columns="layer", values="value").to_numpy(dtype="float64")
        for pair, part in curves.groupby("pair")
    }
    inter, image, text = (by_pair[pair] for pair in ("inter", "image", "text"))
    if inter.shape[1] < 3:
        return None
    return fit_phases(inter, image=image, text=text, seed=seed)


def _phase_table(name: str, found: Phases | None) -> pd.DataFrame:
    table = pd.DataFrame() if found is None else found.to_frame()
    table.insert(0, "model", name)
    return table


def _thumbnail(example: Example) -> Image.Image:
    image = open_image(example.image)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


@contextmanager
def _threads_for(vlm: VLM) -> Iterator[int]:
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


def check_device(device: str | None) -> None:
    """Raises InputError for a device that is not there: before a model is loaded, which can take minutes."""
    try:
        # Puts something there: a device can have a name and still be missing.
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"The device {device!r} cannot be used ({reason}). Try cpu, or cuda where there is one."
        ) from error


def _check_folder(out: Path) -> None:
    """The folder can be made and written to: known now, and not after an hour's work. Nothing of the trial stays."""
    try:
        if out.is_dir() and any(out.iterdir()):
            raise InputError(
                f"The folder {out} is not empty; a study goes to a new or an empty one. Give another --out."
            )
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
        for folder in missing:
            folder.rmdir()
    except OSError as error:
        raise InputError(f"Nothing can be written to {out} ({error.strerror}). Give another --out.") from error
