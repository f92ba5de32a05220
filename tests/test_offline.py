"""Whatever is given by a local path looks up no host: the sockets of whole commands are counted."""

import os
import subprocess
import sys

import pytest

WORK = """
import sys

calls = []


def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto", "socket.sendmsg"):
        calls.append((event, str(arguments)[:100]))


sys.addaudithook(watch)

import json
import shutil
from pathlib import Path

import PIL.Image

import datasets
import mechvlm as mv
from mechvlm import bundled
from mechvlm.cli import main
from mechvlm.datasets import load_dataset
from mechvlm.datasets.scenes import scenes
from mechvlm.study import Study


def step(name, work):
    before = len(calls)
    result = work()
    print(name, calls[before:])
    return result


if __name__ == "__main__":
    home = Path(sys.argv[1])
    model = str(bundled.path("tiny-llava"))
    pictures = [scene.image for scene in scenes(4)]
    for place in ("images", "val2017", "imagefolder"):
        (home / place).mkdir()
    for number, picture in enumerate(pictures):
        for place in ("images", "val2017", "imagefolder"):
            picture.save(home / place / f"{number}.png")
    captions = [{"image": f"images/{n}.png", "caption": "a red ring"} for n in range(4)]
    (home / "captions.jsonl").write_text("\\n".join(map(json.dumps, captions)))
    listed = [{"file_name": f"{n}.png", "caption": "a red ring"} for n in range(4)]
    (home / "imagefolder" / "metadata.jsonl").write_text("\\n".join(map(json.dumps, listed)))
    coco = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(4)],
        "annotations": [{"id": n, "image_id": n, "caption": "a red ring"} for n in range(4)],
    }
    (home / "captions_val2017.json").write_text(json.dumps(coco))
    pair = {"id": 0, "image_0": "0", "image_1": "1", "caption_0": "a ring", "caption_1": "a disc"}
    (home / "examples.jsonl").write_text(json.dumps(pair))
    table = datasets.Dataset.from_dict({"image": pictures, "caption": ["a red ring"] * 4})
    table = table.cast_column("image", datasets.Image())
    table.to_parquet(str(home / "some.parquet"))
    table.save_to_disk(str(home / "disk"))
    for spec in (
        f"folder:{home}", f"coco:{home}/captions_val2017.json", f"winoground:{home}", f"hf:{home}/some.parquet",
        f"hf:{home}/disk", f"hf:{home}/imagefolder", "scenes",
    ):
        step(spec.partition(":")[0], lambda: load_dataset(spec))
    for missing in (f"hf:{home}/none.parquet", f"hf:{home}/none", "hf:./none"):
        try:
            step("missing", lambda: load_dataset(missing))
        except mv.InputError:
            pass
    for missing in (str(home / "none"), "none"):
        try:
            step("no model", lambda: mv.load(missing))
        except mv.ModelError:
            pass
    vlm = step("load", lambda: mv.load(model))
    inputs = vlm.inputs(str(home / "images" / "0.png"), "Describe the scene.")
    lens, norms = step("read", lambda: mv.read(vlm, inputs, mv.LogitLens(), mv.NormAttention()))
    step("save", lambda: mv.LogitLensResult.load(lens.save(home / "lens.safetensors") or home / "lens.safetensors"))
    answer = step("generate", lambda: vlm.generate(inputs))
    step("page", lambda: mv.view.patches(inputs, lens, norms).save(home / "page.html"))
    step("trace", lambda: mv.information_flow(vlm, inputs, "red", window=8))
    for arguments in (
        ["models"], ["check", model],
        ["view", model, str(home / "images" / "0.png"), "--prompt", "Describe it.", "--out", str(home / "view.html")],
        ["study", "--model", model, "--dataset", f"folder:{home}", "--out", str(home / "study")],
        ["study", "--model", model, "--dataset", f"folder:{home}", "--out", str(home / "study")],
    ):
        code = step(arguments[0], lambda: main(arguments))
        assert code == 0, arguments
    study = step("open", lambda: Study.open(home / "study"))
    shutil.copytree(home / "study", home / "again")
    step("compare", lambda: study.compare([home / "again"]))
    assert calls == [], calls
    print("no calls")
"""


@pytest.mark.long
def test_no_host_is_looked_up(tmp_path):
    """With no variable that would keep libraries offline, in a process of its own."""
    script, home = tmp_path / "work.py", tmp_path / "home"
    script.write_text(WORK)
    home.mkdir()
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {name: value for name, value in os.environ.items() if name not in offline}
    env |= {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.run([sys.executable, script, home], capture_output=True, text=True, timeout=1200, env=env)
    assert process.stdout.endswith("no calls\n"), process.stdout[-3000:] + process.stderr[-3000:]


BRIDGE = """
import sys

calls = []
events = ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto", "socket.sendmsg")
sys.addaudithook(lambda event, arguments: calls.append(event) if event in events else None)

import PIL.Image

import mechvlm as mv

vlm = mv.load("tiny-llava")
inputs = vlm.inputs(PIL.Image.new("RGB", (9, 9)), "a")
encoding = vlm.encoding(inputs)
vlm.bridge().run_with_cache(encoding.pop("input_ids"), **encoding)
print("transformer_lens" in sys.modules, sorted({"wandb", "opentelemetry", "sentry_sdk"} & set(sys.modules)), calls)
"""


@pytest.mark.long
def test_what_transformer_lens_installs_is_not_imported():
    """It requires wandb, which brings opentelemetry: the bridge runs without them, and alone."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", BRIDGE], capture_output=True, text=True, timeout=600, env=env)
    assert process.stdout.splitlines()[-1] == "True [] []", process.stderr[-2000:]
