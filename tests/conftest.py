"""Models, inputs and images that several test files share."""

import beartype  # noqa: F401  (before nnsight, which puts `.save` on every object: beartype cannot be imported after)

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

import mechvlm as mv
from helpers.browser import chromium, open_page  # noqa: F401
from helpers.images import noise_image
from helpers.models import DEEP, FAMILIES, instructblip, llava
from helpers.ndif import pair, sandboxed, server, traffic, user  # noqa: F401
from helpers.small_study import undrawn  # noqa: F401

torch.set_num_threads(1)
# The same examples at every run, and no limit on one example's time: machines are busy at times.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, max_examples=60, database=None)
hypothesis.settings.load_profile("same")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start


def pytest_collection_finish() -> None:
    """What is imported stays: it need not be searched for garbage again and again."""
    gc.freeze()


def pytest_xdist_auto_num_workers(config) -> int:
    """Two processes for the whole default suite, one for a few files or for a lane (`-m ray`)."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    return 2 if whole and config.option.markexpr.startswith("not ") else 0


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
def single(vlm):
    """One example."""
    return vlm.inputs(noise_image(0), "what is this")


@pytest.fixture(scope="session")
def batch(vlm):
    """Three examples of different lengths: two of them padded."""
    return vlm.inputs([noise_image(i) for i in range(3)], ["what is this", "describe the scene . a what is this", "a"])


@pytest.fixture(scope="session", params=list(DEEP))
def deep(request) -> mv.VLM:
    """Models of five layers, for windows of layers."""
    return mv.load(*DEEP[request.param]())


@pytest.fixture(scope="session")
def three(deep):
    """Examples of different lengths, so that two are padded."""
    return deep.inputs(
        [noise_image(i) for i in range(3)], ["what is this", "describe the scene . a what is this", "a this"]
    )
