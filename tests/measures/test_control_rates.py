"""Both errors of the phases' controls on simulated studies, by the script that states them."""

import sys
from pathlib import Path

import numpy as np
import pytest

import mechvlm as mv

sys.path.insert(0, str(Path(mv.__file__).parents[1] / "scripts"))

import simulate_phases


def test_phases_on_top_of_the_decoders_own_curve_are_found_and_its_own_are_not():
    """One study of each. The order of the own curve's turns alone would be the paper's."""
    own, added = (simulate_phases.controlled_study(np.random.default_rng(0), size, 0.02) for size in (0, 0.5))
    assert own.phases.shows_pattern
    assert own.verdict.startswith("The curve is the decoder's own")
    assert added.shows_pattern
    assert added.verdict.startswith("The paper's four phases show, each beyond the controls")


@pytest.mark.long
@pytest.mark.parametrize("ripple", [0.05, 0.1])
def test_false_alarms_of_the_controls(ripple):
    """The image is one more control: at most 5 % of the studies have a segment beyond them."""
    segments, studies, pattern = simulate_phases.controlled_rates(0, ripple, 60, seed=3)
    assert segments <= studies <= 0.05
    assert pattern == 0


@pytest.mark.long
def test_power_beside_controls():
    """Phases of half the decoder's own range, ripples of 5 %: four in five are found."""
    _, beyond, pattern = simulate_phases.controlled_rates(0.5, 0.05, 20, seed=3)
    assert beyond == 1
    assert pattern >= 0.8
