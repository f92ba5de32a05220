#!/usr/bin/env python3
"""Both errors of the four-phase verdict on simulated curves, by the smallest turn that counts.

    python scripts/simulate_phases.py
    python scripts/simulate_phases.py --curves 60 --seed 7     # of `MIN_TURN`'s docstring

Each simulated study has a curve of the decoder's own, the same for all examples, and differences
between examples that are small beside it. The curve is

    trend + ripple

The trend has one of the shapes below, from 0 to 1. The ripple is an autoregressive process over the
states (coefficient 0.5) of a given standard deviation: significance cannot tell it from phases,
since every example has it. Rows without phases should say "not the paper's pattern", rows with
phases "the pattern". Printed is the share of studies that show the pattern, with its standard
error.

A second table is of studies with controls. All their curves are a decoder's own: one with turns
like those of SmolLM2-135M, for the image and for each of three controls with a ripple of its own.
To the image's curve, and to no control's, the paper's four phases of a given size are added; of
size 0 it is one more control. Printed is the share of studies of which any segment exceeds every
control, and of those that show the paper's four phases, each beyond every control.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from jaxtyping import Float

from mechvlm.measures.control_excess import ControlExcess
from mechvlm.measures.phase_fit import fit_phases

STATES, EXAMPLES = 31, 60
DIFFERENCES = 0.02
"""Standard deviation between examples at each state, as a share of the trend's range."""
TURNS = (0.05, 0.1, 0.2, 0.3)
TRENDS = {
    "rise": {0: 0, 30: 1},
    "rise, then level": {0: 0, 6: 1, 30: 1},
    "rise and fall": {0: 0, 12: 1, 30: 0},
    "rise, level, fall at the end": {0: 0, 4: 1, 26: 1, 30: 0.5},
    "phases, dip of 30 %": {0: 0, 4: 1, 18: 0.7, 26: 1, 30: 0.6},
    "phases, dip of 50 %": {0: 0, 4: 1, 18: 0.5, 26: 1, 30: 0.5},
}
"""Each trend's corners by state; the last two have the paper's phases."""
RIPPLES = (0.02, 0.05)
OWN = {0: 0, 2: 0.9, 20: 0.75, 22: 0.82, 24: 0.65, 29: 1, 30: 0.5}
"""Corners of the decoder's own curve in the second table, as shares of its range."""
PHASES = {0: 0, 4: 1, 13: -1, 26: 1, 30: -1}
"""Corners of the phases that are added to it, in units of their size."""
SIZES = (0, 0.3, 0.5)
"""How far the phases go up and down, as shares of the own curve's range."""
CONTROL_RIPPLES = (0.02, 0.05, 0.1)
CONTROL_EXAMPLES = 32
"""As many examples as a study reads its controls of."""


def ripple(rng: np.random.Generator, deviation: float) -> Float[np.ndarray, " state"]:
    """An autoregressive process with the given standard deviation."""
    values = [rng.normal()]
    for step in rng.normal(size=STATES - 1):
        values.append(0.5 * values[-1] + np.sqrt(0.75) * step)
    return deviation * np.array(values)


def study(rng: np.random.Generator, corners: dict[int, float], deviation: float) -> Float[np.ndarray, "example state"]:
    """The curves of one simulated study."""
    trend = np.interp(np.arange(STATES), list(corners), list(corners.values()))
    return trend + ripple(rng, deviation) + DIFFERENCES * rng.normal(size=(EXAMPLES, STATES))


def rates(corners: dict[int, float], deviation: float, curves: int, seed: int) -> list[float]:
    """The share of studies that show the paper's pattern, for each of `TURNS`."""
    rng = np.random.default_rng(seed)
    studies = [study(rng, corners, deviation) for _ in range(curves)]
    return [
        float(np.mean([fit_phases(values, min_turn=turn, n_bootstrap=2).shows_pattern for values in studies]))
        for turn in TURNS
    ]


def controlled_study(rng: np.random.Generator, size: float, deviation: float) -> ControlExcess:
    """A simulated study with three controls, whose image adds phases of this size."""
    corners = [np.interp(np.arange(STATES), list(c), list(c.values())) for c in (OWN, PHASES)]
    image = study(rng, OWN, deviation) + size * corners[1]
    controls = {name: study(rng, OWN, deviation)[:CONTROL_EXAMPLES] for name in ("noise", "words", "text")}
    return ControlExcess(
        fit_phases(image, n_bootstrap=2),
        torch.from_numpy(image[:CONTROL_EXAMPLES].T),
        {name: torch.from_numpy(values.T) for name, values in controls.items()},
    )


def controlled_rates(size: float, deviation: float, curves: int, seed: int) -> tuple[float, float, float]:
    """The share of segments beyond every control, of studies with any such, and with the pattern."""
    rng = np.random.default_rng(seed)
    studies = [controlled_study(rng, size, deviation) for _ in range(curves)]
    each = [exceeds for s in studies for exceeds in s.exceeding]
    by_study = [(any(s.exceeding), s.shows_pattern) for s in studies]
    return float(np.mean(each)), *map(float, np.mean(by_study, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=int, default=100, help="studies simulated for each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs) as pool:
        print(f"share of {args.curves} studies that show the pattern, by the smallest turn (share of the range)")
        print(f"{'trend':<30} {'ripple':>7} " + " ".join(f"{turn:>12.0%}" for turn in TURNS))
        rows = [(name, deviation) for name in TRENDS for deviation in RIPPLES]
        jobs = [pool.submit(rates, TRENDS[name], deviation, args.curves, args.seed) for name, deviation in rows]
        for (name, deviation), job in zip(rows, jobs, strict=True):
            print(f"{name:<30} {deviation:>7.0%} " + cells(job.result(), args.curves), flush=True)
        print(f"\nof {args.curves} studies with controls, the share of segments beyond them, and of studies")
        print(f"{'phases of the image':<30} {'ripple':>7} {'a segment':>12} {'any of them':>12} {'the pattern':>12}")
        grid = [(size, deviation) for size in SIZES for deviation in CONTROL_RIPPLES]
        further = [pool.submit(controlled_rates, *settings, args.curves, args.seed) for settings in grid]
        for (size, deviation), shares in zip(grid, further, strict=True):
            print(
                f"{f'{size:.0%} of the range':<30} {deviation:>7.0%} " + cells(shares.result(), args.curves), flush=True
            )


def cells(rates: Sequence[float], curves: int) -> str:
    """Rates with their standard errors."""
    return " ".join(f"{f'{rate:.0%} ± {np.sqrt(rate * (1 - rate) / curves):.1%}':>12}" for rate in rates)


if __name__ == "__main__":
    main()
