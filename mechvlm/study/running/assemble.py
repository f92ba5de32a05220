"""From a study's shards, all of them made, to the `Study`."""

import time
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from mechvlm.datasets import Example
from mechvlm.inputs.images import open_image
from mechvlm.progress import Progress
from mechvlm.study.curves import controls_of, phases_of
from mechvlm.study.load import decode_png, examples_digest, read_tables
from mechvlm.study.record import GalleryView
from mechvlm.study.running import merge
from mechvlm.study.running.atomic import read_about, read_table
from mechvlm.study.running.plan import Plan
from mechvlm.study.study import Study

THUMBNAIL = 256
"""Longer side of the gallery's pictures, in pixels."""


def assemble_study(
    plan: Plan,
    staging: Path,
    settings: dict[str, Any],
    weights: dict[str, dict],
    load_seconds: list[float],
    progress: Progress,
    started: float,
) -> Study:
    """Merge the shards into tables, fit the phases, and gather what the report shows.

    Args:
        plan: of the study.
        staging: the folder whose `data/` the tables are written to.
        settings: as run.json records them.
        weights: by model name, what identifies its weights.
        load_seconds: what loading each model took, in the order of `plan.names`.
        progress: called with each stage.
        started: when the study began (`time.perf_counter`).
    """
    progress("tables", 0, 0)
    merge.write_tables(plan, staging / "data")
    tables = read_tables(staging)
    phases, frames = {}, []
    for name in plan.names:
        progress(f"{name}: phases", 0, 0)
        phases[name] = phases_of(tables["contextualization"], name, settings["seed"])
        frame = pd.DataFrame() if (fitted := phases[name]) is None else fitted.to_frame()
        frame.insert(0, "model", name)
        frames.append(frame)
    tables["phases"] = pd.concat(frames, ignore_index=True)
    tables["phases"].to_parquet(staging / "data" / "phases.parquet", index=False)
    models = {
        name: _model_record(plan, model, weights.get(name, {}), load_seconds[model])
        | {"examples": examples_digest(tables["contextualization"], name)}
        for model, name in enumerate(plan.names)
    }
    gallery, views = _gallery(plan)
    return Study(
        tables=tables,
        phases=phases,
        controls={name: controls_of(tables, name, phases[name]) for name in plan.names},
        skipped=merge.skipped(plan),
        settings=settings,
        models=models,
        dataset=_dataset_record(plan),
        gallery=gallery,
        views=views,
        seconds=round(time.perf_counter() - started, 2),
    )


def seconds_so_far(plan: Plan) -> float:
    """What earlier runs spent on the shards that are written."""
    numbers = (*range(len(plan)), *plan.pair_shards)
    folders = [plan.shard_folder(model, number) for model in range(len(plan.names)) for number in numbers]
    return sum((read_about(folder)["seconds"] for folder in folders if folder.is_dir()), 0.0)


def _model_record(plan: Plan, model: int, weights: dict[str, Any], load_seconds: float) -> dict[str, Any]:
    """What run.json records of a model."""
    gallery = read_about(plan.gallery_folder(model))
    shards = [read_about(plan.shard_folder(model, number)) for number in range(len(plan))]
    pair_shards = [read_about(plan.shard_folder(model, number)) for number in plan.pair_shards]
    both = [*shards, *pair_shards]
    return {
        **{key: gallery[key] for key in ("class", "revision", "dtype", "device", "n_layers", "threads")},
        **{key: value for key, value in weights.items() if key in ("sha256", "parameters") and value},
        "n_examples": sum(shard["read"] for shard in shards),
        "seconds": round(load_seconds + gallery["seconds"] + sum(shard["seconds"] for shard in both), 2),
        # Batches that were halved for lack of memory: another batch size changes floats' last bits.
        "halved": [batch for shard in both for batch in shard["halved"]],
        "left_out_of_gallery": gallery["left_out"],
        "controls": gallery["controls"],
        **({"pairs_set_aside": [pair for shard in pair_shards for pair in shard["aside"]]} if plan.pairs else {}),
    }


def _dataset_record(plan: Plan) -> dict[str, Any]:
    """What run.json records of the data.

    Where examples are sides of Winoground's pairs: also the number of pairs drawn whole, and of
    pairs with only one side drawn.
    """
    data = plan.data
    record: dict[str, Any] = {"name": data.name, "n": len(data), "fingerprint": data.fingerprint}
    if data.n_usable is not None:
        record["usable"] = data.n_usable
    if drawn := {example.meta["pair"] for example in data.examples if "pair" in example.meta}:
        record |= {"pairs": len(plan.pairs), "half_pairs": len(drawn) - len(plan.pairs)}
    return record


def _gallery(plan: Plan) -> tuple[list[tuple[Example, Image.Image]], dict[tuple[str, str], GalleryView]]:
    """The examples that were answered, each with a thumbnail; and their patch views.

    Patch views are by (model, example id).
    """
    ids: list[str] = []
    views = {}
    for model in range(len(plan.names)):
        folder = plan.gallery_folder(model)
        ids += read_table(folder, "answers")["example"].to_pylist()
        if plan.views:
            for row in read_table(folder, "views").to_pylist():
                heat = decode_png(row["heat"])
                views[row["model"], row["example"]] = GalleryView(row["html"], heat, row["token"], row["layer"])
    by_id = {e.id: e for e in plan.data.examples if e.id in ids}
    return [(by_id[id], _thumbnail(by_id[id])) for id in dict.fromkeys(ids)], views


def _thumbnail(example: Example) -> Image.Image:
    image = open_image(example.image)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
