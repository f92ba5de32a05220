"""One model in several threads: each call gives what it gives alone, and never a part of it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.tracing import reading as module


def test_threads_wait_for_each_other(llava_vlm):
    """64 reads in four threads equal the reads of one."""
    inputs = [llava_vlm.inputs(noise_image(i), "what is this") for i in range(8)]
    alone = [mv.logit_lens(llava_vlm, some) for some in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: mv.logit_lens(llava_vlm, inputs[i % 8]), range(64)))
    for i, result in enumerate(results):
        assert torch.equal(result.ids, alone[i % 8].ids)
        torch.testing.assert_close(result.probs, alone[i % 8].probs)


def test_different_calls_in_threads(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    calls = [
        lambda: mv.norm_attention(llava_vlm, inputs).norm,
        lambda: mv.information_flow(llava_vlm, inputs, "this", window=1).p_knocked,
        lambda: llava_vlm.run_with_cache(inputs, "blocks.1.hook_resid_post")[0],
        lambda: llava_vlm.generate(inputs, max_new_tokens=3),
        lambda: mv.multimodal_neurons(llava_vlm, inputs, k=2).attribution,
    ]
    alone = [call() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: calls[i % len(calls)](), range(60)))
    for i, result in enumerate(results):
        if isinstance(result, torch.Tensor):
            torch.testing.assert_close(result, alone[i % len(calls)])
        else:
            assert result == alone[i % len(calls)]


@pytest.mark.parametrize("lost", ["state", "row"])
def test_a_part_of_a_forward_is_no_result(llava_vlm, monkeypatch, lost):
    """Whatever loses readings on the way, a result of some layers only is refused."""
    whole = module._readings

    def without_layer_2(vlm, wanted):
        for method, reading in whole(vlm, wanted):
            if method != ("at_state" if lost == "state" else "at_attention") or reading[0] != 2:
                yield method, reading

    monkeypatch.setattr(module, "_readings", without_layer_2)
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    with pytest.raises(RuntimeError, match=r"some layers only \(.*(finite|NormAttention) \d of \d"):
        mv.read(llava_vlm, inputs, mv.NormAttention())
