"""Studies that read answers, on models whose prompts or positions have rules of their own.

PaliGemma's prompt sees all of itself, its answer only what stands before. Qwen2.5-VL numbers
positions in rows and columns, and its images have grids of different sizes. LLaVA-NeXT's images
come in tiles, so that examples differ in length.
"""

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers import families
from mechvlm.datasets import Dataset, Example, fingerprint
from mechvlm.study import run
from mechvlm.study.running import answer_rows

pytestmark = pytest.mark.families

SIZES = [(60, 44), (44, 80), (70, 40), (50, 50)]


@pytest.mark.parametrize("name", ["paligemma", "paligemma2", "qwen2_5_vl", "llava_next"])
def test_every_share_and_chance_is_that_of_the_example_alone(name, monkeypatch):
    monkeypatch.setattr(answer_rows, "ANSWER_TOKENS", 5)
    vlm = mv.load(*families.build(name))
    pictures = [families.picture(*size, seed=n) for n, size in enumerate(SIZES)]
    examples = tuple(Example(f"e{n}", image, ("a dog",)) for n, image in enumerate(pictures))
    data = Dataset("made", examples, (), fingerprint(examples))
    study = run([vlm], data, prompt="what is this", batch_size=2, answers=True)
    tables = {table: study.tables[table].set_index("example") for table in ("answer_attention", "answer_lens")}
    n_answered = 0
    for n, image in enumerate(pictures):
        (answer,) = vlm.generate(vlm.inputs(image, "what is this"), max_new_tokens=5)
        if not len(answer.ids):
            continue
        n_answered += 1
        tokens = answer.inputs.tokens
        (norms,) = mv.read(vlm, answer.inputs, mv.NormAttention(dst="writing"))
        own = tables["answer_attention"].loc[f"e{n}"]
        for column, values in (("norm", norms.norm[:, 0]), ("weight", norms.weight[:, 0].mean(1))):
            shares = own.pivot(index="layer", columns="token", values=column).to_numpy()
            np.testing.assert_allclose(shares, values[..., tokens.image].sum(-1) / values.sum(-1), rtol=1e-3, atol=1e-6)
        last = tables["answer_lens"].loc[f"e{n}"].query("state == @vlm.n_layers").sort_values("token")
        with torch.no_grad():
            logits = vlm.hf(**vlm.encoding(answer.inputs)).logits[0, tokens.writing]
        chances = logits.softmax(-1)[range(len(answer.ids)), answer.ids]
        np.testing.assert_allclose(last["probability"], chances, rtol=1e-3, atol=1e-7)
    assert n_answered >= 2
