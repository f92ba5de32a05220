"""On a real NDIF server: interventions, and the experiments built on them, do the same as here."""

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers.ndif import TOLERANCE, difference
from mechvlm.errors import RemoteError

pytestmark = pytest.mark.ndif


def changed(vlm, inputs, intervene):
    with torch.no_grad(), vlm.trace(inputs):
        intervene(vlm)
        logits = nnsight.save(vlm.logits[:, -1])
    return logits


def knocked_out(vlm, inputs):
    with torch.no_grad(), vlm.trace(inputs):
        images, last = [m.image for m in inputs.token_maps], inputs.token_maps[0].last
        mv.knock_out(vlm, src=images, dst=torch.tensor([last]), layers=range(2, 5), heads=[[0], None, [1, 2]])
        weights = nnsight.save(vlm.pattern[5, [last]])
        logits = nnsight.save(vlm.logits[:, -1])
    return weights, logits


def ablated(how, at):
    def run(vlm, inputs):
        with torch.no_grad(), vlm.trace(inputs):
            mv.ablate(vlm, [m.image[:9] for m in inputs.token_maps], layers=[1, 3], how=how, at=at)
            logits = nnsight.save(vlm.logits[:, -1])
        return logits

    return run


def patched(vlm, inputs):
    _, other = vlm.run_with_cache(inputs, ["blocks.1.hook_resid_post", "blocks.2.attn.hook_z"])
    with torch.no_grad(), vlm.trace(inputs):
        mv.patch(vlm, other["blocks.1.hook_resid_post"].flip(0), [m.image for m in inputs.token_maps], layers=1)
        mv.patch(vlm, other, inputs.token_maps[0].last, layers=2, at="z", heads=[0])
        logits = nnsight.save(vlm.logits[:, -1])
    return logits


def everywhere(vlm, inputs):
    """Each site is read and assigned, one after the other."""
    with torch.no_grad(), vlm.trace(inputs):
        values = nnsight.save([])
        image = inputs.token_maps[0].image
        values.append(vlm.q[1])
        pattern = vlm.pattern[1]
        vlm.pattern[1] = (pattern + 1 / pattern.shape[-1]) / 2
        for layer, site in enumerate(("resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")):
            accessor = getattr(vlm, site)
            values.append(accessor[layer + 2].clone())
            mv.ablate(vlm, image[:5], layer + 2, at=site)
            mv.ablate(vlm, image[5:9], layer + 2, at=site)
        vlm.logits = vlm.logits + 1
        values.append(vlm.logits)
    return values


def steered(vlm, inputs):
    with torch.no_grad(), vlm.trace(inputs):
        mv.steer(vlm, vlm.W_U[:, 7], inputs.token_maps[0].last, layers=2, scale=0.5)
        mv.steer(vlm, torch.ones(vlm.d_model), inputs.token_maps[0].last, layers=3, at="mlp_out")
        logits = nnsight.save(vlm.logits[:, -1])
    return logits


def reweighted(vlm, inputs):
    with torch.no_grad(), vlm.trace(inputs):
        images, last = [m.image for m in inputs.token_maps], torch.tensor([inputs.token_maps[0].last])
        mv.reweight(vlm, images, last, layers=[1, 2], heads=[[0], None, [1, 2]], scale=3.0)
        mv.reweight(vlm, None, last, layers=3, temperature=0.5)
        weights = nnsight.save(vlm.pattern[3, last])
        logits = nnsight.save(vlm.logits[:, -1])
    return weights, logits


INTERVENTIONS = {
    "knock_out": knocked_out,
    "ablate zero": ablated("zero", "resid_pre"),
    "ablate mean": ablated("mean", "attn_out"),
    "ablate resample": ablated("resample", "z"),
    "every site": everywhere,
    "patch": patched,
    "steer": steered,
    "reweight": reweighted,
}


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_interventions(pair, user, name):
    there, here = INTERVENTIONS[name](pair.there, pair.inputs), INTERVENTIONS[name](pair.here, pair.inputs)
    assert difference(there, here) <= TOLERANCE
    logits = there[-1] if isinstance(there, tuple | list) else there
    logits = logits[:, -1] if logits.ndim == 3 else logits
    # The intervention changed something.
    assert difference(logits, changed(pair.here, pair.inputs, lambda vlm: None)) > 1e-2
    assert difference(logits, changed(pair.there, pair.inputs, lambda vlm: None)) > 1e-2


def test_run_with_cache(pair, user, traffic):
    names = ["hook_embed", "blocks.1.hook_resid_mid", "blocks.2.attn.hook_pattern", "blocks.2.mlp.hook_post"]
    (logits, there), (expected, here) = (v.run_with_cache(pair.inputs, names) for v in (pair.there, pair.here))
    assert list(there) == names == list(here)
    assert traffic.requests == 1
    assert difference([logits, *there.values()], [expected, *here.values()]) <= TOLERANCE


def test_run_with_cache_of_every_hook(pair, user):
    (logits, there), (expected, here) = (v.run_with_cache(pair.inputs) for v in (pair.there, pair.here))
    assert list(there) == list(here)
    assert difference([logits, *there.values()], [expected, *here.values()]) <= TOLERANCE


def test_generate(pair, user, traffic):
    answers = pair.there.generate(pair.inputs, max_new_tokens=12)
    assert answers == pair.here.generate(pair.inputs, max_new_tokens=12)
    assert all(answers[:2])
    assert traffic.requests == 1
    assert traffic.received[0] < 5_000


def grid(vlm, p, **options):
    """Patches from the same questions of the next picture."""
    images = [p.inputs.images[(row + 1) % 3][0] for row in range(3)]
    return mv.patch_grid(vlm, vlm.inputs(images, list(p.inputs.prompts)), p.inputs, metric="kl", **options)


SETS = {"two": [(0, 1), (2, 3)], "one": [(1, 1)]}
EXPERIMENTS = {
    "head_ablation": (1, lambda vlm, p: mv.head_ablation(vlm, p.inputs, positions="last")),
    "head_ablation, resample": (1, lambda vlm, p: mv.head_ablation(vlm, p.inputs, how="resample", sets=SETS, draws=2)),
    "head_ablation, mean": (2, lambda vlm, p: mv.head_ablation(vlm, p.inputs, how="mean", sets=SETS, draws=2)),
    "patch_grid": (1, lambda vlm, p: grid(vlm, p, positions=["image", "last"])),
    "patch_grid, heads": (1, lambda vlm, p: grid(vlm, p, at="z")),
    "information_flow": (1, lambda vlm, p: mv.information_flow(vlm, p.inputs, window=3)),
    "causal_trace, image": (1, lambda vlm, p: mv.causal_trace(vlm, p.inputs, ["red", "a", "blue"], corrupt="image")),
    "causal_trace, words": (1, lambda vlm, p: mv.causal_trace(vlm, p.inputs, corrupt="words", at="mlp_out", window=3)),
    "object_ablation": (
        2,
        lambda vlm, p: mv.object_ablation(vlm, p.inputs, p.boxes, p.answers, margins=(0, 1), draws=2),
    ),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments(pair, user, traffic, name):
    """All forwards of a batch's experiment run there, in one request.

    object_ablation needs the mean token first, and a mean of heads their mean: another request.
    """
    requests, run = EXPERIMENTS[name]
    there, here = run(pair.there, pair), run(pair.here, pair)
    assert difference(there, here) <= TOLERANCE
    assert traffic.requests == requests
    reading = pair.there.record.visual_tokens == "queries" and name == "object_ablation"
    assert max(traffic.received) < (80_000 if reading or "mean" in name else 10_000)


def test_contextualization_controls(pair, traffic, server):
    """One request for the images' curve, and one for each control."""
    there, here = (mv.contextualization_controls(vlm, pair.inputs) for vlm in (pair.there, pair.here))
    assert difference(there, here) <= TOLERANCE
    assert (there.controls - there.inter).abs().amax((1, 2)).min() > 1e-2
    assert traffic.requests == 1 + 3


def test_word_reading(pair, traffic, server):
    """With answers that the model writes, and boxes: two requests for a batch, writing and reading.

    Queries also need where each of them reads, in the same request.
    """
    boxes = [{answer: box} for answer, box in zip(pair.answers, pair.boxes, strict=True)]
    there, here = (mv.word_reading(vlm, pair.inputs, boxes=boxes) for vlm in (pair.there, pair.here))
    assert there.word == here.word
    assert there.word
    assert difference(there, here) <= TOLERANCE
    assert traffic.requests == 2
    assert max(traffic.received) < 80_000


def test_multimodal_neurons(pair, traffic, server):
    there, here = (mv.multimodal_neurons(vlm, pair.inputs, pair.answers, k=3) for vlm in (pair.there, pair.here))
    assert difference(there, here) <= TOLERANCE
    # One for gradients, one for the strongest candidates' words, one for the chosen activations.
    assert traffic.requests == 3
    d_mlp = pair.there.config.text_config.intermediate_size
    assert max(traffic.received) < 2 * 4 * len(pair.inputs) * pair.there.n_layers * d_mlp + 5_000


def test_gradients_need_trust(pair, sandboxed):
    with pytest.raises(RemoteError, match="needs gradients, and NDIF runs what you send in a sandbox"):
        mv.multimodal_neurons(pair.there, pair.inputs, pair.answers, k=3)
