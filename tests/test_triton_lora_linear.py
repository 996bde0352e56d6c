"""The Triton LoRA linear against fp64 truth: here on a GPU, else in processes that run Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need Triton, which is optional")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED or torch.cuda.is_available():
    if INTERPRETED:
        import interpreter

        interpreter.repair()
    from triton_lora_linear_cases import *  # noqa: F403 - the tests themselves, collected here
else:
    # triton reads TRITON_INTERPRET when a kernel is defined: too late in this process. Shards let xdist share the work.
    SHARDS = (
        "test_values and k_extension and float32",
        "test_values and beta_one and float32",
        "test_values and k_extension and not float32",
        "test_values and beta_one and not float32",
        "test_small_tiles or long_sums",
        "not test_values and not test_small_tiles and not long_sums",
    )

    @pytest.mark.parametrize("shard", SHARDS)
    def test_under_the_interpreter(shard):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-k", shard, "-p", "no:cacheprovider"],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
