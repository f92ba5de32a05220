"""Families in bfloat16 and with eager attention: they load, hold, and give what float32 gives."""

import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.every_method import ANSWER, SIZES, WORDS
from mechvlm.vlm.verify import check_claims, holds, own_forward

KINDS = ((torch.bfloat16, "sdpa"), (torch.float32, "eager"), (torch.bfloat16, "eager"))


def read_all(name: str, dtype: torch.dtype, attention: str):
    """The four probes on a mixed batch; None for a family that is refused."""
    try:
        vlm = mv.load(*families.build(name, dtype, attention))
    except mv.ModelError:
        return None
    images = [families.picture(*size, seed=i) for i, size in enumerate(SIZES)]
    record = vlm.record
    images = images[:1] * 3 if record.equal_sizes or record.equal_lengths else images
    inputs = vlm.inputs(images, [WORDS[0]] * 3 if record.equal_lengths else list(WORDS))
    claims = check_claims(vlm, inputs[0], own_forward(vlm, inputs[0]))
    assert all(holds(difference, vlm) for difference in claims.values()), claims
    probes = [mv.LogitLens(k=3, positions="last")]
    probes.append(mv.MemoryAttention(dst="last") if vlm.memory_layers else mv.Contextualization())
    if all(vlm.record.kind(layer).attention for layer in range(vlm.n_layers)):
        probes += [mv.NormAttention(dst="last"), mv.LogitAttribution(ANSWER)]
    return {type(probe).__name__: result for probe, result in zip(probes, mv.read(vlm, inputs, *probes), strict=True)}


@pytest.mark.parametrize("name", families.cases())
def test_half_precision_and_eager_attention(name):
    whole = read_all(name, torch.float32, "sdpa")
    for dtype, attention in KINDS:
        try:
            other = read_all(name, dtype, attention)
        except mv.InputError as error:
            pytest.skip(str(error))
        if whole is None or other is None:
            assert dtype == torch.bfloat16 or other is whole, "what loads in float32 loads with eager attention"
            continue
        within = 1e-3 if dtype == torch.float32 else 0.2
        fields = (
            ("Contextualization", "inter"), ("NormAttention", "norm"), ("MemoryAttention", "norm"), ("LogitAttribution", "total"),
        )  # fmt: skip
        for probe, field in fields:
            if probe in whole:
                a, b = (getattr(results[probe], field) for results in (whole, other))
                scale = float(a.abs().max())
                assert float((a - b).abs().mean()) < within * scale, (probe, dtype, attention)
