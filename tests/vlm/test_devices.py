"""Where a model is put: the device that was named, "auto", and a word where a GPU stays idle."""

import warnings

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from mechvlm.cli import main
from mechvlm.study import run
from mechvlm.study.running.ray_workers import cluster_of
from mechvlm.study.running.settings import read_settings
from mechvlm.vlm import devices, loading
from mechvlm.vlm.devices import best_device, device_of, dtype_of


def machine(monkeypatch, *, cuda: bool = False, mps: bool = False):
    """A machine with these devices, as far as PyTorch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("there", "best"),
    [({"cuda": True, "mps": True}, "cuda"), ({"mps": True}, "mps"), ({"cuda": True}, "cuda"), ({}, "cpu")],
)
def test_auto_is_the_best_that_is_there(monkeypatch, there, best):
    machine(monkeypatch, **there)
    assert best_device() == best
    put = []
    monkeypatch.setattr(devices.torch, "zeros", lambda n, device: put.append(device))
    assert device_of("auto") == torch.device(best)
    assert put == [torch.device(best)]


def test_load_puts_the_model_where_auto_says(monkeypatch):
    machine(monkeypatch, mps=True)
    put = []
    monkeypatch.setattr(devices.torch, "zeros", lambda n, device: None)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, place: put.append(place))
    hf, processor = llava()
    mv.load(hf, processor, device="auto", check=False)
    assert put == [torch.device("mps")]


def test_a_gpu_that_stays_idle_is_told(monkeypatch):
    machine(monkeypatch, cuda=True)
    with pytest.warns(
        UserWarning, match=r"tiny-llava runs on the CPU, and this machine has a GPU.*device='auto'.*'cuda'"
    ):
        mv.load("tiny-llava", check=False)


def test_nothing_is_told_where_the_device_was_chosen_or_there_is_none(monkeypatch):
    hf, processor = llava()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        machine(monkeypatch, cuda=True)
        mv.load("tiny-llava", device="cpu", check=False)
        mv.load("tiny-llava", device_map={"": "cpu"}, check=False)
        mv.load(hf, processor, check=False)
        mv.load("tiny-llava", remote=True)
        machine(monkeypatch)
        mv.load("tiny-llava", check=False)
        assert "float32, cpu)" in repr(mv.load("tiny-llava", device="auto", check=False))


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:77", "meta", 3.5, torch.bfloat16, True])
def test_what_is_no_device_here(monkeypatch, device):
    machine(monkeypatch)
    with pytest.raises(mv.ModelError, match=r"cannot be put on the device .*Here there is \w+; device='auto'") as error:
        device_of(device)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_load_refuses_it_before_it_reads_the_weights(monkeypatch, device):
    monkeypatch.setattr(loading, "_load_weights", None)
    with pytest.raises(mv.ModelError, match=r"cannot be put on the device"):
        mv.load("tiny-llava", device=device)


@pytest.mark.parametrize("device_map", ["gpu", {"": "gpu"}, {"": 77}, "autoo"])
def test_a_device_map_of_what_is_not_here(device_map):
    with pytest.raises(mv.ModelError, match=r"tiny-llava cannot be put where device_map=.* says") as error:
        mv.load("tiny-llava", device_map=device_map)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("dtype", ["int8", "8bit", "fp16", "complex64", 16, torch.int8, "float8_e4m3fn", "no_grad"])
def test_what_is_no_dtype(dtype):
    with pytest.raises(mv.ModelError, match=r"There is no dtype .*\. Choose float32, bfloat16 or float16"):
        dtype_of(dtype, "float32")
    with pytest.raises(mv.ModelError, match=r"There is no dtype 'int8'"):
        mv.load("tiny-llava", dtype="int8")


def test_dtypes_by_name():
    assert dtype_of("bfloat16", "auto") == dtype_of("torch.bfloat16", "auto") == torch.bfloat16
    assert (dtype_of(None, "auto"), dtype_of(None, "float32")) == ("auto", torch.float32)


@pytest.mark.parametrize(
    ("option", "value"), [("--device", "mps"), ("--device", "gpu"), ("--dtype", "int8"), ("--dtype", "fp16")]
)
@pytest.mark.parametrize("command", ["view", "study"])
def test_the_commands_say_so_shortly(tmp_path, capsys, monkeypatch, command, option, value):
    if value == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one")
    image = tmp_path / "image.png"
    noise_image(0).save(image)
    out = str(tmp_path / "out.html")
    words = {
        "view": ["view", "tiny-llava", str(image), "--prompt", "a"],
        "study": ["study", "--model", "tiny-llava", "--n", "2"],
    }
    assert main([*words[command], "--out", out, option, value]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert value in error
    assert len(error) < 200


def test_the_commands_take_auto(tmp_path, monkeypatch, capsys):
    image = tmp_path / "image.png"
    noise_image(0).save(image)
    assert (
        main(["view", "tiny-llava", str(image), "--prompt", "a", "--device", "auto", "--out", str(tmp_path / "a.html")])
        == 0
    )


def test_a_study_records_the_device_that_auto_took(tmp_path, monkeypatch):
    def stop(stage, done, total):
        if stage.endswith("loading"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["tiny-llava"], n=2, device="auto", out=tmp_path / "study", progress=stop)
    settings = read_settings(tmp_path / "study")
    assert settings is not None
    assert settings["device"] == best_device()


def test_workers_elsewhere_need_a_device_by_name():
    with pytest.raises(mv.InputError, match=r"workers' machines may have other devices.*'cuda' or 'cpu'"):
        cluster_of(["tiny-llava"], "auto", 2, None, "auto", None)
