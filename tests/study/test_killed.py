"""A study that is killed at any moment comes to the same tables as one that was left alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.kills
def test_killed_at_any_moment_its_tables_are_those_of_a_study_that_was_left_alone():
    """52 kills with SIGKILL, at random times and at random steps on the disk.

    The tables are the same byte for byte, and no other file is left over.
    """
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / "killed.py"), "52", str(int(time.time()))], capture_output=True,
        text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= 52
    assert len(report["where"]) >= 4, "they fell in different places"
