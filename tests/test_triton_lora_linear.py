"""The Triton LoRA linear against fp64 truth: here on a GPU, else in processes that run Triton's interpreter."""

import interpreted
import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need Triton, which is optional")

if interpreted.INTERPRETED or torch.cuda.is_available():
    if interpreted.INTERPRETED:
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
        interpreted.check(__file__, shard)
