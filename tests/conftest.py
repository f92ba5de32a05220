"""Models, inputs and images that several test files share."""

import beartype  # noqa: F401  (before nnsight, which puts `.save` on every object: beartype cannot be imported after)

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image

import mechvlm as mv
from models import instructblip, llava

torch.set_num_threads(1)

FAMILIES = {
    "llava": lambda: llava(),
    "llava-gqa-bias": lambda: llava(kv_heads=2, bias=True),
    "instructblip": lambda: instructblip(),
}


def noise_image(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """Pixels without any symmetry that could hide a swapped axis."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="session", params=list(FAMILIES))
def vlm(request) -> mv.VLM:
    """One model of each family, with random weights; grouped queries and biases among them."""
    return mv.load(*FAMILIES[request.param]())


@pytest.fixture(scope="session")
def llava_vlm() -> mv.VLM:
    return mv.load(*llava())


@pytest.fixture(scope="session")
def blip_vlm() -> mv.VLM:
    return mv.load(*instructblip())


@pytest.fixture(scope="session")
def one(vlm):
    """One example."""
    return vlm.inputs(noise_image(0), "what is this")


@pytest.fixture(scope="session")
def batch(vlm):
    """Three examples of different lengths: two of them padded."""
    return vlm.inputs([noise_image(i) for i in range(3)], ["what is this", "describe the scene . a what is this", "a"])


@pytest.fixture
def open_page(tmp_path):
    """Opens a view in chromium, offline; afterwards: no error was logged, no request made."""
    from playwright.sync_api import sync_playwright

    problems = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        context = browser.new_context(offline=True, viewport={"width": 920, "height": 900})

        def open_view(view):
            page = context.new_page()
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
            page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
            page.goto(f"file://{view.save(tmp_path / 'view.html')}")
            return page

        yield open_view
        browser.close()
    assert not problems
