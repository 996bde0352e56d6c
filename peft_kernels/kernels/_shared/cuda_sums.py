"""What the CUDA kernels hold of partial sums, for WORKSPACE: upper bounds, as their grids follow the GPU's SMs.

A wave of blocks keeps one fp32 sum for every column that its threads read: csrc/common/column_sum_launch.cuh and
csrc/norm/norm_bwd.cu make the plans, tests/test_cuda_host_workspace.py holds these to them. For GPUs whose blocks may
have 99 KB of shared memory, as all have from compute capability 8.0 on. float64 runs none of these kernels.
"""

import torch

from .launch import cdiv

_SMS = 192  # more than any GPU has: an H100 132, a B200 148, an RTX PRO 6000 Blackwell 188
_LOAD_BYTES = 16
_COLUMN_SUM_BLOCKS, _COLUMN_SUM_LANES = 4 * 3, 32  # of an SM in four waves, and threads side by side in each
_LEAST_ROWS = 64  # of a part: 8 for each of the 8 threads along them
_NORM_THREADS, _NORM_SPAN = 512, 512  # of an SM, and threads that share a row at most
_NORM_MOST_LOADS = 2  # of a row by a thread that carries sums; of longer rows the sums are a pass by columns
_NORM_LEAST_ROWS = 4  # of a part
_NF4_MOST_SIMT_ROWS = 2
_NF4_BLOCKS, _NF4_BLOCK_ROWS, _NF4_STEP = 2, 128, 256  # of an SM; rows and columns of the weight at once
_NF4_CHAIN = 96  # blocks of weights in one sum


def column_sums(M: int, N: int, dtype: torch.dtype) -> int:
    """Bytes of bias_grad's and act_bwd's partial sums of [M, N], at most."""
    if dtype == torch.float64:
        return 0
    wave = _SMS * _COLUMN_SUM_BLOCKS * _COLUMN_SUM_LANES * (_LOAD_BYTES // dtype.itemsize)
    return 4 * min(cdiv(M, _LEAST_ROWS) * N, wave + N)


def norm_sums(M: int, K: int, sums: int, dtype: torch.dtype) -> int:
    """Bytes of norm_bwd's partial sums, `sums` (0, 1 or 2) of each column of [M, K] of x, at most."""
    if dtype == torch.float64:
        return 0
    load = _LOAD_BYTES // dtype.itemsize
    loads = min(cdiv(K, load * _NORM_SPAN), _NORM_MOST_LOADS)
    return 4 * sums * min(cdiv(M, _NORM_LEAST_ROWS) * K, _SMS * _NORM_THREADS * load * loads + K)


def nf4_parts(M: int, N: int, K: int, blocksize: int, dtype: torch.dtype) -> int:
    """Bytes of the sums of the parts of K of nf4_linear_fwd's kernels for few rows, at most."""
    if dtype in (torch.float64, torch.float32) or M <= _NF4_MOST_SIMT_ROWS:
        return 0
    enough = min(_NF4_BLOCKS * _SMS // max(1, cdiv(N, _NF4_BLOCK_ROWS)), K // (16 * M), cdiv(K, _NF4_STEP))
    parts = max(enough, cdiv(K, _NF4_CHAIN * min(64, blocksize)))
    return 4 * parts * M * N if parts > 1 else 0
