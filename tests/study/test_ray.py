"""Studies on Ray clusters come to the same tables as one process, byte for byte.

Workers and nodes are killed meanwhile. A cluster here is several Ray nodes on this machine, each
with workers in processes of their own.
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
from helpers.small_study import without_figures
from mechvlm import cli
from mechvlm.datasets import Dataset, Example, fingerprint
from mechvlm.errors import InputError, ModelError, StoppedError
from mechvlm.study import run
from mechvlm.study.running import ray_workers, settings
from mechvlm.study.running.plan import Plan
from mechvlm.study.running.workers import LocalWorker

PROMPT = "what is this"
NODE = {"object_store_memory": 80_000_000, "include_dashboard": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model's folder, from which workers load it."""
    path = tmp_path_factory.mktemp("models") / "a-llava"
    model, processor = llava(layers=2)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def data() -> Dataset:
    examples = tuple(Example(f"e{i}", noise_image(i), (f"a picture number {i} of a dog",)) for i in range(31))
    return Dataset("made", examples, (), fingerprint(examples))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several shards of one batch each; no figures, which are slow and not tested here."""
    monkeypatch.setattr(settings, "EXAMPLES_PER_SHARD", 2)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with without_figures():
        yield


@pytest.fixture
def cluster():
    """A function that starts nodes with these numbers of CPUs; all are shut down in the end."""
    from ray.cluster_utils import Cluster

    clusters = []

    def start(*cpus: int) -> Cluster:
        clusters.append(Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], **NODE}))
        for n in cpus[1:]:
            clusters[0].add_node(num_cpus=n, **{k: v for k, v in NODE.items() if k != "include_dashboard"})
        return clusters[0]

    yield start
    for cluster in clusters:
        cluster.shutdown()


def study(folder, data, out, **options):
    return run([folder], data, **{"prompt": PROMPT, "batch_size": 2, "out": out, **options})


def tables(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "data").glob("*.parquet"))}


def workers_of(node) -> list[psutil.Process]:
    """The processes on a node that work for a study."""
    (raylet,) = (processes[0].process.pid for kind, processes in node.all_processes.items() if kind == "raylet")
    return [p for p in psutil.Process(raylet).children(recursive=True) if "ray::Worker" in " ".join(p.cmdline())]


@pytest.fixture
def losses(monkeypatch) -> list[str]:
    """Lists what each worker that ended was doing."""
    works = []
    replace = ray_workers.RayWorkers._replace

    def noted(self, worker, work, limit, error):
        works.append(work)
        replace(self, worker, work, limit, error)

    monkeypatch.setattr(ray_workers.RayWorkers, "_replace", noted)
    return works


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

    result = study(folder, data, tmp_path / "out", ray=nodes.address, workers=2, progress=progress)
    assert killed == ["worker", "node"]
    assert len([work for work in losses if work.startswith("reading shard")]) >= 2, losses
    assert tables(tmp_path / "out") == tables(whole.out)
    assert len(tables(tmp_path / "out")) >= 6
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in whole.out.iterdir()}
    assert result.views.keys() == whole.views.keys()
    assert result.models[folder]["n_examples"] == 31
    reading = [done for stage, done, _ in reports if stage.endswith("reading")]
    assert (reading[0], reading[-1], reading) == (0, 31, sorted(reading)), "the bar goes on, and never back"


@pytest.mark.ray
def test_a_shard_that_ends_its_workers_is_named_and_the_rest_is_kept(cluster, folder, data, monkeypatch, tmp_path):
    import ray

    submit = ray_workers.RayWorkers._submit

    def deadly(self, worker, method, *arguments):
        submit(self, worker, method, *arguments)
        if method == "make_shard" and arguments[1] == 5:
            ray.kill(worker)

    with monkeypatch.context() as patch:
        patch.setattr(ray_workers.RayWorkers, "_submit", deadly)
        message = r"3 workers ended while reading shard 5 of .*a-llava \(examples e10 to e11\).*goes on from there"
        with pytest.raises(StoppedError, match=message):
            study(folder, data, tmp_path / "out", ray=cluster(2).address, workers=2)
    assert not ray.is_initialized()
    written = {p.name for p in (tmp_path / "out" / "shards").iterdir()}
    assert {f"0-{i:05}" for i in range(5)} <= written
    assert "0-00005" not in written
    study(folder, data, tmp_path / "out")  # and goes on without Ray
    study(folder, data, tmp_path / "whole")
    assert tables(tmp_path / "out") == tables(tmp_path / "whole")


@pytest.mark.ray
def test_errors_of_workers_are_those_of_one_process(cluster, folder, data, tmp_path):
    nodes = cluster(1)
    for options, kind in (({"dtype": "float33"}, ModelError), ({"prompt": "word " * 3000}, InputError)):
        with pytest.raises(kind) as local_error:
            study(folder, data, tmp_path / "out", **options)
        with pytest.raises(kind) as worker_error:
            study(folder, data, tmp_path / "out", ray=nodes.address, workers=1, **options)
        assert str(worker_error.value) == str(local_error.value)
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
    """`--ray auto` starts a cluster that ends with the command and prints nothing of its own."""
    out = tmp_path / "out"
    plain = [sys.executable, "-m", "mechvlm.cli", "study", "--model", folder, "--n", "160", "--prompt", PROMPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    ends = [(signal.SIGTERM, 143), (signal.SIGKILL, -9), (None, 0)]
    for sign, code in ends:
        done = len(list(out.glob("shards/0-*")))
        # Into files, since a process that Ray leaves behind for a minute would keep a pipe open.
        with (tmp_path / "stdout").open("w") as stdout, (tmp_path / "stderr").open("w") as stderr:
            typed = [*plain, "--out", str(out), "--ray", "auto", "--workers", "2"]
            command = subprocess.Popen(typed, env=environment, stdout=stdout, stderr=stderr)
        if sign is not None:
            # Wait for one shard more than the previous command left.
            while len(list(out.glob("shards/0-*"))) <= done:
                assert command.poll() is None, (tmp_path / "stderr").read_text()
                time.sleep(0.02)
            children = psutil.Process(command.pid).children(recursive=True)
            assert any("raylet" in " ".join(p.cmdline()) for p in children)
            if not done:  # the end of a worker must not be printed
                next(p for p in children if "ray::Worker" in " ".join(p.cmdline())).kill()
                time.sleep(1)
            command.send_signal(sign)
        command.wait(timeout=100)
        printed, err = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
        assert command.returncode == code, err
        assert not (out / "run.json").exists() or sign is None
        if sign is not None:
            _, left = psutil.wait_procs(children, timeout=10)
            # Two of Ray's agents, which do nothing, live a minute longer than a killed command.
            assert sign == signal.SIGKILL or not left
            assert not [p for p in left if "Agent" not in p.name()], "they end with the command"
            for agent in left:
                agent.kill()
        if code > 0:
            assert f"What is done stays in {out}. Go on with:" in err
            assert "--ray auto --workers 2" in err
        for spam in ("ray::", "pid=", "raylet", "Traceback", "WARNING", "INFO"):
            assert spam not in err + printed
    subprocess.run([*plain, "--out", str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    assert tables(out) == tables(tmp_path / "whole")


# --- without a cluster ---


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_what_cannot_be_asked_is_said_before_anything_is_read(folder, data, tmp_path, options, message):
    if "ray" in options:
        pytest.importorskip("ray")
    with pytest.raises(InputError, match=message):
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
    assert "error: " in (err := capsys.readouterr().err)
    assert all(option in err.splitlines()[-1] for option in typed if option.startswith("--"))


def test_gpus_of_a_worker():
    pytest.importorskip("ray")

    def gpus(given=None, device=None, device_map=None):
        return ray_workers.cluster_of(["a"], "auto", 1, given, device, device_map).gpus

    assert [gpus(), gpus(device="cpu"), gpus(device="cuda"), gpus(device_map="auto")] == [0, 0, 1, 1]
    assert [gpus(0.5, "cuda"), gpus(2.0, None, "auto")] == [0.5, 2]


def test_a_node_that_lacks_a_file_or_a_version_is_named(folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = Plan(tmp_path, (folder,), data, PROMPT, 2, 2, views=False)
    before, worker = torch.get_num_threads(), ray_workers.Worker(LocalWorker(plan, [folder], {}, {}))
    versions = {package: settings._version(package) for package in settings.RESULT_PACKAGES}
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


@pytest.mark.long
def test_a_device_map_gives_the_same_tables_and_is_a_setting(folder, data, tmp_path):
    study(folder, data, tmp_path / "mapped", device_map={"": "cpu"})
    study(folder, data, tmp_path / "whole")
    assert tables(tmp_path / "mapped") == tables(tmp_path / "whole")
    with pytest.raises(InputError, match="device was cpu, is device_map auto"):
        study(folder, data, tmp_path / "whole", device_map="auto")


def test_the_command_hands_its_device_map_to_the_model(folder, monkeypatch, tmp_path):
    device_maps = []
    load = mv.load
    monkeypatch.setattr(
        "mechvlm.study.running.workers.load", lambda *a, **k: device_maps.append(k["device_map"]) or load(*a, **k)
    )
    typed = ["study", "--model", folder, "--n", "2", "--prompt", PROMPT, "--out", str(tmp_path / "out")]
    assert cli.main([*typed, "--device-map", "auto"]) == 0
    assert device_maps == ["auto"]


def test_reading_through_accelerates_hooks():
    """Accelerate's hooks, which move tensors between devices, change nothing on one device."""
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
    results = mv.read(mv.load(hooked, processor), inputs, *probes)
    assert torch.equal(results[0].ids, expected[0].ids)
    assert torch.equal(results[0].probs, expected[0].probs)
    assert torch.equal(results[1].inter, expected[1].inter)
    assert torch.equal(results[2].norm, expected[2].norm)
