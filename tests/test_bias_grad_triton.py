"""The Triton bias_grad against fp64 truth, on a GPU, else in a process that runs Triton's interpreter; its plans."""

import interpreted
import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need Triton, which is optional")

from peft_kernels.kernels._shared.columns import pick_sum
from peft_kernels.kernels.bias_grad.configs import STEPS, floor_bytes, pick_config

if interpreted.INTERPRETED or torch.cuda.is_available():
    if interpreted.INTERPRETED:
        import interpreter

        interpreter.repair()
    from triton_bias_grad_cases import *  # noqa: F403 - the tests themselves, collected here
else:
    # triton reads TRITON_INTERPRET when a kernel is defined: too late in this process.
    @pytest.mark.parametrize("shard", ["check_layouts or check_sizes", "not check_layouts and not check_sizes"])
    def test_under_the_interpreter(shard):
        interpreted.check(__file__, shard)


SHAPES = [(1, 1), (17, 3), (1_000_000, 3), (8192, 4096), (8192, 128_256), (2**31, 1), (2**40, 8), (3, 2**31)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_plans(transposed, shape, dtype):
    """Roundings within what configs.py promises, grids within a GPU's, lines of a warp 512 bytes long."""
    M, N = shape
    tile = pick_config(M, N, dtype, transposed)
    line, lines = (tile.block_m, tile.block_n) if transposed else (tile.block_n, tile.block_m)
    for block, most in ((lines, 128), (line, 512 // dtype.itemsize)):
        assert block & (block - 1) == 0 and 16 <= block <= most
    parts, columns = -(-M // tile.span), -(-N // tile.block_n)
    assert parts <= 65_535 and columns <= 2**31 - 1, "a grid's second and first axis"
    assert parts * columns <= 4096 + columns
    assert pick_sum(N).block_p * pick_sum(N).block_n == 2048
    # A program's span is cut into chains that are added in fp64, and so are the parts: 2**-53 for each addition.
    fp64 = tile.span / STEPS + parts
    assert (STEPS - 1 + 1 + 1) * 2**-24 + fp64 * 2**-53 <= 16 * 2**-24
    assert tile.span >= min(M, 256) and floor_bytes(M, N, dtype) == (M + 1) * N * dtype.itemsize
