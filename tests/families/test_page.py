"""docs/families.md: its example runs, and it names every identity and every reason."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import mechvlm as mv
from helpers import families
from mechvlm.families.known import known_record
from mechvlm.families.record import LayerKind
from mechvlm.vlm.inspection import inspect_model

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict = {}
    exec(code, names)
    assert names["vlm"].record == names["record"]


@pytest.mark.parametrize("name", ["llava_phi3", "llava_phi"])
def test_every_identity_is_explained(name):
    """Of a derived record, with a middle state and without."""
    claims = inspect_model(*families.build(name))._by_kind()
    assert len(claims) > 10
    assert not [claim for claim in claims if f"| `{claim}` |" not in PAGE]


def test_the_worked_example_is_as_it_says():
    """Gemma 3 with a Llama's kind: which identity fails, and which holds."""
    hf, processor = families.build("gemma3")
    plain = replace(known_record(hf), kinds=(LayerKind(mid_norm="pre_feedforward_layernorm"),))
    claims = inspect_model(hf, processor, record=plain).claims
    assert claims["resid_mid[0] = resid_pre[0] + attn_out[0]"] > 0.3
    assert claims["attn_out[0] = z[0] W_O[0]"] < 1e-5
    assert inspect_model(hf, processor).holds


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma4", "is no sum of its input and of outputs of its modules"),
        ("qwen3_5", "goes through no linear module as it is"),
        ("blip2_post_norm", "and its unembedding stands"),
        ("chameleon", "are neither"),
    ],
)
def test_its_examples_are_refused_for_these_reasons(name, reason):
    assert reason in PAGE
    with pytest.raises(mv.ModelError, match=reason):
        mv.load(*families.build(name))
