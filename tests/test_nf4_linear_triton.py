"""The Triton 4-bit linear against fp64 truth, on a GPU, else in a process that runs Triton's interpreter; its plans."""

import interpreted
import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need Triton, which is optional")

from peft_kernels._core.parts import PARTS
from peft_kernels.formats.nf4 import BLOCKSIZES
from peft_kernels.kernels.nf4_linear import configs
from peft_kernels.kernels.nf4_linear.configs import chunk_lines, floor_bytes, pick_rows, seconds

if interpreted.INTERPRETED or torch.cuda.is_available():
    if interpreted.INTERPRETED:
        import interpreter

        interpreter.repair()
    from triton_nf4_linear_cases import *  # noqa: F403 - the tests themselves, collected here
else:
    # triton reads TRITON_INTERPRET when a kernel is defined: too late in this process.
    @pytest.mark.parametrize("shard", ["check_long_sums or few_rows", "not check_long_sums and not few_rows"])
    def test_under_the_interpreter(shard):
        interpreted.check(__file__, shard)


SHAPES = [(64, 64), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (128_256, 4096), (1, 1_000_000), (70, 96)]


@pytest.mark.parametrize("arch", PARTS)
def test_plans_of_few_rows(arch):
    """Powers of two, spans of whole tiles, at least four programs for each SM unless a part would be too short."""
    for N, K in SHAPES:
        for M in (1, 16, 17, 32):
            for blocksize in BLOCKSIZES:
                rows = pick_rows(M, N, K, blocksize, torch.bfloat16, arch)
                assert rows.block_m >= M and rows.block_m in (16, 32)
                assert K % rows.group == 0 and blocksize % rows.group == 0 and 32 <= rows.group <= rows.block_k
                assert rows.span % rows.block_k == 0 and rows.span >= min(K, 512)
                parts, tiles = -(-K // rows.span), -(-N // rows.block_n)
                assert parts <= 65_535 and parts * tiles <= max(tiles, 4 * PARTS[arch].sms)


@pytest.mark.parametrize("arch", PARTS)
def test_the_model_chooses(arch):
    """Few rows up to 32 everywhere; at 64 whichever it says, and nothing past that."""
    for N, K in SHAPES:
        for M in (1, 16, 32, 64):
            modelled = seconds(M, N, K, 64, torch.bfloat16, PARTS[arch])
            faster = modelled["rows"] <= modelled["chunks"]
            assert faster == (pick_rows(M, N, K, 64, torch.bfloat16, arch) is not None) and (faster or M == 64)


def test_what_few_rows_leave_to_chunks():
    for M, K, dtype in ((65, 4096, torch.bfloat16), (1, 4080, torch.float16), (1, 4096, torch.float32)):
        assert pick_rows(M, 4096, K, 64, dtype, 90) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks(dtype):
    """All of it or equal chunks of whole tiles, in as many bytes as are planned with and one more tile of lines."""
    for N, K in SHAPES:
        for lines, length in ((N, K), (K, N)):
            each = chunk_lines(lines, length, dtype)
            assert each == lines or each % 256 == 0
            assert (each - 256) * length * dtype.itemsize <= configs.CHUNK_BYTES
    assert chunk_lines(4096, 4096, torch.bfloat16) == 2048 and chunk_lines(1024, 4096, torch.bfloat16) == 1024


def test_floors():
    assert floor_bytes(0, 4096, 4096, 64, False, torch.bfloat16) == 4096 * 4096 * 4.5 / 8
    assert floor_bytes(3, 64, 64, 64, True, torch.float32) == 2048 + 64 + 4 * 258 + 4 * 3 * 128
