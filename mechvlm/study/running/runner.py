"""run(): the study of Wei et al. 2024 on any models and any data set. One loop over shards, one forward a batch."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from PIL import Image

from mechvlm import bundled
from mechvlm.datasets import Dataset, Example, SetAside, fingerprint, load_dataset
from mechvlm.errors import InputError, RemoteError, StoppedError
from mechvlm.experiments.winoground import PROMPT
from mechvlm.inputs.images import open_image
from mechvlm.measures.words import caption_words
from mechvlm.progress import Progress
from mechvlm.study.curves import phases_of
from mechvlm.study.load import picture, read_tables
from mechvlm.study.record import Shown
from mechvlm.study.running import merge
from mechvlm.study.running.atomic import read_about, read_table
from mechvlm.study.running.ray_workers import cluster_of
from mechvlm.study.running.settings import MEASURE_SETTINGS, settings_of, shard_size
from mechvlm.study.running.shards import Plan, missing
from mechvlm.study.running.workers import Here, Workers
from mechvlm.study.running.workspace import SHARDS, clear, opened, stage
from mechvlm.study.save import save_study
from mechvlm.study.study import Study
from mechvlm.vlm.loading import check_device, class_of
from mechvlm.vlm.vlm import VLM

THUMBNAIL = 256


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
) -> Study:
    """The four-phase study: logit lens, contextualization and norm-based attention of every example, by layer.

    With `out`, nothing that was read is lost when the process ends, however it does: the same call goes on where it stopped, and
    its tables are, byte for byte, those of a run that never stopped (on the same kind of machine, as a sum's last bits depend on
    it). What is done is kept in shards of `mechvlm.study.running.settings.SHARD` examples. Of a finished study the same call
    gives what
    the folder holds.

    Args:
        models: bundled names, hub ids, folders, or models that `mechvlm.load` gave.
        dataset: as `mechvlm.datasets.load_dataset` takes it, or what it gave.
        prompt: of every example; the family's template is put around it.
        n: examples to draw; by default 200 scenes, and all of any other data set.
        seed: of the draw and of the bootstraps.
        device: as `mechvlm.load` takes it.
        dtype: as `mechvlm.load` takes it.
        device_map: as `mechvlm.load` takes it, instead of `device`: "auto" spreads one large model over several GPUs.
        remote: read on NDIF, by one request a batch. What changes nothing there is sent again, after a while, where a connection
            is lost; where none comes back, the study stops, and goes on as any other does.
        batch_size: examples a forward. It changes speed and memory, and of results the last bits.
        out: a folder for report, views, figures, tables and `run.json`: new, empty, or that of a study with the same settings.
            None writes nothing.
        progress: called with what is going on, how much of it is done, and how much there is; of what is read, the examples
            of all models together, and with Winoground both sides of each pair once more.
        ray: "auto" or the address of a Ray cluster, whose workers then read the examples; auto is that of RAY_ADDRESS, or
            without it one on this machine, for this run. Tables, folder and going on are the same, with and without it.
        workers: how many, with `ray`; each one holds the model.
        gpus_per_worker: with `ray`; 1 with a `device` "cuda" or a `device_map`, and otherwise 0, by default.

    Where the examples are Winoground's, every pair of which both sides were drawn is measured as `mechvlm.winoground` does, in
    further forwards with the same prompt: tables, report and figures then hold the pairs' scores and measures too.

    Beside the one forward a batch, each of the `mechvlm.study.running.shards.GALLERY` examples that the report shows is
    answered, and
    with `out` read once more by itself: for its patch view, which needs more destinations than the whole data set could afford.

    An example that cannot be read is set aside with its reason, and the rest goes on. A batch that does not fit into memory is
    halved and tried again, which `run.json` records.

    Source: Wei et al. 2024, "A Study on Multi-modal Interaction in Vision Large Language Models".

    Raises:
        InputError: for a data set, prompt or folder that cannot be used, or where no example could be read.
        ModelError: for a model that cannot be loaded.
        StoppedError: when nothing more can be written, on a full disk for instance, when workers end again and again, or NDIF
            cannot be reached any more.
        RemoteError: when NDIF refuses the study; it says why.
    """
    started = time.perf_counter()
    progress = progress or (lambda stage, done, total: None)
    names = tuple(m.name if isinstance(m, VLM) else str(m) for m in models)
    if not names or len(set(names)) < len(names):
        raise InputError(f"Give one or more models, each once; got {list(names)}.")
    if batch_size < 1:
        raise InputError(f"A batch of {batch_size} examples was asked for; at least 1 is needed.")
    if seed < 0:
        raise InputError(f"The seed {seed} was given; seeds are 0 or more.")
    for model in models:
        if isinstance(model, str):
            class_of(model)  # before the first model runs, not after it
    if device is not None and device_map is not None:
        raise InputError(f"Give device ({device}) or device_map ({device_map}), not both.")
    if remote and ray is not None:
        raise InputError(
            "NDIF and a Ray cluster were both asked for: NDIF's machines read, so leave out ray or remote."
        )
    cluster = cluster_of(models, ray, workers, gpus_per_worker, device, device_map)
    if cluster is None:
        check_device(device)
    data = _worded(dataset if isinstance(dataset, Dataset) else load_dataset(dataset, n, seed))
    settings = {
        "models": list(names), "dataset": data.name, "prompt": prompt, "n": len(data), "seed": seed, "device": device,
        "dtype": dtype, "device_map": device_map, "batch_size": batch_size, "out": None if out is None else str(out),
        "remote": remote, "measures": MEASURE_SETTINGS,
    }  # fmt: skip
    with ExitStack() as stack:
        weights: dict[str, dict] = {}
        if out is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="mechvlm-")))
        else:
            folder = Path(out)
            progress("settings", 0, 0)
            full = settings_of(
                models, data, prompt=prompt, seed=seed, device=device, dtype=dtype, batch_size=batch_size,
                device_map=device_map, remote=remote,
            )  # fmt: skip
            weights = full["weights"]
            if stack.enter_context(opened(folder, full)):
                return Study.open(folder)
        plan = Plan(folder / SHARDS, names, data, prompt, batch_size, shard_size(batch_size), views=out is not None)
        # The whole run's clock goes on from what earlier ones took.
        started -= _seconds(plan)
        try:
            here = Here(
                plan, models, weights, {"device": device, "dtype": dtype, "device_map": device_map, "remote": remote}
            )
            with here if cluster is None else cluster.workers(here) as hands:
                loaded = [_read_all(plan, i, hands, progress) for i in range(len(names))]
            with stage(folder) as staged:
                progress("tables", 0, 0)
                merge.write_tables(plan, staged / "data")
                study = _study(plan, staged, settings, weights, loaded, progress, started)
                if out is not None:
                    study = save_study(replace(study, out=folder), staged, progress, started)
        except RemoteError as error:
            if not error.retryable or out is None:
                raise
            raise StoppedError(
                f"The study stopped: {error} What is done stays in {folder}, and the same command goes on from there."
            ) from error
        except OSError as error:
            if out is None:
                raise StoppedError(
                    f"The study stopped: {error}. It was given no folder: nothing of it is kept."
                ) from error
            raise StoppedError(
                f"The study stopped: {error}. What is done stays in {folder}; where that is a full disk, make room. The same "
                "command goes on from there."
            ) from error
        if out is not None:
            clear(folder)
    return study


def _read_all(plan: Plan, number: int, hands: Workers, progress: Progress) -> float:
    """Have what is missing of one model's shards made, and its gallery; gives the seconds that loading took."""
    name, todo, n = plan.names[number], missing(plan, number), plan.readings
    if not todo and plan.gallery(number).is_dir():
        return 0.0
    clock = time.perf_counter()
    hands.load(number, lambda: progress(f"{name}: loading", 0, 0))
    took = time.perf_counter() - clock
    # Of the shards that are there, everything is done.
    total, at = n * len(plan.names), n * number + n - sum(len(plan.examples(shard)) for shard in todo)
    progress(f"{name}: reading", at, total)
    hands.shards(number, todo, lambda done: progress(f"{name}: reading", at + done, total))
    if not merge.n_read(plan, number):
        first = next(row for row in merge.skipped(plan).itertuples() if row.model == name)
        raise InputError(
            f"None of the {len(plan.data)} examples could be read by {name}. The first, {first.example}: {first.reason}"
        )
    if not plan.gallery(number).is_dir():
        progress(f"{name}: answers and patch views", 0, 0)
        ids = merge.shown(plan, number)
        by_id = {e.id: e for e in plan.data.examples if e.id in ids}
        say = f"{name}: answers and patch views"
        hands.gallery(number, [by_id[id] for id in ids], lambda done: progress(say, done, len(ids)))
    return took


def _study(
    plan: Plan, staged: Path, settings: dict, weights: dict, loaded: list[float], progress: Progress, started: float
) -> Study:
    """The study of the tables in `staged`, whose phases are fitted here, and of the pieces beside them."""
    tables = read_tables(staged)
    found, parts = {}, []
    for name in plan.names:
        progress(f"{name}: phases", 0, 0)
        found[name] = phases_of(tables["contextualization"], name, settings["seed"])
        table = pd.DataFrame() if (phases := found[name]) is None else phases.to_frame()
        table.insert(0, "model", name)
        parts.append(table)
    tables["phases"] = pd.concat(parts, ignore_index=True)
    tables["phases"].to_parquet(staged / "data" / "phases.parquet", index=False)
    about = {}
    for i, name in enumerate(plan.names):
        shards = [read_about(plan.at(i, number)) for number in range(len(plan))]
        of_gallery = read_about(plan.gallery(i))
        of_pairs = [read_about(plan.at(i, number)) for number in plan.pair_numbers]
        about[name] = {
            **{key: of_gallery[key] for key in ("class", "revision", "dtype", "device", "n_layers", "threads")},
            **{key: value for key, value in weights.get(name, {}).items() if key in ("sha256", "parameters") and value},
            "n_examples": sum(shard["read"] for shard in shards),
            "seconds": round(
                loaded[i] + of_gallery["seconds"] + sum(shard["seconds"] for shard in (*shards, *of_pairs)), 2
            ),
            # Batches that did not fit into memory and were halved: batches of another size change floats' last bits.
            "halved": [one for shard in (*shards, *of_pairs) for one in shard["halved"]],
            "left_out_of_gallery": of_gallery["left_out"],
            **({"pairs_set_aside": [one for shard in of_pairs for one in shard["aside"]]} if plan.pairs else {}),
        }
    shown, views = _gallery(plan)
    return Study(
        tables=tables,
        phases=found,
        skipped=merge.skipped(plan),
        settings=settings,
        models=about,
        dataset={"name": plan.data.name, "n": len(plan.data), "fingerprint": plan.data.fingerprint}
        | ({} if plan.data.n_usable is None else {"usable": plan.data.n_usable})
        | _paired(plan),
        gallery=shown,
        views=views,
        seconds=round(time.perf_counter() - started, 2),
    )


def _paired(plan: Plan) -> dict[str, int]:
    """How many pairs were drawn whole, and of how many only one side was; empty where examples are not sides of pairs."""
    drawn = {example.meta["pair"] for example in plan.data.examples if "pair" in example.meta}
    return {"pairs": len(plan.pairs), "half_pairs": len(drawn) - len(plan.pairs)} if drawn else {}


def _gallery(plan: Plan) -> tuple[list[tuple[Example, Image.Image]], dict[tuple[str, str], Shown]]:
    """The examples that were answered, each with a small picture, and their patch views by (model, example id)."""
    ids: list[str] = []
    views = {}
    for model in range(len(plan.names)):
        ids += read_table(plan.gallery(model), "answers")["example"].to_pylist()
        if plan.views:
            for row in read_table(plan.gallery(model), "views").to_pylist():
                views[row["model"], row["example"]] = Shown(
                    row["html"], picture(row["heat"]), row["token"], row["layer"]
                )
    by_id = {e.id: e for e in plan.data.examples if e.id in ids}
    return [(by_id[id], _thumbnail(by_id[id])) for id in dict.fromkeys(ids)], views


def _seconds(plan: Plan) -> float:
    """What the pieces that are there took: earlier runs' time."""
    pieces = list(plan.folder.iterdir()) if plan.folder.is_dir() else []
    return sum((read_about(piece)["seconds"] for piece in pieces), 0.0)


def _worded(data: Dataset) -> Dataset:
    """Without the examples whose captions hold no word to look for: their precision would be 0 whatever is decoded."""
    worded = [bool(caption_words(e.captions)) for e in data.examples]
    if all(worded):
        return data
    kept = tuple(e for e, there in zip(data.examples, worded, strict=True) if there)
    reason = "its captions hold no word that counts (two letters or more, no stop word)"
    aside = [SetAside(e.id, reason) for e, there in zip(data.examples, worded, strict=True) if not there]
    if not kept:
        raise InputError(
            f"None of the {len(aside)} examples of {data.name} can be used. The first, {aside[0].id}: {reason}"
        )
    return replace(data, examples=kept, set_aside=(*data.set_aside, *aside), fingerprint=fingerprint(kept))


def _thumbnail(example: Example) -> Image.Image:
    image = open_image(example.image)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
