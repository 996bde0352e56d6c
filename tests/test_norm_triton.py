"""The Triton norm against fp64 truth, on a GPU, else in a process that runs Triton's interpreter; its plans."""

import interpreted
import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need Triton, which is optional")

from norm_cases import Kind, data, given_statistics

from peft_kernels.kernels._shared import columns
from peft_kernels.kernels.norm import configs, triton_impl
from peft_kernels.kernels.norm.configs import (
    STEPS,
    fits_backward,
    fits_forward,
    pick_backward,
    pick_columns,
    pick_forward,
)

if interpreted.INTERPRETED or torch.cuda.is_available():
    if interpreted.INTERPRETED:
        import interpreter

        interpreter.repair()
    from triton_norm_cases import *  # noqa: F403 - the tests themselves, collected here
else:
    # triton reads TRITON_INTERPRET when a kernel is defined: too late in this process.
    @pytest.mark.parametrize("shard", ["test_values", "not test_values and not plans and not workspace"])
    def test_under_the_interpreter(shard):
        interpreted.check(__file__, shard)


ROWS, COLUMNS = (1, 17, 8192, 1_000_000, 2**31 - 1), (1, 3, 768, 4096, 5000, 16_384, 65_536, 1_000_003)


def _roundings(span: int, block_m: int, parts: int) -> float:
    """Worst case of a sum in fp32's u: a chain, the partial sum, the result, and an addition in fp64 for each chain."""
    return (STEPS - 1 + 1 + 1) + (span / STEPS + parts) * 2**-29


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("K", COLUMNS)
def test_plans(K, M):
    """Blocks are powers of two, grids within a GPU's, threads within what holds a row, sums within their 16 u."""
    tile = pick_forward(K)
    assert _power_of_two(tile.block_m) and _power_of_two(tile.block_k) and -(-M // tile.block_m) < 2**31
    assert (tile.block_k >= K) == fits_forward(K) and tile.block_m * tile.block_k <= 32 * 32 * tile.num_warps
    for sums in (0, 1, 2):
        if not fits_backward(K, sums):
            continue
        tile = pick_backward(M, K, sums)
        parts = -(-M // tile.span)
        assert tile.block_k >= K and _power_of_two(tile.block_m) and _power_of_two(tile.block_k)
        assert tile.span % tile.block_m == 0 and (not sums or parts <= 2048)
        assert tile.block_m * tile.block_k <= (8 if sums else 16) * 32 * tile.num_warps
        assert not sums or _roundings(tile.span, tile.block_m, parts) <= 16
    for dtype in (torch.float32, torch.bfloat16):
        for need_dx in (False, True):
            tile = pick_columns(M, K, dtype, need_dx)
            parts, blocks = -(-M // tile.span), -(-K // tile.block_k)
            assert _power_of_two(tile.block_m) and 16 <= tile.block_k <= 512 // dtype.itemsize
            assert parts <= 65_535 and parts * blocks <= 4096 + blocks
            assert _roundings(tile.span, tile.block_m, parts) <= 16


def test_floors():
    """What configs.py says of [8192, 4096] in bf16: 45 us forward and 67 us backward at 3.0 TB/s."""
    shape = 8192, 4096, torch.bfloat16
    assert configs.floor_bytes_forward(*shape) == 2 * 8192 * 4096 * 2 + 8 * 8192
    assert configs.floor_bytes_backward(*shape) == (3 * 8192 * 4096 + 2 * 4096) * 2 + 8 * 8192
    found = [configs.floor_bytes_forward(*shape), configs.floor_bytes_forward(*shape, residual=True)]
    found += [configs.floor_bytes_backward(*shape), configs.floor_bytes_backward(*shape, dtotal=True)]
    assert [round(size / 3.0e6) for size in found] == [45, 90, 67, 90]


@pytest.mark.parametrize("shape", [(0, 4), (6, 40), (700, 40), (40, 4100), (130, 17_000)], ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)], ids=str)
def test_the_declared_workspace_is_what_is_allocated(needed, rms, shape, monkeypatch):
    """With strided weights, which are copied; nothing is launched."""
    for module in (triton_impl, columns):
        monkeypatch.setattr(module, "launch", lambda *_: None)
    kind, made = Kind(rms=rms, residual=True), []
    one = data(*shape, torch.bfloat16, "cpu", kind)
    given, original, contiguous = given_statistics(one.x, one), torch.Tensor.new_empty, torch.Tensor.contiguous
    weight = one.weight.repeat_interleave(2)[::2]

    def counted(out: torch.Tensor) -> torch.Tensor:
        made.append(out.numel() * out.element_size())
        return out

    backward = one.dy, one.dtotal, one.x, *given, weight, rms, *map(bool, needed), torch.float32, one.x.dtype
    forward = one.x, one.residual, weight, one.bias, one.eps, rms, one.x.dtype
    for name, arguments in (("norm_bwd", backward), ("norm_fwd", forward)):
        declared, made[:] = getattr(triton_impl, f"{name}_workspace")(*arguments), []
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", lambda t, *size, **kind: counted(original(t, *size, **kind)))
            patch.setattr(torch.Tensor, "contiguous", lambda t: t if t.is_contiguous() else counted(contiguous(t)))
            outputs = getattr(triton_impl, name)(*arguments)
        if shape[0] and (name == "norm_fwd" or any(needed)):
            assert sum(made) == declared + sum(out.numel() * out.element_size() for out in outputs)
        else:  # the reference runs, which declares nothing
            assert declared == 0
