"""What a notebook shows of every public object: one short line with its name, and true."""

import inspect

import torch
from PIL import Image

import mechvlm as mv
from helpers.drawn import MAKERS
from helpers.studies import made_study
from helpers.unchecked import unchecked
from mechvlm.ndif.jobs import Job

WIDEST = 240
UNSHOWN = {"Modality"}
"""Members of an enumeration, which Python shows."""


class Request:
    job_id = "a-job"


def made(vlm: mv.VLM) -> dict[str, object]:
    """One of every public class, of a size as people have them."""
    images = [Image.new("RGB", (48, 48), (i, 0, 0)) for i in range(40)]
    inputs = vlm.inputs(images, ["What is in this image, and which color has it? " * 3] * 40)
    study = made_study({"some/" + name * 12: 4 for name in ("abc", "defg", "hij", "kl")}, n=3)
    with unchecked():  # of a request without a connection
        job = Job(Request(), lambda out: out)
    objects = [
        vlm, inputs, inputs.tokens if len(inputs) == 1 else inputs.token_maps[0], inputs.token_maps[0].grids[0],
        vlm.inputs(images[:4], "What?", batch_size=2), study, mv.compare([study]), job,
        mv.AttentionShare(), mv.Contextualization(), mv.Likelihood(), mv.LocalizationHeads(), mv.LogitAttribution(),
        mv.LogitLens(), mv.MemoryAttention(), mv.NormAttention(), mv.QueryReading(), mv.LikelihoodResult(torch.zeros(1, 2), "m"),
        MAKERS["pairs"]().scores, *(make() for make in MAKERS.values()),
    ]  # fmt: skip
    return {type(thing).__name__: thing for thing in objects}


def test_every_public_object_is_shown_in_one_short_line(llava_vlm):
    objects = made(llava_vlm)
    public = {name for name in mv.__all__ if inspect.isclass(getattr(mv, name))}
    errors = {name for name in public if issubclass(getattr(mv, name), Exception)}
    texts = {name for name in public if issubclass(getattr(mv, name), str)}  # an answer is its text
    assert public - errors - texts - UNSHOWN - objects.keys() == set(), "each is tried here"
    for name in sorted(public & objects.keys()):
        shown = repr(objects[name])
        assert shown.startswith(f"{name}("), shown
        assert len(shown) <= WIDEST, shown
        assert "\n" not in shown, shown


def test_what_is_shown_is_true(llava_vlm):
    objects = made(llava_vlm)
    n = len(objects["Inputs"].token_maps[0])
    assert repr(objects["Inputs"]) == f"Inputs(40 examples of {n} positions, 40 images, model={llava_vlm.name!r})"
    scores = objects["PairScores"]
    assert repr(scores) == (
        f"PairScores(right of 5 pairs: text {int(scores.text.sum())}, image {int(scores.image.sum())}, "
        f"group {int(scores.group.sum())})"
    )
    assert repr(objects["Study"]).startswith("Study(4 models: abcabcabcabcabcabcabcabcabcab…, ")
    assert " and 1 more; " in repr(objects["Study"])
    assert repr(objects["Comparison"]).startswith("Comparison(4 curves a measure: abc")
    norms = objects["NormAttentionResult"]
    assert f"norm: {list(norms.norm.shape)}" in repr(norms)
    assert "names=('last_text',)" in repr(norms)
    assert "vocabulary" not in repr(norms), "long settings are left out"
