"""Work that is killed at any moment comes to the same bytes as work that was left alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

TESTS = Path(__file__).parents[1]


def killed(*command: str) -> dict:
    """What a helper that kills its children reports."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=1500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.kills
def test_killed_at_any_moment_its_tables_are_those_of_a_study_that_was_left_alone():
    """52 kills with SIGKILL, at random times and at random steps on the disk.

    The tables are the same byte for byte, and no other file is left over.
    """
    report = killed(str(TESTS / "helpers" / "killed.py"), "52", str(int(time.time())))
    assert report["kills"] >= 52
    assert len(report["where"]) >= 4, "they fell in different places"


@pytest.mark.kills
def test_killed_while_it_reads_answers_its_tables_are_the_same(tmp_path):
    """helpers/killed.py with `answers`, of four tokens each; 12 kills."""
    code = (
        "import json, sys; from functools import partial; from pathlib import Path; from helpers import killed; "
        "from mechvlm.study.running import answer_rows; answer_rows.ANSWER_TOKENS = 4; "
        "killed.run = partial(killed.run, answers=True); "
        "print(json.dumps(killed.main(12, int(sys.argv[2]), Path(sys.argv[1]))))"
    )
    assert killed("-c", code, str(tmp_path), str(int(time.time())))["kills"] >= 12
    assert pd.read_parquet(tmp_path / "whole" / "data" / "answer_tokens.parquet")["token"].max() == 3


@pytest.mark.kills
@pytest.mark.parametrize(("work", "kills"), [("result", 14), ("training", 14), ("conversion", 10)])
def test_other_work_that_is_killed_comes_to_the_same_bytes(work, kills):
    """A result saved over another, training as of the bundled models, a checkpoint's conversion."""
    report = killed(str(TESTS / "helpers" / "killed_writes.py"), work, str(kills), str(int(time.time())))
    assert report["kills"] >= kills
    assert report["undone"], "some came before the work was done"
