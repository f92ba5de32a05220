"""Parts of a record by hand: kinds, values among look-alikes, features; rows of the table."""

from dataclasses import replace

import pytest
import torch

from helpers import families
from helpers.uneven import uneven
from mechvlm.families.attention_parts import projections_of
from mechvlm.families.derive import _logits, derive, same
from mechvlm.families.known import ARCHITECTURES, architecture_of
from mechvlm.families.record import LayerKind
from mechvlm.families.recording import AttentionCall, Call
from mechvlm.families.table import row_text
from mechvlm.vlm.records import example_arguments


def test_each_layer_has_its_own_kind():
    llava = ARCHITECTURES["LlavaForConditionalGeneration"]
    kinds = (LayerKind(), LayerKind(attention=None), LayerKind(down_proj=None))
    assert [replace(llava, kinds=kinds).kind(layer) for layer in range(3)] == list(kinds)
    assert [replace(llava, kinds=kinds[1:2]).kind(layer) for layer in range(3)] == [kinds[1]] * 3


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Attention(torch.nn.Module):
    """The modules of an attention of 2 heads of width 3, of which `turned` is a look-alike."""

    def __init__(self):
        super().__init__()
        for name in ("turned", *PROJECTIONS):
            setattr(self, name, torch.nn.Linear(6, 6))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_values_are_a_projections_output_itself(scale):
    """Queries and keys are known by the lengths of their heads, up to one factor for all. Values
    must be the same numbers: a projection whose heads are only as long comes first here, and is not
    taken."""
    q, k, v = (uneven(1, 2, 4, 3, seed=seed) for seed in range(3))  # [batch head pos d_head]
    out = uneven(1, 4, 2, 3, seed=3)
    flat = {name: x.transpose(1, 2).reshape(1, 4, 6) for name, x in (("q", q), ("k", k), ("v", v))}
    turned = v.flip(-1).transpose(1, 2).reshape(1, 4, 6)
    outs = {"turned": turned, **dict(zip(PROJECTIONS, (*flat.values(), uneven(1, 4, 6, seed=4)), strict=True))}
    calls = {"self_attn": Call("layer.self_attn", 0, 99)}
    for tick, (name, made) in enumerate(outs.items(), 1):
        given = out.flatten(2) if name == "o_proj" else uneven(1, 4, 6, seed=5)
        calls[f"self_attn.{name}"] = Call(f"layer.self_attn.{name}", tick, tick, tuple(made.shape), given, made)
    model = torch.nn.ModuleDict({"layer": torch.nn.ModuleDict({"self_attn": Attention()})})
    model.config = families.build("llava")[0].config
    fields = projections_of(AttentionCall("layer.self_attn", scale * q, k, v, out), calls, model, same)
    assert {name: fields[name] for name in PROJECTIONS} == dict(zip(PROJECTIONS, PROJECTIONS, strict=True))
    assert fields["d_head"] == 3


def test_features_that_are_added_between_layers_show():
    """Qwen3-VL's; at the image alone, so that text is read from layer to layer."""
    hf, processor = families.build("qwen3_vl")
    record = architecture_of(type(hf).__name__)
    derived = derive(hf, example_arguments(hf, processor, record), record)
    assert derived.adds_between


def test_the_factor_on_the_logits_is_logits_by_output():
    out = uneven(1, 4, 30) - 0.5
    assert _logits(None, out, out) == (1, None)
    assert _logits(None, out, 0.125 * out) == (pytest.approx(0.125), None)
    assert _logits(None, out[0], 8 * out) == (pytest.approx(8), None)


def test_a_family_in_one_line():
    row = {"class": "LlavaForConditionalGeneration", "text": "phi"}
    worked = {
        "lens": "",
        "cache": "",
        "states": "",
        "bridge": "TransformerLens has none.",
        "middle state": "There is none.",
    }
    assert row_text("llava_phi", {**row, "methods": worked}).split() == [
        "llava_phi", "Llava", "phi", "3", "of", "5", "methods;", "not", "bridge,", "middle", "state",
    ]  # fmt: skip
    assert row_text("llava", {**row, "methods": {"lens": "", "cache": ""}}).endswith(" all 2 methods")
    assert row_text("t5", {**row, "refused": "It is an encoder."}).endswith(" refused: It is an encoder.")
    assert row_text("kimi", {**row, "untried": "No package."}).endswith(" not tried: No package.")
