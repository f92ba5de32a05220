"""What loading a model costs that is in memory: record, checks and tracing, in bare forwards."""

import copy

import torch
from benchmark_measure import times
from benchmark_models import QUESTION, noise, unread

import mechvlm as mv

MODELS = {"llava": "known record", "phi3": "derived record"}


def loading(layers: int, width: int, repeats: int, device: str, dtype: torch.dtype) -> list[dict]:
    """One row per kind of record: seconds of `mechvlm.load(model, processor)`.

    The bare forward is that of an image of 336 pixels and some 40 words. Loading runs its own on a
    tiny image: two for a known record, one more for a derived one and one to check it. On few words
    a forward reads all weights and computes little.
    """
    rows = []
    for family, record in MODELS.items():
        model, processor = unread(family, layers, width, device, dtype)
        untouched = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        vlm = mv.load(model, processor)
        assert vlm.record.derived == (record == "derived record")
        encoding = vlm.encoding(vlm.inputs(noise(0), QUESTION))

        @torch.no_grad()
        def bare(hf=untouched, encoding=encoding):
            hf(**encoding, logits_to_keep=1)

        load = f"load, {record}"
        cases = {"bare": bare, load: lambda model=model, processor=processor: mv.load(model, processor)}
        seconds = times(cases, repeats, device)
        rows.append({"case": load, "seconds": seconds[load], "of a bare forward": seconds[load] / seconds["bare"]})
    return rows
