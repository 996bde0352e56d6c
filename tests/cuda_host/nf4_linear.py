"""The 4-bit linear's CUDA kernels on a CPU: calls of their C API with the arguments of nf4_linear_fwd."""

import ctypes

import torch
from torch import Tensor

from .memory import Memory, at
from .nf4 import Weight, fields, in_both_orders, put_weight, raise_for

SOURCE = "csrc/nf4_linear/nf4_linear.cu"
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Linear(ctypes.Structure):
    """struct Nf4Linear of nf4_linear_cuda.h."""

    _fields_ = [("weight", Weight)] + fields(ctypes.c_void_p, "x", "bias", "addend", "y", "workspace")
    _fields_ += fields(ctypes.c_longlong, "M", "N", "K", "x_row", "x_column", "bias_step", "addend_row")
    _fields_ += fields(ctypes.c_longlong, "addend_column") + fields(ctypes.c_int, "dtype", "bias_dtype")


class NotTaken(RuntimeError):
    """What the kernels leave to others."""


def workspace_bytes(lib: ctypes.CDLL, args: Linear, sm_count: int) -> int:
    lib.nf4_linear_workspace.restype = ctypes.c_longlong
    return lib.nf4_linear_workspace(ctypes.byref(args), sm_count)


def most_rows(lib: ctypes.CDLL, dtype: torch.dtype) -> int:
    lib.nf4_linear_most_rows.restype = ctypes.c_longlong
    return lib.nf4_linear_most_rows(DTYPES[dtype])


def chunk(lib: ctypes.CDLL, N: int, K: int, dtype: torch.dtype, columns: bool) -> int:
    lib.nf4_linear_chunk.restype = ctypes.c_longlong
    return lib.nf4_linear_chunk(ctypes.c_longlong(N), ctypes.c_longlong(K), dtype.itemsize, columns)


def _place(device: Memory, values: Tensor) -> tuple[int, tuple[int, ...]]:
    """Address and strides of a copy: those of `values`, which starts on 16 bytes if `values` does."""
    own = values[tuple(slice(0, 1) if step == 0 else slice(None) for step in values.stride())]
    strides = tuple(max(1, step) for step in own.stride())
    if values.data_ptr() % 16 == 0:
        return at(device.put(own, strides, align=16)).value, values.stride()
    extent = 1 + sum((n - 1) * step for n, step in zip(own.shape, strides, strict=True))
    behind = device.empty((extent + 1,), values.dtype, align=16)[1:].as_strided(own.shape, strides)
    return at(behind.copy_(own)).value, values.stride()


def linear(
    lib, device: Memory, sm_count, x, packed, absmax, nested_absmax, nested_code, nested_offset, bias, addend,
    quant_type, blocksize, N,
) -> tuple[Tensor]:  # fmt: skip
    """The op nf4_linear_fwd; fresh outputs and workspace hold NaN, and nothing beside them may be written."""
    M, K = x.shape
    tensors = packed, absmax, nested_absmax, nested_code, nested_offset
    args = Linear(M=M, N=N, K=K, dtype=DTYPES.get(x.dtype, -1))
    args.weight = put_weight(device, tensors, quant_type, blocksize, N * K)
    args.bias_dtype = 0 if bias is None else DTYPES.get(bias.dtype, -1)
    if 0 in (M, N, K) or args.dtype < 0 or args.bias_dtype < 0 or not lib.nf4_linear_takes(ctypes.byref(args)):
        raise NotTaken(f"{M} {N} {K} {x.dtype} {blocksize}")
    args.x, (args.x_row, args.x_column) = _place(device, x)
    if bias is not None:
        args.bias, (args.bias_step,) = _place(device, bias)
    if addend is not None:
        args.addend, (args.addend_row, args.addend_column) = _place(device, addend)
    y = device.empty((M, N), x.dtype)
    workspace = device.empty((workspace_bytes(lib, args, sm_count) // 4,), torch.float32)
    args.y, args.workspace = at(y).value, at(workspace).value
    raise_for(lib, lib.nf4_linear_cuda(ctypes.byref(args), sm_count, None))
    return (y,)


def forward(lib: ctypes.CDLL, sm_count: int = 4):
    """The op, run in both orders of threads and blocks."""
    return lambda *args: in_both_orders(lib, linear, sm_count, *args)[0]
