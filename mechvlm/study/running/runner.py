"""run(): the study of Wei et al. 2024, on any models and any data set.

1. Check the options, load the data set, and take the folder (`workspace`).
2. For each model, make the shards that are missing, one forward per batch (`shards`, `workers`).
3. Put the shards together into the study (`assemble`) and publish the results in the folder.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mechvlm import bundled
from mechvlm.datasets import Dataset, SetAside, fingerprint, load_dataset
from mechvlm.errors import InputError, RemoteError, StoppedError
from mechvlm.experiments.winoground import PROMPT
from mechvlm.families.known import architecture_of
from mechvlm.inputs.views import MEMORY
from mechvlm.measures.words import caption_words
from mechvlm.progress import Progress, study_stages
from mechvlm.study.running import merge
from mechvlm.study.running.answer_rows import ANSWER_SETTINGS
from mechvlm.study.running.assemble import assemble_study, seconds_so_far
from mechvlm.study.running.plan import GALLERY_EXAMPLES, Plan, missing_shards
from mechvlm.study.running.ray_workers import cluster_of
from mechvlm.study.running.resume import check_shards
from mechvlm.study.running.settings import (
    CONTROL_EXAMPLES,
    MEASURE_SETTINGS,
    settings_digest,
    settings_of,
    shard_size,
)
from mechvlm.study.running.workers import LocalWorker, Workers
from mechvlm.study.running.workspace import SHARDS, claim_folder, publish_results, remove_working_files
from mechvlm.study.save import save_study
from mechvlm.study.study import Study
from mechvlm.vlm.devices import device_of, dtype_of
from mechvlm.vlm.loading import class_of
from mechvlm.vlm.vlm import VLM


def run(
    models: Sequence[str | VLM] = bundled.NAMES,
    dataset: str | Dataset = "scenes",
    *,
    prompt: str = PROMPT,
    n: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | dict | None = None,
    remote: bool = False,
    batch_size: int = 16,
    out: str | Path | None = None,
    progress: Progress | None = None,
    ray: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    answers: bool = False,
) -> Study:
    """The four-phase study: logit lens, contextualization and norm-based attention, by layer.

    Every example is read once by every model. Example::

        from mechvlm.study import run

        study = run(["tiny-llava"], "scenes", n=20, out="my-study")
        study.summary()

    With `out`, a study can be interrupted. Whatever ends the process, nothing that was read is
    lost, and the same call goes on where it stopped. The tables are, byte for byte, those of a run
    that never stopped (on the same kind of machine, since a sum's last bits depend on it). Work is
    kept in shards of `mechvlm.study.running.settings.EXAMPLES_PER_SHARD` examples. The same call on
    a finished study gives the content of its folder. A shard whose content does not match its
    checksum is made again, after a warning; one of another study is refused.

    Args:
        models: bundled names, hub ids, folders, or models from `mechvlm.load`.
        dataset: a name that `mechvlm.datasets.load_dataset` takes, or what it returned.
        prompt: of every example; the family's template is put around it.
        n: examples to draw; by default 200 scenes, and all of any other data set.
        seed: of the draw, the bootstraps and the controls.
        device: as `mechvlm.load` takes it; with `ray` "cuda", "mps" or "cpu".
        dtype: as `mechvlm.load` takes it.
        device_map: as `mechvlm.load` takes it, instead of `device`: "auto" spreads one large model
            over several GPUs.
        remote: read on NDIF, with one request per batch (with `answers` two: the first writes).
            Where a connection is lost, requests that
            change nothing there are sent again after a while. Where it does not come back, the
            study stops, and can be resumed like any other.
        batch_size: examples in a forward. It changes speed, memory, and the last bits of results.
        out: a folder for report, views, figures, tables and `run.json`: new, empty, or that of a
            study with the same settings. None writes nothing.
        progress: called with the stage, how much of it is done, and how much there is. While models
            read, these count the examples of all models together; with Winoground, both sides of
            each pair once more. By default a notebook shows a bar for each stage.
        ray: "auto" or the address of a Ray cluster, whose workers then read the examples. "auto" is
            the cluster of RAY_ADDRESS, or without that variable a new one on this machine, for this
            run. Tables, folder and resuming are the same with and without a cluster.
        workers: with `ray`, how many; each one holds the model.
        gpus_per_worker: with `ray`; by default 1 with a `device` "cuda" or a `device_map`, else 0.
        answers: also read each model's answer to every example, token by token: the image's share
            of what wrote it, and its probability at each state. The answer is written first,
            greedily, by at most `mechvlm.study.running.answer_rows.ANSWER_TOKENS` tokens; then one
            forward of prompt and answer reads both, instead of that of the prompt alone. The
            prompt's tables stay the same, up to the last bits. (Where two tokens are nearly as
            likely, another batch size may write another one.)

    With Winoground, each pair with both sides drawn is also measured as `mechvlm.winoground` does,
    in further forwards with the same prompt. Tables, report and figures then hold the pairs' scores
    and measures too.

    The report shows the first `mechvlm.study.running.plan.GALLERY_EXAMPLES` examples of each model.
    The model answers each of them, and with `out` reads it once more alone: its patch view needs
    more destinations than the whole data set could afford. The first
    `mechvlm.study.running.settings.CONTROL_EXAMPLES` examples are also read with other things in
    the image's place, as `mechvlm.contextualization_controls` does, in three forwards more: the
    report says what of the phases exceeds these controls.

    An example that cannot be read is set aside with its reason, and the study goes on. A batch that
    does not fit into memory is halved and tried again, which `run.json` records.

    Source: Wei et al. 2024, "A Study on Multi-modal Interaction in Vision Large Language Models".

    Raises:
        InputError: for an option, data set, prompt or folder that cannot be used, or where no
            example could be read.
        ModelError: for a model that cannot be loaded.
        StoppedError: when nothing more can be written (a full disk, for instance), when workers end
            again and again, or when NDIF cannot be reached any more.
        RemoteError: when NDIF refuses the study; the message says why.
    """
    started = time.perf_counter()
    out = None if out is None else Path(out).expanduser()
    names = _checked_names(models, batch_size, seed, device, device_map, remote, ray)
    cluster = cluster_of(models, ray, workers, gpus_per_worker, device, device_map)
    dtype_of(dtype, "auto")
    if cluster is None and device is not None:
        device = str(device_of(device))
    data = _without_wordless(dataset if isinstance(dataset, Dataset) else load_dataset(dataset, n, seed))
    load_options: dict[str, Any] = {"device": device, "dtype": dtype, "device_map": device_map, "remote": remote}
    recorded_settings = {
        "models": list(names), "dataset": data.name, "prompt": prompt, "n": len(data), "seed": seed, "device": device,
        "dtype": dtype, "device_map": device_map, "batch_size": batch_size, "out": None if out is None else str(out),
        "remote": remote, "measures": MEASURE_SETTINGS, **({"answers": ANSWER_SETTINGS} if answers else {}),
    }  # fmt: skip
    with ExitStack() as stack:
        progress = progress or stack.enter_context(study_stages())
        weights: dict[str, dict] = {}
        settings_key = ""
        if out is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="mechvlm-")))
        else:
            folder = Path(out)
            progress("settings", 0, 0)
            settings = settings_of(
                models, data, prompt=prompt, seed=seed, batch_size=batch_size, answers=answers, **load_options
            )
            weights = settings["weights"]
            if stack.enter_context(claim_folder(folder, settings)):
                return Study.open(folder)
            settings_key = settings_digest(settings)
        size = shard_size(batch_size)
        plan = Plan(
            folder / SHARDS, names, data, prompt, batch_size, size, out is not None, answers, settings_key, seed
        )
        with _stops_explained(out):
            check_shards(plan)
            started -= seconds_so_far(plan)  # the study's seconds include those of earlier runs
            local = LocalWorker(plan, models, weights, load_options)
            with local if cluster is None else cluster.workers(local) as makers:
                load_seconds = [_make_missing(plan, model, makers, progress) for model in range(len(names))]
            with publish_results(folder) as staging:
                study = assemble_study(plan, staging, recorded_settings, weights, load_seconds, progress, started)
                if out is not None:
                    study = save_study(replace(study, out=folder), staging, progress, started, settings_key)
        if out is not None:
            remove_working_files(folder)
    return study


def _checked_names(
    models: Sequence[str | VLM],
    batch_size: int,
    seed: int,
    device: str | None,
    device_map: str | dict | None,
    remote: bool,
    ray: str | None,
) -> tuple[str, ...]:
    """The models' names, after a check of the options.

    Raises:
        InputError: for an option that cannot be used, or two that exclude each other.
        ModelError: for a model of a class that is not known.
    """
    names = tuple(m.name if isinstance(m, VLM) else str(m) for m in models)
    if not names or len(set(names)) < len(names):
        raise InputError(f"Give one or more models, each once; got {list(names)}.")
    if batch_size < 1:
        raise InputError(f"A batch of {batch_size} examples was asked for; at least 1 is needed.")
    if seed < 0:
        raise InputError(f"The seed {seed} was given; seeds are 0 or more.")
    for model in models:  # checked now for all, not after the first model has run for hours
        hf_class = model.record.hf_class if isinstance(model, VLM) else class_of(str(model))
        if architecture_of(hf_class).visual_tokens == "memory":
            raise InputError(
                f"{hf_class} cannot be studied: a study compares visual tokens with those of the text. {MEMORY}"
            )
    if device is not None and device_map is not None:
        raise InputError(f"Give device ({device}) or device_map ({device_map}), not both.")
    if remote and ray is not None:
        raise InputError(
            "NDIF and a Ray cluster were both asked for. With NDIF its machines do the reading: leave out ray or remote."
        )
    return names


def _without_wordless(data: Dataset) -> Dataset:
    """The data without examples whose captions hold no word to look for; those are set aside.

    Their precision would be 0 whatever is decoded.
    """
    has_words = [bool(caption_words(e.captions)) for e in data.examples]
    if all(has_words):
        return data
    kept = tuple(e for e, has in zip(data.examples, has_words, strict=True) if has)
    reason = "its captions hold no word that counts (two letters or more, no stop word)"
    aside = [SetAside(e.id, reason) for e, has in zip(data.examples, has_words, strict=True) if not has]
    if not kept:
        raise InputError(
            f"None of the {len(aside)} examples of {data.name} can be used. The first, {aside[0].id}: {reason}"
        )
    return replace(data, examples=kept, set_aside=(*data.set_aside, *aside), fingerprint=fingerprint(kept))


@contextmanager
def _stops_explained(out: str | Path | None) -> Iterator[None]:
    """Turn errors of disk and connection into a StoppedError that says what is kept and where."""
    try:
        yield
    except RemoteError as error:
        if not error.retryable or out is None:
            raise
        raise StoppedError(
            f"The study stopped: {error} What is done stays in {Path(out)}, and the same command goes on from there."
        ) from error
    except OSError as error:
        if out is None:
            raise StoppedError(f"The study stopped: {error}. It was given no folder: nothing of it is kept.") from error
        raise StoppedError(
            f"The study stopped: {error}. What is done stays in {Path(out)}; if the disk is full, make room. The same command "
            "goes on from there."
        ) from error


def _make_missing(plan: Plan, model: int, makers: Workers, progress: Progress) -> float:
    """Have one model's missing shards, gallery and controls made; gives the seconds of loading.

    Raises:
        InputError: where the model could read none of the examples.
    """
    name, missing = plan.names[model], missing_shards(plan, model)
    clock = time.perf_counter()
    makers.load(model, lambda: progress(f"{name}: loading", 0, 0))
    load_seconds = time.perf_counter() - clock
    _make_shards(plan, model, missing, makers, progress)
    if not merge.n_read(plan, model):
        first = next(row for row in merge.skipped(plan).itertuples() if row.model == name)
        raise InputError(
            f"None of the {len(plan.data)} examples could be read by {name}. The first, {first.example}: {first.reason}"
        )
    _make_gallery(plan, model, makers, progress)
    return load_seconds


def _make_shards(plan: Plan, model: int, missing: list[int], makers: Workers, progress: Progress) -> None:
    stage, total = f"{plan.names[model]}: reading", plan.n_readings * len(plan.names)
    # Earlier models are done, and so are the shards of this one that are not missing.
    to_read = sum(len(plan.example_indices(number)) for number in missing)
    before = plan.n_readings * (model + 1) - to_read
    progress(stage, before, total)
    makers.make_shards(model, missing, lambda done: progress(stage, before + done, total))


def _make_gallery(plan: Plan, model: int, makers: Workers, progress: Progress) -> None:
    stage = f"{plan.names[model]}: answers, views, controls"
    progress(stage, 0, 0)
    ids = merge.first_ids(plan, model, CONTROL_EXAMPLES)
    by_id = {e.id: e for e in plan.data.examples if e.id in ids}
    n_steps = min(len(ids), GALLERY_EXAMPLES) + 1
    makers.make_gallery(model, [by_id[id] for id in ids], lambda done: progress(stage, done, n_steps))
