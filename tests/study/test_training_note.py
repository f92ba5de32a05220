"""The report quotes what the bundled models' cards say on training and the logit lens."""

from mechvlm import bundled
from mechvlm.study.report.page import training_note


def test_the_note_says_whether_visual_positions_had_a_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "shipped", lambda name: tmp_path)
    assert training_note("tiny-llava") == "", "no card"
    (tmp_path / "README.md").write_text(
        "# Model\n\nIts loss is on nothing.\n\n## Training\n\nLong.\n\n**The loss is on text\nalone.**\n\n"
        "What the lens reads\nwas not taught.\n\n## What it does\n\nThe loss is on another page.\n"
    )
    assert training_note("tiny-llava") == "The loss is on text alone. What the lens reads was not taught."
    assert training_note("org/model") == ""


def test_both_cards_are_quoted():
    assert "never on a visual position" in training_note("tiny-llava")
    assert "lens reads" in training_note("tiny-llava")
    assert "never on a query's position" in training_note("tiny-instructblip")
