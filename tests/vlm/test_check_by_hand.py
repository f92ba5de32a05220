"""What the checks let pass: numbers that are a little off, in one layer only, or not numbers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.images import noise_image
from helpers.models import llava
from helpers.unchecked import unchecked
from mechvlm.vlm import placing
from mechvlm.vlm.bridge import check_bridge
from mechvlm.vlm.inspection import Inspection, inspect_model
from mechvlm.vlm.placing import lie_as_laid_out
from mechvlm.vlm.verify import check_claims, check_model, own_forward
from mechvlm.vlm.vlm import VLM


def test_a_factor_that_is_a_tenth_off_is_refused():
    hf, processor = families.build("llava_granite")
    record = mv.load(hf, processor, check=False).record
    check_model(VLM(hf, processor, name="granite", record=record))
    kinds = tuple(replace(kind, scale=1.1 * kind.scale) for kind in record.kinds)
    with pytest.raises(mv.ModelError, match=r"resid_mid\[0\] = resid_pre\[0\] \+ attn_out\[0\]: off by 0\.00"):
        check_model(VLM(hf, processor, name="granite", record=replace(record, kinds=kinds)))


def test_the_last_layer_is_held_to_the_record_too():
    """It is built as the others are; a hook makes its attention write more than W_O says."""
    hf, processor = llava.__wrapped__()
    hf.model.language_model.layers[2].self_attn.o_proj.register_forward_hook(lambda module, args, out: 1.5 * out)
    with pytest.raises(mv.ModelError, match=r"attn_out\[2\] = z\[2\] W_O\[2\]: off by"):
        mv.load(hf, processor)


def bridge_of(logits: torch.Tensor, post: float = 3.0) -> SimpleNamespace:
    """A bridge of one layer: resid_pre 0, attn_out 1, mlp_out 2, and this resid_post."""
    values = {"resid_pre": 0.0, "attn_out": 1.0, "mlp_out": 2.0, "resid_post": post}
    cache = {f"blocks.0.hook_{name}": torch.full((1, 2, 4), value) for name, value in values.items()}
    return SimpleNamespace(cfg=SimpleNamespace(n_layers=1), run_with_cache=lambda ids: (logits, cache))


def test_a_bridge_whose_numbers_are_none_is_refused():
    logits = torch.ones(1, 2, 5)
    encoding = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
    cases = [
        (bridge_of(logits * math.nan), "logits are the model's: off by nan"),
        (bridge_of(logits, math.nan), r"resid_pre \+ attn_out \+ mlp_out: off by nan"),
        (bridge_of(logits, 4.0), r"resid_pre \+ attn_out \+ mlp_out: off by 0\.25"),
    ]
    with unchecked():
        check_bridge(bridge_of(logits), encoding, logits, "m")
        for bridge, says in cases:
            with pytest.raises(mv.ModelError, match=says):
                check_bridge(bridge, encoding, logits, "m")


def test_an_inspection_shows_the_worst_layer_of_each_claim(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "a")
    claims = check_claims(llava_vlm, inputs, own_forward(llava_vlm, inputs))
    worst = {"attn_out[1] = z[1] W_O[1]": 0.5, "attn_out[2] = z[2] W_O[2]": 1e-5}
    inspected = Inspection(llava_vlm, llava_vlm.record, {**claims, "attn_out[0] = z[0] W_O[0]": 0.0, **worst}, "none")
    assert not inspected.holds
    (line,) = (line for line in inspected.text().splitlines() if "attn_out[l] = z[l] W_O[l]" in line)
    assert " ".join(line.split()) == "FAIL off by 0.5 of the largest entry attn_out[l] = z[l] W_O[l] (3 layers)"
    nan = replace(inspected, claims={**inspected.claims, "attn_out[0] = z[0] W_O[0]": math.nan})
    assert "FAIL off by nan" in nan.text()
    assert not nan.holds


def test_an_inspection_counts_the_tokens_without_a_place():
    """60 x 44 in LLaVA-NeXT: 16 tokens of the whole, 6 rows of 8, and a line break after each."""
    visual = inspect_model(*families.build("llava_next")).visual
    assert visual == "70 for an image of 64 x 48: whole 4 x 4, mosaic 6 x 8; 6 without a place."


# -- places ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiles():
    """A model whose tokens tile the image, its record, and the positions of its tokens."""
    hf, processor = families.build("llava")
    record = replace(mv.load(hf, processor, check=False).record, visual_tokens="cells")
    tokens = placing.build_inputs(
        families.picture(*placing.PICTURE, seed=0), "a", record=record, config=hf.config, processor=processor
    ).tokens
    quarter = tokens.pos_in_box((0, 0, placing.PICTURE[0] / 2, placing.PICTURE[1] / 2), covered=0.99)
    return hf, processor, record, tokens, quarter


@pytest.mark.parametrize(
    ("still", "moved", "lie"), [(None, None, True), ("inside", None, False), (None, "outside", False)]
)
def test_tokens_lie_where_a_changed_quarter_changes_them_all_and_no_others(tiles, monkeypatch, still, moved, lie):
    hf, processor, record, tokens, quarter = tiles
    assert 0 < len(quarter) < len(tokens.image)
    changed = torch.zeros(len(tokens), 4)
    changed[quarter] = 1
    if still:
        changed[quarter[0]] = 0
    if moved:
        changed[tokens.image[-1]] = 0.3
    states = iter([torch.zeros(len(tokens), 4), changed])
    monkeypatch.setattr(placing, "_entering", lambda *_: next(states))
    assert lie_as_laid_out(hf, processor, record) == lie


def test_a_model_that_mixes_its_patches_is_loaded_without_places():
    vlm = mv.load(*families.build("deepseek_vl_hybrid"))
    assert vlm.record.visual_tokens == "unplaced"
