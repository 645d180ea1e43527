"""Death at changes of storage with two processes that train together, each of them the one that dies."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
@pytest.mark.parametrize(("every", "least"), [(45, 2), pytest.param(2, 60, marks=pytest.mark.chaos)])
def test_two_ranks_and_each_of_them_dies(every, least):
    command = [sys.executable, "-m", "tests.contracts.two_ranks", str(every)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=590)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("PASS\t")] == []
    assert len(lines) >= least and {line.split("\t")[1] for line in lines} == {"0", "1"}
