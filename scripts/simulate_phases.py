#!/usr/bin/env python3
"""Both errors of the four-phase verdict on simulated curves, by the smallest turn that counts.

    python scripts/simulate_phases.py
    python scripts/simulate_phases.py --curves 60 --seed 7     # of `MIN_TURN`'s docstring; 7 minutes

Each simulated study has a curve of the decoder's own, the same for all examples, and differences
between examples that are small beside it. The curve is

    trend + ripple

The trend has one of the shapes below, from 0 to 1. The ripple is an autoregressive process over the
states (coefficient 0.5) of a given standard deviation: significance cannot tell it from phases,
since every example has it. Rows without phases should say "not the paper's pattern", rows with
phases "the pattern". Printed is the share of studies that show the pattern, with its standard
error.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from jaxtyping import Float

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=int, default=100, help="studies simulated for each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time")
    args = parser.parse_args()
    print(f"share of {args.curves} studies that show the pattern, by the smallest turn (share of the range)")
    print(f"{'trend':<30} {'ripple':>7} " + " ".join(f"{turn:>12.0%}" for turn in TURNS))
    rows = [(name, deviation) for name in TRENDS for deviation in RIPPLES]
    with ProcessPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(rates, TRENDS[name], deviation, args.curves, args.seed) for name, deviation in rows]
        for (name, deviation), job in zip(rows, jobs, strict=True):
            cells = [f"{rate:.0%} ± {np.sqrt(rate * (1 - rate) / args.curves):.1%}" for rate in job.result()]
            print(f"{name:<30} {deviation:>7.0%} " + " ".join(f"{cell:>12}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
