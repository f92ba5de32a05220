"""`mechvlm check`: what it prints of a model, and its exit code."""

from dataclasses import replace

import pytest

from helpers import families
from mechvlm.cli import main
from mechvlm.families.known import known_record
from mechvlm.vlm import records


@pytest.fixture
def folder(tmp_path):
    def save(name: str) -> str:
        hf, processor = families.build(name)
        hf.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def test_a_bundled_model_holds(capsys):
    assert main(["check", "tiny-llava"]) == 0
    out = capsys.readouterr().out
    assert "read by its record in mechvlm/families/known.py" in out
    assert "attn_out[l] = z[l] W_O[l]" in out
    assert "FAIL" not in out
    assert out.rstrip().endswith("Every identity holds.")


def test_a_derived_record_is_printed(capsys, folder):
    assert main(["check", folder("llava_phi3")]) == 0
    out = capsys.readouterr().out
    assert "read by its derived record" in out
    assert "columns=((0, 16), (64, 16), (96, 16))" in out
    assert "made again for two rows" in out


def test_a_refused_model_says_why(capsys, folder):
    assert main(["check", folder("blip2_t5")]) == 1
    assert "encoder-decoder language model (t5)" in capsys.readouterr().err


def test_a_record_that_does_not_fit_fails(capsys, folder, monkeypatch):
    """Gemma's layers read as Llama's: what is added is the norm's output, not the attention's."""

    def wrong(hf):
        record = known_record(hf)
        return replace(record, kinds=(replace(record.kind(0), attn_out="self_attn", mlp_out="mlp"),))

    monkeypatch.setattr(records, "known_record", wrong)
    assert main(["check", folder("gemma3")]) == 1
    out = capsys.readouterr().out
    assert any("FAIL" in line and "resid_mid[l] = resid_pre[l] + attn_out[l]" in line for line in out.splitlines())
    assert "Not every identity holds" in out
