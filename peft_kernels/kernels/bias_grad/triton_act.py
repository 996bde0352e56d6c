"""relu_fwd and act_bwd in Triton: the mask in the pass that makes y; dz and the sums for dbias in one read of dy."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shared.columns import add_parts
from .._shared.dropout import load_mask
from .._shared.launch import Plan, cdiv, launch
from .._shared.tiles import is_transposed, load_tile
from . import activations
from .activations import TANH_CUBE, TANH_SCALE
from .configs import STEPS, pick_act

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_A, _AB = tl.constexpr(TANH_SCALE), tl.constexpr(TANH_SCALE * TANH_CUBE)
_LOG2_E = tl.constexpr(1.4426950408889634)
_DENSITY_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_GELU_FROM, _SILU_FROM = tl.constexpr(16.0), tl.constexpr(128.0)  # |z| from where exp gives 0


@triton.jit
def _half_erfcx(a):
    """0.5 erfcx(a / sqrt(2)) for a in [0, 16]: a polynomial of 1 / (1 + 0.35 a), fitted to 0.6 u; 6 u in fp32."""
    k = 1.0 / (1.0 + 0.35 * a)
    q = 0.14403160911228505 + k * -0.0291580299138995
    q = -0.25584039931902114 + k * q
    q = 0.15932124972036962 + k * q
    q = -0.0232133914272143 + k * q
    q = 0.10555292583144531 + k * q
    q = 0.11982118498067104 + k * q
    q = 0.13986352891811507 + k * q
    q = 0.13962130611063445 + k * q
    return k * q


@triton.jit
def _derivative(z, ACTIVATION: tl.constexpr):
    """act'(z) in fp32: g = act'(-|z|) below 0, else 1 - g. One exp and one division, no infinity times 0."""
    if ACTIVATION == "silu":
        a = tl.minimum(tl.abs(z), _SILU_FROM, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(-_LOG2_E * a)
        r = 1.0 / (1.0 + e)
        g = e * r * (1.0 - a * r)
    else:
        a = tl.minimum(tl.abs(z), _GELU_FROM, propagate_nan=tl.PropagateNan.ALL)
        if ACTIVATION == "gelu":
            e = tl.exp2((-0.5 * _LOG2_E) * (a * a))
            g = e * (_half_erfcx(a) - _DENSITY_0 * a)
        else:
            e = tl.exp2(-_LOG2_E * (a * (_A + _AB * (a * a))))
            r = 1.0 / (1.0 + e)
            g = e * r * (1.0 - a * (_A + 3 * _AB * (a * a)) * r)
    return tl.where(z < 0, g, 1.0 - g)


@triton.jit
def _act_bwd_kernel(
    dy_ptr, kept_ptr, dz_ptr, parts_ptr,
    M, N, stride_dym, stride_dyn, stride_keptm, stride_keptn, span,
    ACTIVATION: tl.constexpr, NEED_DZ: tl.constexpr, NEED_DBIAS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz = dy * act'(z), and parts[part, n] = its sum over rows [part * span, (part + 1) * span) before it is rounded.

    Sums are carried as _bias_grad_kernel carries them: STEPS tiles in fp32, then fp64.
    """
    pid_n, first = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * span
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(M - first, span).to(tl.int32)  # spans grow past that from 2**43 rows on
    dy_ptr += first * stride_dym
    kept_ptr += first * stride_keptm
    dz_ptr += first * N
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for chain in range(0, rows, STEPS * BLOCK_M):
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for row in range(chain, tl.minimum(chain + STEPS * BLOCK_M, rows), BLOCK_M):
            offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            dz = load_tile(dy_ptr, offs_m, offs_n, rows, N, stride_dym, stride_dyn).to(tl.float32)
            if ACTIVATION == "relu":
                passes = load_mask(kept_ptr, offs_m, pid_n * BLOCK_N, rows, N, BLOCK_M, BLOCK_N)
                dz = tl.where(passes, dz, 0.0)
            else:
                z = load_tile(kept_ptr, offs_m, offs_n, rows, N, stride_keptm, stride_keptn).to(tl.float32)
                dz *= _derivative(z, ACTIVATION)
            if NEED_DZ:
                inside = (offs_m[:, None] < rows) & (offs_n[None, :] < N)
                dz_ptrs = dz_ptr + offs_m[:, None] * N + offs_n[None, :]
                tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=inside)
            acc += dz
        if NEED_DBIAS:
            total += tl.sum(acc.to(tl.float64), axis=0)
    if NEED_DBIAS:
        parts_ptrs = parts_ptr + tl.program_id(1).to(tl.int64) * N + offs_n
        tl.store(parts_ptrs, total.to(tl.float32).to(parts_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit
def _relu_fwd_kernel(
    z_ptr, y_ptr, mask_ptr,
    M, N, stride_zm, stride_zn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of y = max(z, 0), NaN as it is, and the packed mask of what is not stopped."""
    tiles_n, row_bytes = tl.cdiv(N, BLOCK_N), tl.cdiv(N, 8)
    pid = tl.program_id(0).to(tl.int64)
    offs_m = (pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    z = load_tile(z_ptr, offs_m, offs_n, M, N, stride_zm, stride_zn)  # 0 outside: bits past N are 0
    stopped = z.to(tl.float32) <= 0.0
    inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], tl.where(stopped, 0.0, z).to(z.dtype), mask=inside)
    bits = tl.reshape(tl.where(stopped, 0, 1), (BLOCK_M, BLOCK_N // 8, 8)) << tl.arange(0, 8)[None, None, :]
    offs_b = (pid % tiles_n) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    inside = (offs_m[:, None] < M) & (offs_b[None, :] < row_bytes)
    tl.store(mask_ptr + offs_m[:, None] * row_bytes + offs_b[None, :], tl.sum(bits, axis=2).to(tl.uint8), mask=inside)


@lru_cache(maxsize=4096)
def _relu_plan(M: int, N: int, dtype: torch.dtype, transposed: bool) -> Plan:
    tile = pick_act(M, N, dtype, transposed)
    grid = cdiv(N, tile.block_n) * cdiv(M, tile.block_m), 1, 1
    return Plan(grid, {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}, tile.num_warps, 1)


@lru_cache(maxsize=4096)
def _act_plan(
    M: int, N: int, dtype: torch.dtype, transposed: bool, activation: str, need_dz: bool, need_dbias: bool, _out
) -> tuple[Plan, int]:
    tile = pick_act(M, N, dtype, transposed, activation == "relu" or not need_dz)
    grid = cdiv(N, tile.block_n), cdiv(M, tile.span), 1  # neighbours read neighbouring columns
    constants = {"ACTIVATION": activation, "NEED_DZ": need_dz, "NEED_DBIAS": need_dbias}
    constants |= {"STEPS": STEPS, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    return Plan(grid, constants, tile.num_warps, 1), tile.span


def relu_fwd(z: Tensor) -> tuple[Tensor, Tensor]:
    """Argument and results of activations.relu_fwd, which float64 and empty matrices run on any device."""
    if z.dtype not in _DTYPES or z.numel() == 0:
        return activations.relu_fwd(z)
    activations.check_relu(z)
    M, N = z.shape
    y, mask = z.new_empty(M, N), z.new_empty(M, cdiv(N, 8), dtype=torch.uint8)
    launch(_relu_fwd_kernel, _relu_plan(M, N, z.dtype, is_transposed(z)), (z,), (y, mask), (M, N, *z.stride()))
    return y, mask


def act_bwd(
    dy: Tensor, kept: Tensor, activation: str, need_dz: bool, need_dbias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Arguments and results of activations.act_bwd, which float64 and empty matrices run on any device."""
    if dy.dtype not in _DTYPES or dy.numel() == 0:
        return activations.act_bwd(dy, kept, activation, need_dz, need_dbias, dtype)
    activations.check(dy, kept, activation, dtype)
    M, N = dy.shape
    dz, dbias = dy.new_empty((M, N) if need_dz else (0,)), dy.new_empty(N if need_dbias else 0, dtype=dtype)
    if not (need_dz or need_dbias):
        return dz, dbias
    if activation == "relu":
        kept = kept.contiguous()  # as relu_fwd made it
    plan, span = _act_plan(M, N, dy.dtype, is_transposed(dy), activation, need_dz, need_dbias, dtype)
    parts = plan.grid[1]
    out = dy.new_empty((parts, N), dtype=torch.float32) if need_dbias and parts > 1 else dbias
    launch(_act_bwd_kernel, plan, (dy, kept), (dz, out), (M, N, *dy.stride(), *kept.stride(), span))
    if need_dbias and parts > 1:
        add_parts(out, dbias)
    return dz, dbias


def act_bwd_workspace(
    dy: Tensor, kept: Tensor, activation: str, need_dz: bool, need_dbias: bool, dtype: torch.dtype
) -> int:
    """Bytes of temporaries that act_bwd holds, from shape, strides and dtype only."""
    M, N = dy.shape
    if not need_dbias or dy.dtype not in _DTYPES or M == 0 or N == 0:
        return 0
    parts = cdiv(M, pick_act(M, N, dy.dtype, is_transposed(dy)).span)
    return 4 * parts * N if parts > 1 else 0
