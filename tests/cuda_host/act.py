"""The activation pass's CUDA kernels on a CPU: calls of their C API, as the two ops that tests/act_checks.py checks."""

import ctypes

import torch
from torch import Tensor

from .memory import Memory, at

SOURCE = "csrc/bias_grad/act.cu"
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}


class ActBwd(ctypes.Structure):
    """struct ActBwd of act_cuda.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("dy", "kept", "dz", "dbias", "workspace")]
    _fields_ += [(name, ctypes.c_longlong) for name in ("M", "N", "dy_row", "dy_column", "kept_row", "kept_column")]
    _fields_ += [(name, ctypes.c_int) for name in ("activation", "dtype", "dbias_fp32")]


class ReluFwd(ctypes.Structure):
    """struct ReluFwd of act_cuda.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("z", "y", "mask")]
    _fields_ += [(name, ctypes.c_longlong) for name in ("M", "N", "row", "column")]
    _fields_ += [("dtype", ctypes.c_int)]


def call(dy: Tensor, kept: Tensor, activation: str, fp32: bool) -> ActBwd:
    strides = (*dy.stride(), *kept.stride())
    kinds = ACTIVATIONS[activation], DTYPES[dy.dtype], int(fp32)
    return ActBwd(at(dy), at(kept), None, None, None, *dy.shape, *strides, *kinds)


def workspace_bytes(lib: ctypes.CDLL, args: ActBwd, sm_count: int) -> int:
    lib.act_bwd_workspace.restype = ctypes.c_longlong
    return lib.act_bwd_workspace(ctypes.byref(args), sm_count)


def _raise_for(lib: ctypes.CDLL, code: int) -> None:
    if code != 0:
        raise RuntimeError(f"error {code}: {lib.simt_error().decode()}")


def act_bwd(
    lib: ctypes.CDLL,
    device: Memory,
    dy: Tensor,
    kept: Tensor,
    activation: str,
    need_dz: bool,
    need_dbias: bool,
    dtype: torch.dtype,
    sm_count: int = 2,
) -> tuple[Tensor, Tensor]:
    """The op of that name, for dy and kept in `device`; fresh outputs and workspace hold NaN."""
    args = call(dy, kept, activation, dtype == torch.float32)
    dz = device.empty(dy.shape if need_dz else (0,), dy.dtype, align=16)
    dbias = device.empty((dy.shape[1] if need_dbias else 0,), dtype)
    args.dz, args.dbias = at(dz) if need_dz else None, at(dbias) if need_dbias else None
    workspace = device.empty((workspace_bytes(lib, args, sm_count) // 4,), torch.float32)
    args.workspace = at(workspace)
    _raise_for(lib, lib.act_bwd_cuda(ctypes.byref(args), sm_count, None))
    return dz, dbias


def relu_fwd(lib: ctypes.CDLL, device: Memory, z: Tensor, sm_count: int = 2) -> tuple[Tensor, Tensor]:
    """The op of that name, for z in `device`; every byte of the mask is 0xff before."""
    M, N = z.shape
    y = device.empty((M, N), z.dtype, align=16)
    mask = device.put(torch.full((M, -(-N // 8)), 255, dtype=torch.uint8))
    args = ReluFwd(at(z), at(y), at(mask), M, N, *z.stride(), DTYPES[z.dtype])
    _raise_for(lib, lib.relu_fwd_cuda(ctypes.byref(args), sm_count, None))
    return y, mask
