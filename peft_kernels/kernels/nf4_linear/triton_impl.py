"""nf4_linear_fwd and nf4_linear_bwd in Triton: which path runs a call, and the temporaries it takes."""

from functools import lru_cache

import torch
from torch import Tensor

from .._shared import nf4
from .._shared.launch import Plan, arch_of, cdiv, launch
from . import reference
from .configs import Rows, chunk_columns, chunk_lines, pick_rows
from .triton_rows import _nf4_rows_kernel, _nf4_sum_kernel

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_SUM_TILE = {"BLOCK_M": 4, "BLOCK_N": 128}


@lru_cache(maxsize=4096)
def _rows_plan(N: int, K: int, rows: Rows, settings: tuple, bias: bool, addend: bool, *_dtypes: torch.dtype) -> Plan:
    quant_type, blocksize, nested = settings
    constants = {"FP4": quant_type == "fp4", "NESTED": nested, "BLOCKSIZE": blocksize, "BIAS": bias, "ADDEND": addend}
    constants |= {"GROUP": rows.group, "BLOCK_M": rows.block_m, "BLOCK_N": rows.block_n, "BLOCK_K": rows.block_k}
    grid = cdiv(N, rows.block_n), cdiv(K, rows.span), 1
    return Plan(grid, constants | nf4.UNFUSED, rows.num_warps, rows.num_stages)


@lru_cache(maxsize=4096)
def _sum_plan(M: int, N: int, bias: bool, addend: bool, *_dtypes: torch.dtype) -> Plan:
    grid = cdiv(N, _SUM_TILE["BLOCK_N"]), cdiv(M, _SUM_TILE["BLOCK_M"]), 1
    return Plan(grid, {"BIAS": bias, "ADDEND": addend} | _SUM_TILE, 4, 1)


def _few_rows(
    x: Tensor, weight: list, bias: Tensor | None, addend: Tensor | None, settings: tuple, y: Tensor, rows: Rows
) -> Tensor:
    (M, K), N = x.shape, y.shape[1]
    parts = cdiv(K, rows.span)
    strides = (0, 0) if addend is None else addend.stride()
    epilogue = x if bias is None else bias, x if addend is None else addend
    beside = bias is not None, addend is not None
    dtypes = tuple(t.dtype for t in epilogue)
    split = parts > 1
    out = x.new_empty((parts, M, N), dtype=torch.float32) if split else y
    plan = _rows_plan(N, K, rows, settings, *(not split and there for there in beside), x.dtype, *dtypes)
    scalars = (M, N, K // 2, *x.stride(), *strides, rows.span // 2)
    launch(_nf4_rows_kernel, plan, (x, *nf4.weight_inputs(weight), *epilogue), (out,), scalars)
    if split:
        plan = _sum_plan(M, N, *beside, x.dtype, *dtypes)
        launch(_nf4_sum_kernel, plan, (out, *epilogue), (y,), (parts, M, N, *strides))
    return y


def _for_blas(matrix: Tensor) -> Tensor:
    """`matrix`, or a copy where a BLAS could not read it in place and torch.mm would make one."""
    return matrix.contiguous() if _copied_bytes(matrix) else matrix


def _copied_bytes(matrix: Tensor) -> int:
    (rows, cols), (down, along) = matrix.shape, matrix.stride()
    if (along == 1 and down >= cols) or (down == 1 and along >= rows) or matrix.is_contiguous():
        return 0
    return matrix.numel() * matrix.element_size()


def _multiply(left: Tensor, right: Tensor, added: Tensor | None, out: Tensor) -> None:
    """out = left @ right + added, rounded once; out may be some columns of a matrix, in which cuBLAS writes as well."""
    if added is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(added, left, right, out=out)


def nf4_linear_fwd(x: Tensor, *args) -> Tensor:
    """Arguments and result of reference.nf4_linear_fwd, which float64 and empty matrices run on any device."""
    *weight, bias, addend, quant_type, blocksize, N = args
    if x.dtype not in _DTYPES or x.numel() == 0 or N == 0:
        return reference.nf4_linear_fwd(x, *args)
    reference.check_forward(x, *args)
    M, K = x.shape
    y = x.new_empty(M, N)
    rows = pick_rows(M, N, K, blocksize, x.dtype, arch_of(x.device))
    if rows is not None:
        bias = None if bias is None else bias.contiguous()
        return _few_rows(x, weight, bias, addend, (quant_type, blocksize, weight[2] is not None), y, rows)
    x, bias = _for_blas(x), None if bias is None else bias.to(x.dtype)
    if addend is not None and bias is not None:
        bias, addend = None, torch.add(addend, bias, out=y)  # rounded, as the reference does
    lines = chunk_lines(N, K, x.dtype)
    buffer = x.new_empty(lines * K)
    for first in range(0, N, lines):
        last = min(first + lines, N)
        values = nf4.dequantize(weight, quant_type, blocksize, buffer[: (last - first) * K].view(1, -1), first * K)
        added = bias[first:last] if bias is not None else None if addend is None else addend[:, first:last]
        _multiply(x, values.view(-1, K).t(), added, y[:, first:last])
    return y


def nf4_linear_bwd(dy: Tensor, *args) -> Tensor:
    """Arguments and result of reference.nf4_linear_bwd, which float64 and empty matrices run on any device."""
    *weight, addend, quant_type, blocksize, K = args
    if dy.dtype not in _DTYPES or dy.numel() == 0 or K == 0:
        return reference.nf4_linear_bwd(dy, *args)
    reference.check_backward(dy, *args)
    dy, N = _for_blas(dy), dy.shape[1]
    dx = dy.new_empty(dy.shape[0], K)
    lines = chunk_columns(N, K, dy.dtype)
    buffer = dy.new_empty(N * lines)
    for first in range(0, K, lines):
        last = min(first + lines, K)
        values = buffer[: N * (last - first)].view(1 if lines == K else N, -1)
        nf4.dequantize(weight, quant_type, blocksize, values, first, K)
        added = None if addend is None else addend[:, first:last]
        _multiply(dy, values.view(N, -1), added, dx[:, first:last])
    return dx


def nf4_linear_fwd_workspace(x: Tensor, *args) -> int:
    """Most bytes of temporaries that nf4_linear_fwd holds at a time, from shapes, strides and dtypes only."""
    *_, bias, _, _, blocksize, N = args
    M, K = x.shape
    if x.dtype not in _DTYPES or 0 in (M, N, K):
        return 0
    rows = pick_rows(M, N, K, blocksize, x.dtype, arch_of(x.device))
    if rows is not None:
        parts = cdiv(K, rows.span)
        return (4 * parts * M * N if parts > 1 else 0) + (0 if bias is None else _bias_copy(bias, bias.dtype))
    copies = _copied_bytes(x) + (0 if bias is None else _bias_copy(bias, x.dtype))
    return chunk_lines(N, K, x.dtype) * K * x.element_size() + copies


def _bias_copy(bias: Tensor, dtype: torch.dtype) -> int:
    if bias.dtype != dtype:
        return bias.numel() * dtype.itemsize
    return 0 if bias.is_contiguous() else bias.numel() * dtype.itemsize


def nf4_linear_bwd_workspace(dy: Tensor, *args) -> int:
    """Most bytes of temporaries that nf4_linear_bwd holds at a time, from shapes, strides and dtypes only."""
    (M, N), K = dy.shape, args[-1]
    if dy.dtype not in _DTYPES or 0 in (M, N, K):
        return 0
    return N * chunk_columns(N, K, dy.dtype) * dy.element_size() + _copied_bytes(dy)
