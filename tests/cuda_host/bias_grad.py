"""The bias gradient's CUDA kernels on a CPU: a call of their C API, and the layouts of dy that its tests go through."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from .memory import Memory, at

SOURCE = "csrc/bias_grad/bias_grad.cu"
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class _Call(ctypes.Structure):
    """struct BiasGrad of bias_grad_cuda.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("dy", "dbias", "workspace")]
    _fields_ += [(name, ctypes.c_longlong) for name in ("M", "N", "row_stride", "column_stride")]
    _fields_ += [("dtype", ctypes.c_int), ("dbias_fp32", ctypes.c_int)]


def call(dy: Tensor, fp32: bool) -> _Call:
    dbias_fp32 = int(fp32)
    return _Call(at(dy), None, None, *dy.shape, *dy.stride(), DTYPES[dy.dtype], dbias_fp32)


def workspace_bytes(lib: ctypes.CDLL, args: _Call, sm_count: int) -> int:
    lib.bias_grad_workspace.restype = ctypes.c_longlong
    return lib.bias_grad_workspace(ctypes.byref(args), sm_count)


def bias_grad(lib: ctypes.CDLL, device: Memory, dy: Tensor, dtype: torch.dtype, sm_count: int) -> Tensor:
    """dbias [N] in `dtype` of dy [M, N], which lies in `device`; fresh outputs and workspace hold NaN."""
    args = call(dy, dtype == torch.float32)
    workspace = device.empty((workspace_bytes(lib, args, sm_count) // 4,), torch.float32)
    dbias = device.empty((dy.shape[1],), dtype)
    args.workspace, args.dbias = at(workspace), at(dbias)
    code = lib.bias_grad_cuda(ctypes.byref(args), sm_count, None)
    if code != 0:
        raise RuntimeError(f"error {code}: {lib.simt_error().decode()}")
    return dbias


def _contiguous(device: Memory, values: Tensor) -> Tensor:
    return device.put(values, align=16)


def _unaligned(device: Memory, values: Tensor) -> Tensor:
    """Contiguous, starting one element behind a multiple of 16 bytes."""
    M, N = values.shape
    return device.put(torch.cat([values.new_zeros(1), values.flatten()]), align=16)[1:].view(M, N)


def _padded(device: Memory, values: Tensor) -> Tensor:
    """Rows 16 elements further apart than N rounded up to 8: on 16 bytes."""
    return device.put(values, strides=((values.shape[1] + 7) // 8 * 8 + 16, 1), align=16)


def _odd_rows(device: Memory, values: Tensor) -> Tensor:
    return device.put(values, strides=(values.shape[1] + 1, 1), align=16)


def _transposed(device: Memory, values: Tensor) -> Tensor:
    return device.put(values, strides=(1, max(1, values.shape[0])))


def _spread(device: Memory, values: Tensor) -> Tensor:
    """Every third column of every row."""
    return device.put(values, strides=(3 * values.shape[1] + 2, 3))


def _one_row(device: Memory, values: Tensor) -> Tensor:
    """The first row, expanded: a row stride of 0."""
    return device.put(values[:1], align=16).expand(values.shape)


LAYOUTS: dict[str, Callable[[Memory, Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "unaligned": _unaligned,
    "padded": _padded,
    "odd_rows": _odd_rows,
    "transposed": _transposed,
    "spread": _spread,
    "one_row": _one_row,
}
