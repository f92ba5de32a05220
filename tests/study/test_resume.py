"""Studies that were stopped, or ran out of disk or memory, go on and come to the same tables."""

import errno
import json
import os
import resource
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import mechvlm as mv
from helpers.forwards import out_of_memory_above
from helpers.images import noise_image
from helpers.models import llava
from helpers.small_study import PROMPT, small, without_figures  # noqa: F401  (small is a fixture)
from mechvlm.datasets import Dataset, Example, fingerprint
from mechvlm.errors import InputError, StoppedError
from mechvlm.study import run, save
from mechvlm.study.running import atomic, settings, shards

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return mv.load(*llava(layers=2))


@pytest.fixture(scope="module")
def data() -> Dataset:
    examples = tuple(Example(f"e{i}", noise_image(i), (f"a picture number {i} of a dog",)) for i in range(7))
    return Dataset("made", examples, (), fingerprint(examples))


def study(vlm, data, out, **options):
    return run([vlm], data, **{"prompt": PROMPT, "batch_size": 2, "out": out, **options})


def tables(out) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "data").glob("*.parquet"))}


@pytest.fixture(scope="module")
def whole(vlm, data, tmp_path_factory):
    """A study that ran without interruption."""
    with pytest.MonkeyPatch.context() as patch, without_figures():
        patch.setattr(settings, "EXAMPLES_PER_SHARD", 2)
        return study(vlm, data, tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture
def shards_made(monkeypatch) -> list[tuple[int, int]]:
    """Lists each shard written in the test, as (model, number)."""
    numbers = []
    write = shards.write_shard

    def counted(plan, model, number, *rest):
        write(plan, model, number, *rest)
        numbers.append((model, number))

    monkeypatch.setattr(shards, "write_shard", counted)
    return numbers


class Stop(Exception):
    pass


def stopped_after(n: int):
    """A progress that ends the study once `n` examples are read."""

    def progress(stage, done, total):
        if "reading" in stage and done > n:
            raise Stop

    return progress


# --- going on ---


def test_what_is_done_is_not_done_again(vlm, data, whole, shards_made, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        study(vlm, data, out, progress=stopped_after(4))
    assert shards_made == [(0, 0), (0, 1)]
    assert {p.name for p in out.iterdir()} == {".lock", "settings.json", "shards"}
    reports = []
    again = study(vlm, data, out, progress=lambda *report: reports.append(report))
    assert shards_made == [(0, 0), (0, 1), (0, 2), (0, 3)]
    reading = [report[1:] for report in reports if "reading" in report[0]]
    assert reading == [(4, 7), (6, 7), (7, 7)], "the bar starts from what is done"
    assert tables(out) == tables(whole.out)
    assert again.models[vlm.name]["n_examples"] == 7


def test_a_finished_study_is_given_as_it_is(vlm, data, whole, shards_made):
    before = {p: p.stat().st_mtime_ns for p in whole.out.rglob("*")}
    again = study(vlm, data, whole.out)
    assert shards_made == []
    assert {p: p.stat().st_mtime_ns for p in whole.out.rglob("*") if p != whole.out} == {
        p: t for p, t in before.items() if p != whole.out
    }
    for name, table in whole.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)
    assert again.models == whole.models
    assert again.settings == whole.settings
    assert again.phases[vlm.name].explanation == whole.phases[vlm.name].explanation
    assert again.views.keys() == whole.views.keys()


def test_a_report_is_made_again_without_a_model_or_its_data(whole, tmp_path):
    folder = shutil.copytree(whole.out, tmp_path / "moved")
    (tmp_path / "again" / "data").mkdir(parents=True)
    save.save_study(mv.Study.open(folder), tmp_path / "again", lambda *_: None, time.perf_counter())
    for path in [*(tmp_path / "again" / "views").iterdir(), tmp_path / "again" / "skipped.csv"]:
        assert path.read_bytes() == (folder / path.relative_to(tmp_path / "again")).read_bytes()
    first, second = ((out / "report.html").read_text() for out in (folder, tmp_path / "again"))
    differing = [(a, b) for a, b in zip(first.splitlines(), second.splitlines(), strict=True) if a != b]
    assert all("</p>" in a and " s. 20" in a for a, _ in differing), "only the seconds that it took differ"


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"prompt": "what is a scene"}, "prompt was what is this, is what is a scene"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"batch_size": 1}, "batch_size was 2, is 1"),
    ],
)
def test_other_settings_are_refused_and_named(vlm, data, tmp_path, options, difference):
    with pytest.raises(Stop):
        study(vlm, data, tmp_path / "out", progress=stopped_after(2))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="made with other settings: ") as refused:
        study(vlm, data, tmp_path / "out", **options)
    assert difference in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_models_data_and_versions_are_refused(vlm, data, whole, monkeypatch):
    other = replace(data, examples=data.examples[1:], fingerprint=fingerprint(data.examples[1:]))
    with pytest.raises(InputError, match="dataset n was 7, is 6; dataset fingerprint was"):
        study(vlm, other, whole.out)
    study(vlm, replace(data, name="folder:moved"), whole.out)  # the same data in another place
    fresh = mv.load(*llava(layers=3))
    with pytest.raises(InputError, match="weights LlavaForConditionalGeneration parameters was"):
        study(fresh, data, whole.out)
    monkeypatch.setattr(fresh, "name", "another")
    with pytest.raises(InputError, match="models was LlavaForConditionalGeneration, is another") as refused:
        study(fresh, data, whole.out)
    assert "weights" not in str(refused.value)
    monkeypatch.setattr(settings, "_version", lambda package: "0.0")
    with pytest.raises(InputError, match=r"versions torch was .*, is 0.0"):
        study(vlm, data, whole.out)


def test_weights_are_known_by_their_files(tmp_path):
    import hashlib

    model, processor = llava(layers=2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    first = settings.weights_identity(str(tmp_path))
    assert first["sha256"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    (tmp_path / "preprocessor_config.json").write_text("{}")
    second = settings.weights_identity(str(tmp_path))
    assert {key for key in first if first[key] != second[key]} == {"files"}


def test_one_process_at_a_time(vlm, data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        study(vlm, data, out, progress=stopped_after(2))
    before = sorted(p.name for p in (out / "shards").iterdir())
    with atomic.locked(out), pytest.raises(InputError, match="Another process is at work"):
        study(vlm, data, out)
    assert sorted(p.name for p in (out / "shards").iterdir()) == before


def test_a_damaged_shard_is_named_and_made_anew(vlm, data, whole, shards_made, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        study(vlm, data, out, progress=stopped_after(4))
    lens = out / "shards" / "0-00001" / "lens.parquet"
    lens.write_bytes(lens.read_bytes()[:-20])
    shards_made.clear()
    with pytest.warns(UserWarning, match=r"0-00001.lens.parquet is damaged .* is made again"):
        study(vlm, data, out)
    assert shards_made == [(0, 1), (0, 2), (0, 3)]
    assert tables(out) == tables(whole.out)


# --- disks and memory that are full ---


def test_a_full_disk_stops_it_and_nothing_is_half_written(vlm, data, whole, tmp_path, shards_made):
    """The operating system refuses to write files larger than the limit."""
    for limit, n_made in [(2000, 0), (40_000, 4)]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(StoppedError, match=r"File too large.* What is done stays in .*out"):
                study(vlm, data, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert len(shards_made) == n_made
        assert not list(tmp_path.rglob("*.tmp")), "unfinished files are deleted, which also makes room"
        assert {p.name for p in (tmp_path / "out").iterdir()} == {".lock", "settings.json", "shards"}
    study(vlm, data, tmp_path / "out")
    assert tables(tmp_path / "out") == tables(whole.out)


@pytest.mark.parametrize("at", range(0, 60, 6))
def test_a_write_that_fails_anywhere_loses_nothing(vlm, data, whole, tmp_path, monkeypatch, at):
    sync, count = os.fsync, 0

    def fail(descriptor):
        nonlocal count
        count += 1
        if count == at + 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoppedError, match="No space left on device"):
        study(vlm, data, tmp_path / "out")
    monkeypatch.setattr(os, "fsync", sync)
    study(vlm, data, tmp_path / "out")
    assert tables(tmp_path / "out") == tables(whole.out)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_batch_without_room_is_halved_and_that_is_recorded(data, tmp_path, monkeypatch, error):
    vlm = mv.load(*llava(layers=2, width=16))
    monkeypatch.setattr(settings, "EXAMPLES_PER_SHARD", 4)
    free = study(vlm, data, None, batch_size=4)
    sizes = out_of_memory_above(vlm, monkeypatch, 1, error)
    halving = study(vlm, data, tmp_path / "out", batch_size=4)
    assert {4, 2, 1} <= set(sizes)
    for name in ("contextualization", "lens", "norm_attention", "baseline"):
        pd.testing.assert_frame_equal(halving.tables[name], free.tables[name], atol=1e-5)
    assert not len(halving.skipped)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["models"][vlm.name]["halved"] == [
        {"first": "e0", "examples": 4}, {"first": "e0", "examples": 2}, {"first": "e2", "examples": 2},
        {"first": "e4", "examples": 3}, {"first": "e5", "examples": 2},
    ]  # fmt: skip
    assert list(halving.tables["answers"]["example"]) == [f"e{i}" for i in range(6)]


def test_an_example_without_room_of_its_own_is_set_aside(vlm, data, monkeypatch, tmp_path):
    original_inputs = type(vlm).inputs
    big = np.asarray(data.examples[3].image)

    def inputs(self, images, prompts):
        if any(np.array_equal(np.asarray(image), big) for image in (images if isinstance(images, list) else [images])):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original_inputs(self, images, prompts)

    monkeypatch.setattr(type(vlm), "inputs", inputs)
    result = study(vlm, data, tmp_path / "out")
    (row,) = result.skipped.itertuples()
    assert (row.example, row.model) == ("e3", vlm.name)
    assert row.reason == "it does not fit into the memory of cpu, even alone (CUDA out of memory.)"
    assert result.models[vlm.name]["halved"] == [{"first": "e2", "examples": 2}]


def test_what_has_no_room_in_the_gallery_is_left_out_and_recorded(vlm, data, monkeypatch, tmp_path):
    from mechvlm.study.report import gallery

    read_view = gallery.read_view

    def limited(vlm, inputs):
        if inputs.images[0][0] == data.examples[2].image:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return read_view(vlm, inputs)

    monkeypatch.setattr(gallery, "read_view", limited)
    result = study(vlm, data, tmp_path / "out")
    assert [example.id for example, _ in result.gallery] == ["e0", "e1", "e3", "e4", "e5"]
    assert result.models[vlm.name]["left_out_of_gallery"] == [{"example": "e2", "reason": "CUDA out of memory."}]
    assert len(list((tmp_path / "out" / "views").glob("*.html"))) == 5


def test_other_errors_are_no_lack_of_memory(vlm, data, monkeypatch):
    def fail(self, images, prompts):
        raise RuntimeError("a bug")

    monkeypatch.setattr("mechvlm.study.running.workers.check_prompt", lambda vlm, prompt: None)
    monkeypatch.setattr(type(vlm), "inputs", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        study(vlm, data, None)
