"""Files of earlier versions still open: results, finished and unfinished studies, jobs on NDIF.

tests/data/first_house holds files that the first released layout of the package wrote, with the
bundled models.
"""

import json
import math
import shutil
from dataclasses import is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from nnsight.schema.response import Status
from safetensors import safe_open
from safetensors.torch import load_file

import mechvlm as mv
from mechvlm.datasets import Pair
from mechvlm.datasets.naming import naming
from mechvlm.datasets.scenes import scenes
from mechvlm.measures.phases import Phases
from mechvlm.ndif.connection import Connection
from mechvlm.outside.pieces import as_text
from mechvlm.study import run
from mechvlm.study.running.settings import RESULT_PACKAGES, read_settings

SAVED = Path(__file__).parent / "data" / "first_house"
PROBES = (
    mv.LogitLens(k=2, positions="text"), mv.Contextualization(), mv.NormAttention(dst="last"), mv.Likelihood((2, 2)),
    mv.LogitAttribution("red", "blue"),
)  # fmt: skip


ADDED = ("from_end", "cells", "modality", "divisor")
"""Fields that earlier versions did not save: None in a result of theirs."""


@pytest.fixture(scope="module")
def questions():
    return naming(2)


@pytest.fixture(scope="module")
def vlm():
    return mv.load("tiny-llava")


@pytest.fixture(scope="module")
def inputs(vlm, questions):
    return vlm.inputs([q.image for q in questions], [q.prompt for q in questions])


def assert_same(old, new) -> None:
    """Compare two results field by field."""
    assert type(old) is type(new)
    for name, value in vars(new).items():
        old_value = getattr(old, name)
        if name in ADDED and old_value is None:
            continue
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(old_value, value, rtol=1e-4, atol=1e-5, equal_nan=True)
        elif isinstance(value, float):
            assert old_value == pytest.approx(value, nan_ok=True), name
        else:  # nested numbers are rounded otherwise on another processor
            for a, b in zip(numbers_of(old_value), numbers_of(value), strict=True):
                assert a == (pytest.approx(b, rel=1e-4, abs=1e-6, nan_ok=True) if isinstance(b, float) else b), name


def numbers_of(value) -> list:
    """All that a nested value holds, in order."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return [x for key, part in value.items() for x in (key, *numbers_of(part))]
    return [x for part in value for x in numbers_of(part)] if isinstance(value, list | tuple) else [value]


def saved(cls, name: str):
    return cls.load(SAVED / "results" / f"{name}.safetensors")


def test_results_of_probes(vlm, inputs):
    kinds = {"lens": mv.LogitLensResult, "context": mv.ContextualizationResult, "norms": mv.NormAttentionResult,
             "likelihood": mv.LikelihoodResult, "attribution": mv.LogitAttributionResult}  # fmt: skip
    for (name, kind), new in zip(kinds.items(), mv.read(vlm, inputs, *PROBES), strict=True):
        if name == "lens":  # its files did not hold it
            new = replace(new, n_positions=None)
        if name == "norms":  # nor theirs the tokens and their places
            new = replace(new, ids=None, vocabulary=(), cells=None)
        assert_same(saved(kind, name), new)


def test_results_of_experiments(vlm, inputs, questions):
    answers, boxes = [q.answer for q in questions], [q.box for q in questions]
    assert_same(saved(mv.InformationFlowResult, "flow"), mv.information_flow(vlm, inputs, answers, window=3))
    assert_same(saved(mv.CausalTraceResult, "trace"), mv.causal_trace(vlm, inputs, answers, corrupt="blank"))
    ablated = mv.object_ablation(vlm, inputs, boxes, answers, margins=(0, 1), draws=2)
    assert_same(saved(mv.ObjectAblationResult, "ablation"), ablated)
    assert_same(saved(mv.MultimodalNeuronsResult, "neurons"), mv.multimodal_neurons(vlm, inputs, answers, k=3))
    first, second = list(scenes(2))
    pair = Pair("0", (first.image, second.image), (first.captions[0], second.captions[0]))
    assert_same(saved(mv.WinogroundResult, "winoground"), mv.winoground(vlm, [pair]))


def test_results_of_queries_and_phases(vlm, questions):
    blip = mv.load("tiny-instructblip")
    inputs = blip.inputs([q.image for q in questions], [q.prompt for q in questions])
    assert_same(saved(mv.QueryReadingResult, "reading"), mv.query_reading(blip, inputs))
    many = vlm.inputs([e.image for e in scenes(6)], "Describe the scene.")
    phases = mv.fit_phases(mv.contextualization(vlm, many), min_turn=0, n_bootstrap=50)
    evidence = [e._replace(smallest_turn=math.nan, of_any_size=False) for e in phases.evidence]
    assert_same(saved(Phases, "phases"), replace(phases, evidence=evidence))


def test_a_job_that_was_left_on_ndif(vlm, inputs, monkeypatch):
    """The same call as before fetches the job's results: they are for the same request."""
    tensors = load_file(SAVED / "job.safetensors")
    with safe_open(SAVED / "job.safetensors", framework="pt") as file:
        request, layout = (json.loads(file.metadata()[key]) for key in ("asked", "rows"))
    rows = [
        [None if keys is None else {key: tensors[f"{p}.{i}.{key}"] for key in keys} for i, keys in enumerate(kept)]
        for p, kept in enumerate(layout)
    ]
    finite = [tensors[f"finite.{i}"] for i in range(vlm.n_layers + 1)]
    new = mv.read(vlm, inputs, *PROBES)
    done = Done({"asked": request, "rows": rows, "finite": finite})
    monkeypatch.setattr("mechvlm.tracing.reading.backend_for", lambda *_, **__: done)
    job = mv.read(vlm, inputs, *PROBES, blocking=False, job_id="old")
    for result, expected in zip(job.result(), new, strict=True):
        assert_same(result, expected)
    with pytest.raises(mv.InputError, match="asked something else"):
        mv.read(vlm, inputs, mv.LogitLens(k=3), blocking=False, job_id="old").result()


class Done(Connection):
    """A connection to a finished job, which returns what an earlier version saved."""

    def __init__(self, saved: dict):
        super().__init__("model:{}", blocking=False, job_id="old")
        self.saved = saved

    def last_response(self):
        return SimpleNamespace(status=Status.COMPLETED)

    def poll(self, tracer=None):
        return self.saved


def test_a_finished_study():
    study = mv.Study.open(SAVED / "study")
    assert study.models["tiny-llava"]["n_examples"] == 6
    assert study.phases["tiny-llava"].mean.shape == (9,)
    assert set(study.frame()["measure"]) >= {"cosine_inter", "precision", "norm_share_last_text"}
    assert study.curves("precision")["mean"].between(0, 1).all()
    assert len(study.gallery) == len(study.views) == 6
    study.plot("phases")
    mv.compare([SAVED / "study"]).plot()


def test_an_unfinished_study_is_refused_and_kept(tmp_path):
    """Its parts number layers otherwise: half of each would be a table of two numberings."""
    folder = tmp_path / "study"
    shutil.copytree(SAVED / "unfinished", folder)
    settings = read_settings(folder)
    # As if it had been begun with the packages that are installed now.
    settings["versions"] = {package: version(package) for package in RESULT_PACKAGES}
    (folder / "settings.json").write_text(json.dumps(settings))
    files = sorted(folder.rglob("*"))
    with pytest.raises(mv.InputError, match=r"another version of mechvlm began .*Finish it with that version"):
        run(["tiny-llava"], "scenes", n=6, seed=5, batch_size=2, out=folder)
    assert sorted(folder.rglob("*")) == files


@pytest.mark.long
def test_tables_of_a_finished_study_are_those_of_today(tmp_path):
    """Opened, its states are called so and its layers count from 0."""
    study = run(["tiny-llava"], "scenes", n=6, seed=5, batch_size=2, out=tmp_path / "study")
    for name, table in mv.Study.open(SAVED / "study").tables.items():
        new = study.tables[name]
        if name == "lens":  # the share of words was not kept then
            new = new[new["measure"] != "word_share"].reset_index(drop=True)
            new["measure"] = new["measure"].cat.remove_unused_categories()
        pd.testing.assert_frame_equal(new, table, check_dtype=False, obj=name)
    layers = study.tables["attention_share"]["layer"]
    assert (layers.min(), layers.max()) == (0, 7)


def test_a_lens_of_an_earlier_version_reads_as_text():
    old = saved(mv.LogitLensResult, "lens")
    assert old.states == tuple(range(9))
    assert not any("▁" in text or text.startswith("<0x") for _, text in old.vocabulary)
    assert len(old.words(state=8, position=int(old.position[0]), example=0)) == 2


def test_pieces_of_files_without_a_tokenizer():
    """SentencePiece's and byte-level pieces; numbers beside them stay."""
    assert as_text(((5, "▁red"), (6, "<0x0A>"), (7, "<0xE2>"), (8, "ffe"))) == (
        (5, " red"), (6, "\n"), (7, "\ufffd"), (8, "ffe"),
    )  # fmt: skip
    assert as_text(("Ġred", "ĠcafÃ©", "Ċ", "âĢ")) == (" red", " café", "\n", "\ufffd")
