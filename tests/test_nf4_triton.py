"""The Triton quantisers against the reference, on a GPU, else in a process that runs Triton's interpreter; floors."""

import interpreted
import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need Triton, which is optional")

from peft_kernels.formats.nf4 import BLOCKSIZES
from peft_kernels.kernels._shared import nf4 as shared
from peft_kernels.kernels.nf4 import configs

if interpreted.INTERPRETED or torch.cuda.is_available():
    if interpreted.INTERPRETED:
        import interpreter

        interpreter.repair()
    from triton_nf4_cases import *  # noqa: F403 - the tests themselves, collected here
else:
    # triton reads TRITON_INTERPRET when a kernel is defined: too late in this process.
    @pytest.mark.parametrize("shard", ["test_dequantize", "not test_dequantize"])
    def test_under_the_interpreter(shard):
        interpreted.check(__file__, shard)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_plans(blocksize):
    """Whole blocks, powers of two; a thread's elements have one scale and leave in one 16-byte store."""
    each = configs.blocks_per_program(blocksize)
    assert each & (each - 1) == 0 and each * blocksize == 4096
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tile = shared.pick_tile(dtype)
        assert tile.group * dtype.itemsize == 16 and blocksize % tile.group == 0 and tile.elements % tile.group == 0


def test_floors():
    """4.5 bits an element, 4.127 with nested scales, and what is read or written beside them."""
    n = 4096 * 4096
    assert configs.quantize_floor_bytes(n, 64, torch.bfloat16) == 2 * n + 4.5 * n / 8
    assert configs.dequantize_floor_bytes(n, 64, False, torch.float32) == 4 * n + 4.5 * n / 8
    nested = configs.dequantize_floor_bytes(n, 64, True, torch.bfloat16) - 2 * n
    assert nested == n / 2 + n / 64 + 4 * (n / 64 / 256 + 257)
    assert configs.scales_floor_bytes(512) == 9 * 512 + 4 * (2 + 257)
