"""Runs a test file in a process of Triton's interpreter, as TRITON_INTERPRET is read when a kernel is defined."""

import os
import subprocess
import sys
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check(file: str, shard: str) -> None:
    """Fail unless the tests of `file` that pytest's -k `shard` chooses pass there."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-q", "-x", "-k", shard, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(file).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
