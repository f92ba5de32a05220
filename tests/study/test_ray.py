"""Studies on Ray clusters come to the tables of a single process, byte for byte, whoever is killed meanwhile.

A cluster here is several nodes of Ray on this machine, each with workers in processes of their own.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import dispatch_model

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from mechvlm import cli
from mechvlm.datasets import Dataset, Example, fingerprint
from mechvlm.errors import InputError, ModelError, StoppedError
from mechvlm.study import run
from mechvlm.study.report import figures
from mechvlm.study.report.captioned import CaptionedFigure
from mechvlm.study.running import ray_workers
from mechvlm.study.running import settings as asked
from mechvlm.study.running.shards import Plan
from mechvlm.study.running.workers import Here

PROMPT = "what is this"
NODE = {"object_store_memory": 80_000_000, "include_dashboard": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model as workers can load it."""
    made = tmp_path_factory.mktemp("models") / "a-llava"
    model, processor = llava(layers=2)
    model.save_pretrained(made)
    processor.save_pretrained(made)
    return str(made)


@pytest.fixture(scope="module")
def data() -> Dataset:
    examples = tuple(Example(f"e{i}", noise_image(i), (f"a picture number {i} of a dog",)) for i in range(31))
    return Dataset("made", examples, (), fingerprint(examples))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shards of one batch, so that there are several of them; figures take the time here that nothing is tested in."""
    monkeypatch.setattr(asked, "SHARD", 2)
    monkeypatch.setattr(figures, "draw_all", lambda _: {name: CaptionedFigure(None, "") for name in figures.FIGURES})
    monkeypatch.setattr(figures, "save_all", _small_figures)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


def _small_figures(drawn, folder) -> None:
    folder.mkdir()
    for name in drawn:
        (folder / f"{name}.svg").write_text("a figure")


@pytest.fixture
def cluster():
    """Starts nodes with so many CPUs each; all of them are shut down in the end, whatever happened."""
    from ray.cluster_utils import Cluster

    started = []

    def start(*cpus: int) -> Cluster:
        started.append(Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], **NODE}))
        for n in cpus[1:]:
            started[0].add_node(num_cpus=n, **{k: v for k, v in NODE.items() if k != "include_dashboard"})
        return started[0]

    yield start
    for one in started:
        one.shutdown()


def study(folder, data, out, **options):
    return run([folder], data, **{"prompt": PROMPT, "batch_size": 2, "out": out, **options})


def tables(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "data").glob("*.parquet"))}


def workers_of(node) -> list[psutil.Process]:
    """The processes of a node that work for a study."""
    (raylet,) = (processes[0].process.pid for kind, processes in node.all_processes.items() if kind == "raylet")
    return [p for p in psutil.Process(raylet).children(recursive=True) if "ray::Worker" in " ".join(p.cmdline())]


@pytest.fixture
def losses(monkeypatch) -> list[str]:
    """What the workers that ended were doing."""
    seen = []
    replace = ray_workers.RayWorkers._replace

    def noted(self, worker, work, limit, error):
        seen.append(work)
        replace(self, worker, work, limit, error)

    monkeypatch.setattr(ray_workers.RayWorkers, "_replace", noted)
    return seen


# --- on clusters ---


@pytest.mark.ray
def test_a_worker_and_a_node_are_killed_and_the_tables_are_those_of_one_process(
    cluster, folder, data, losses, tmp_path
):
    whole = study(folder, data, tmp_path / "whole")
    nodes = cluster(1, 1)
    second = next(iter(nodes.worker_nodes))
    killed = []
    reports = []

    def progress(stage, done, total):
        reports.append((stage, done, total))
        if "reading" not in stage:
            return
        if done >= 6 and not killed:
            (worker,) = workers_of(nodes.head_node)
            worker.kill()
            killed.append("worker")
        if done >= 14 and len(killed) == 1 and workers_of(second):
            nodes.remove_node(second, allow_graceful=False)
            killed.append("node")

    found = study(folder, data, tmp_path / "out", ray=nodes.address, workers=2, progress=progress)
    assert killed == ["worker", "node"]
    assert len([work for work in losses if work.startswith("reading shard")]) >= 2, losses
    assert tables(tmp_path / "out") == tables(whole.out)
    assert len(tables(tmp_path / "out")) >= 6
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in whole.out.iterdir()}
    assert found.views.keys() == whole.views.keys()
    assert found.models[folder]["n_examples"] == 31
    reading = [done for stage, done, _ in reports if stage.endswith("reading")]
    assert (reading[0], reading[-1], reading) == (0, 31, sorted(reading)), "the bar goes on, and never back"


@pytest.mark.ray
def test_a_shard_that_ends_its_workers_is_named_and_the_rest_is_kept(cluster, folder, data, monkeypatch, tmp_path):
    import ray

    give = ray_workers.RayWorkers._give

    def deadly(self, worker, method, *arguments):
        give(self, worker, method, *arguments)
        if method == "shard" and arguments[1] == 5:
            ray.kill(worker)

    with monkeypatch.context() as patch:
        patch.setattr(ray_workers.RayWorkers, "_give", deadly)
        said = r"3 workers ended while reading shard 5 of .*a-llava \(examples e10 to e11\).*goes on from there"
        with pytest.raises(StoppedError, match=said):
            study(folder, data, tmp_path / "out", ray=cluster(2).address, workers=2)
    assert not ray.is_initialized()
    there = {p.name for p in (tmp_path / "out" / "shards").iterdir()}
    assert {f"0-{i:05}" for i in range(5)} <= there
    assert "0-00005" not in there
    study(folder, data, tmp_path / "out")  # and goes on without Ray
    study(folder, data, tmp_path / "whole")
    assert tables(tmp_path / "out") == tables(tmp_path / "whole")


@pytest.mark.ray
def test_errors_of_workers_are_those_of_one_process(cluster, folder, data, tmp_path):
    nodes = cluster(1)
    for options, kind in (({"dtype": "float33"}, ModelError), ({"prompt": "word " * 3000}, InputError)):
        with pytest.raises(kind) as here:
            study(folder, data, tmp_path / "out", **options)
        with pytest.raises(kind) as there:
            study(folder, data, tmp_path / "out", ray=nodes.address, workers=1, **options)
        assert str(there.value) == str(here.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"2 workers with one CPU and 0 GPUs each .* has 1 CPUs and 0 GPUs"):
        study(folder, data, None, ray=nodes.address, workers=2)
    with pytest.raises(InputError, match="1 workers with one CPU and 1 GPUs each"):
        study(folder, data, None, ray=nodes.address, workers=1, device="cuda")


@pytest.mark.ray
def test_a_cluster_without_a_node_left_is_no_endless_wait(cluster, folder, data, monkeypatch, tmp_path):
    nodes = cluster(0, 1)

    def progress(stage, done, total):
        if done >= 4 and nodes.worker_nodes:
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
            monkeypatch.setattr(ray_workers, "WAIT", 2.0)

    with pytest.raises(StoppedError, match="no room for a worker for 2 seconds"):
        study(folder, data, tmp_path / "out", ray=nodes.address, workers=1, progress=progress)
    assert (tmp_path / "out" / "shards" / "0-00001").is_dir()


@pytest.mark.ray
def test_a_command_that_is_stopped_or_killed_goes_on(folder, tmp_path):
    """`--ray auto` starts a cluster, which ends with the command however that does; and says nothing of its own."""
    out = tmp_path / "out"
    plain = [sys.executable, "-m", "mechvlm.cli", "study", "--model", folder, "--n", "160", "--prompt", PROMPT]
    there = {**os.environ, "OMP_NUM_THREADS": "1"}
    there.pop("RAY_ADDRESS", None)
    ends = [(signal.SIGTERM, 143), (signal.SIGKILL, -9), (None, 0)]
    for sign, code in ends:
        done = len(list(out.glob("shards/0-*")))
        # To files: what Ray leaves behind for a minute would keep a pipe open.
        with (tmp_path / "printed").open("w") as printed, (tmp_path / "said").open("w") as said:
            typed = [*plain, "--out", str(out), "--ray", "auto", "--workers", "2"]
            command = subprocess.Popen(typed, env=there, stdout=printed, stderr=said)
        if sign is not None:
            # One more than before: several may have been done when the last one ended.
            while len(list(out.glob("shards/0-*"))) <= done:
                assert command.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.02)
            children = psutil.Process(command.pid).children(recursive=True)
            assert any("raylet" in " ".join(p.cmdline()) for p in children)
            if not done:  # a worker's end is no news
                next(p for p in children if "ray::Worker" in " ".join(p.cmdline())).kill()
                time.sleep(1)
            command.send_signal(sign)
        command.wait(timeout=100)
        printed, said = ((tmp_path / name).read_text() for name in ("printed", "said"))
        assert command.returncode == code, said
        assert not (out / "run.json").exists() or sign is None
        if sign is not None:
            _, left = psutil.wait_procs(children, timeout=10)
            # Two of Ray's agents, which do nothing, outlive a command that was killed by a minute.
            assert sign == signal.SIGKILL or not left
            assert not [p for p in left if "Agent" not in p.name()], "they end with the command"
            for agent in left:
                agent.kill()
        if code > 0:
            assert f"What is done stays in {out}. Go on with:" in said
            assert "--ray auto --workers 2" in said
        for spam in ("ray::", "pid=", "raylet", "Traceback", "WARNING", "INFO"):
            assert spam not in said + printed
    subprocess.run([*plain, "--out", str(tmp_path / "whole")], env=there, check=True, capture_output=True)
    assert tables(out) == tables(tmp_path / "whole")


# --- without a cluster ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 2}, "give ray='auto' or its address"),
        ({"gpus_per_worker": 1.0}, "give ray='auto' or its address"),
        ({"ray": "auto"}, "None workers were asked for"),
        ({"ray": "auto", "workers": 0}, "0 workers were asked for"),
        ({"ray": "auto", "workers": 1, "gpus_per_worker": -1.0}, "give 0 or more"),
        ({"ray": "auto", "workers": 1, "device": "cuda:1"}, "give the device 'cuda', not 'cuda:1'"),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_read(folder, data, tmp_path, options, said):
    if "ray" in options:
        pytest.importorskip("ray")
    with pytest.raises(InputError, match=said):
        study(folder, data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_workers_load_their_model_themselves(llava_vlm, data):
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="give its name or folder, not the loaded"):
        run([llava_vlm], data, ray="auto", workers=1)


def test_without_ray_it_is_said_how_to_get_it(folder, monkeypatch, capsys):
    monkeypatch.setattr(ray_workers, "find_spec", lambda name: None)
    assert cli.main(["study", "--model", folder, "--ray", "auto", "--workers", "2", "--out", "nowhere"]) == 1
    assert "pip install 'mechvlm[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed",
    [["--workers", "2"], ["--gpus-per-worker", "1"], ["--ray", "auto"], ["--device", "cpu", "--device-map", "auto"]],
)
def test_usage(typed, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", *typed])
    assert stop.value.code == 2
    assert "error: " in (said := capsys.readouterr().err)
    assert all(option in said.splitlines()[-1] for option in typed if option.startswith("--"))


def test_gpus_of_a_worker():
    pytest.importorskip("ray")

    def gpus(given=None, device=None, device_map=None):
        return ray_workers.cluster_of(["a"], "auto", 1, given, device, device_map).gpus

    assert [gpus(), gpus(device="cpu"), gpus(device="cuda"), gpus(device_map="auto")] == [0, 0, 1, 1]
    assert [gpus(0.5, "cuda"), gpus(2.0, None, "auto")] == [0.5, 2]


def test_a_node_that_lacks_a_file_or_a_version_is_named(folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = Plan(tmp_path, (folder,), data, PROMPT, 2, 2, views=False)
    before, worker = torch.get_num_threads(), ray_workers.Worker(Here(plan, [folder], {}, {}))
    versions = {package: asked._version(package) for package in asked.RESULT_PACKAGES}
    (tmp_path / "home" / "images").mkdir(parents=True)
    worker.check(str(tmp_path / "home"), [Path("images")], versions, before, 1)
    assert Path.cwd() == tmp_path / "home", "relative names mean the same"
    with pytest.raises(InputError, match=r"does not find gone\.png\. Models and images must be in folders that every"):
        worker.check(str(tmp_path), [Path("gone.png")], versions, before, 1)
    with pytest.raises(InputError, match=r"has torch .*, not 0\.0"):
        worker.check(str(tmp_path), [], {**versions, "torch": "0.0"}, before, 1)
    worker.check(str(tmp_path), [], versions, 8, 1000)
    assert torch.get_num_threads() == 1, "many workers on one node share its cores"
    torch.set_num_threads(before)


# --- device maps ---


def test_a_device_map_gives_the_same_tables_and_is_a_setting(folder, data, tmp_path):
    study(folder, data, tmp_path / "mapped", device_map={"": "cpu"})
    study(folder, data, tmp_path / "whole")
    assert tables(tmp_path / "mapped") == tables(tmp_path / "whole")
    with pytest.raises(InputError, match="device was cpu, is device_map auto"):
        study(folder, data, tmp_path / "whole", device_map="auto")


def test_the_command_hands_its_device_map_to_the_model(folder, monkeypatch, tmp_path):
    seen = []
    load = mv.load
    monkeypatch.setattr(
        "mechvlm.study.running.workers.load", lambda *a, **k: seen.append(k["device_map"]) or load(*a, **k)
    )
    typed = ["study", "--model", folder, "--n", "2", "--prompt", PROMPT, "--out", str(tmp_path / "out")]
    assert cli.main([*typed, "--device-map", "auto"]) == 0
    assert seen == ["auto"]


def test_reading_through_accelerates_hooks():
    """What moves tensors between devices wraps every forward; on one device it must change nothing."""
    model, processor = llava(layers=2)
    plain = mv.load(model, processor)
    probes = mv.LogitLens(), mv.Contextualization(), mv.NormAttention(dst="last")
    inputs = plain.inputs(noise_image(0), PROMPT)
    expected = mv.read(plain, inputs, *probes)
    model, processor = llava(layers=2)
    layers = {f"model.language_model.layers.{i}": "cpu" for i in range(2)}
    others = ("model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens")
    others = (*others, "model.language_model.norm", "model.language_model.rotary_emb", "lm_head")
    hooked = dispatch_model(model, {**layers, **dict.fromkeys(others, "cpu")}, main_device="cpu", force_hooks=True)
    assert hasattr(hooked.lm_head, "_hf_hook")
    found = mv.read(mv.load(hooked, processor), inputs, *probes)
    assert torch.equal(found[0].tokens, expected[0].tokens)
    assert torch.equal(found[0].probs, expected[0].probs)
    assert torch.equal(found[1].inter, expected[1].inter)
    assert torch.equal(found[2].norm, expected[2].norm)
