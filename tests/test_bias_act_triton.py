"""The Triton activation pass against fp64 truth, on a GPU, else in a process of Triton's interpreter; its plans."""

import interpreted
import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need Triton, which is optional")

from peft_kernels.kernels.bias_grad.configs import STEPS, act_floor_bytes, pick_act

if interpreted.INTERPRETED or torch.cuda.is_available():
    if interpreted.INTERPRETED:
        import interpreter

        interpreter.repair()
    from triton_act_cases import *  # noqa: F403 - the tests themselves, collected here
else:
    # triton reads TRITON_INTERPRET when a kernel is defined: too late in this process.
    @pytest.mark.parametrize("shard", ["test_values or test_repeats", "not test_values and not test_repeats"])
    def test_under_the_interpreter(shard):
        interpreted.check(__file__, shard)


SHAPES = [(1, 1), (17, 3), (1_000_000, 3), (8192, 4096), (8192, 128_256), (2**31, 1), (2**40, 8), (3, 2**31)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_plans(transposed, shape, dtype):
    """Roundings within what the bound allows, grids within a GPU's, tiles that a packed mask fits, the floor."""
    M, N = shape
    tile = pick_act(M, N, dtype, transposed)
    for block in (tile.block_m, tile.block_n):
        assert block & (block - 1) == 0 and block <= 512 // dtype.itemsize
    assert tile.block_n % 8 == 0 and tile.block_m * tile.block_n * dtype.itemsize <= 4096
    parts, columns = -(-M // tile.span), -(-N // tile.block_n)
    assert parts <= 65_535 and columns <= 2**31 - 1, "a grid's second and first axis"
    assert tile.span % (STEPS * tile.block_m) == 0 and tile.span >= 128 // (16 if N < 16 or transposed else 1)
    fp64 = tile.span / STEPS + parts
    assert (STEPS - 1 + 1 + 1) * 2**-24 + fp64 * 2**-53 <= 16 * 2**-24
    moved = 3 * M * N * dtype.itemsize
    assert moved <= act_floor_bytes(M, N, dtype, "gelu") <= moved + 4 * N
    assert act_floor_bytes(M, N, dtype, "relu", False) == (M + 1) * N * dtype.itemsize + M * -(-N // 8)
