"""LayerNorm's and RMSNorm's CUDA kernels on a CPU: calls of their C API with the ops' arguments."""

import ctypes

import torch
from norm_cases import Run
from torch import Tensor

from .memory import Memory, at, memory

FORWARD, BACKWARD = "csrc/norm/norm_fwd.cu", "csrc/norm/norm_bwd.cu"
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def _fields(kind, *names: str) -> list:
    return [(name, kind) for name in names]


class Forward(ctypes.Structure):
    """struct NormForward of norm_cuda.h."""

    _fields_ = _fields(ctypes.c_void_p, "x", "residual", "weight", "bias", "y", "total", "mean", "rstd")
    _fields_ += _fields(ctypes.c_longlong, "M", "K", "x_row_stride", "residual_row_stride")
    _fields_ += _fields(ctypes.c_float, "eps")
    _fields_ += _fields(ctypes.c_int, "dtype", "weight_dtype", "bias_dtype", "y_fp32", "rms")


class Backward(ctypes.Structure):
    """struct NormBackward of norm_cuda.h."""

    _fields_ = _fields(ctypes.c_void_p, "dy", "dtotal", "x", "weight", "mean", "rstd", "dx", "dweight", "dbias")
    _fields_ += _fields(ctypes.c_void_p, "workspace")
    _fields_ += _fields(ctypes.c_longlong, "M", "K", "dy_row_stride", "dtotal_row_stride", "x_row_stride")
    _fields_ += _fields(ctypes.c_int, "dtype", "dy_fp32", "weight_dtype", "sums_fp32", "rms")
    _fields_ += _fields(ctypes.c_int, "need_dx", "need_dweight", "need_dbias")


class Gpu(ctypes.Structure):
    """struct NormGpu of norm_cuda.h."""

    _fields_ = _fields(ctypes.c_int, "sm_count", "shared_bytes")


class NotTaken(RuntimeError):
    """What the kernels leave to others."""


H100 = 227 << 10
"""Bytes of shared memory that a block may ask for."""


_FAR = 2**31


def _put(device: Memory, args: ctypes.Structure, **tensors: Tensor | None) -> None:
    """Hands copies to the call: on 16 bytes, matrices with the strides they have, parameters with their dtype.

    Rows gigabytes apart, of a sparse file, are handed over themselves: memory for a copy is filled to the last byte.
    """
    for name, values in tensors.items():
        if values is None:
            continue
        if values.stride(-1) != 1 or values.dtype not in DTYPES:
            raise NotTaken(f"{name} is {values.dtype}, strides {values.stride()}")
        own = values[:1] if values.stride(0) == 0 else values  # one row, expanded
        far = own.dim() == 2 and own.stride(0) >= _FAR
        setattr(args, name, at(own if far else device.put(own, own.stride(), align=16)))
        if values.dim() == 2:
            setattr(args, f"{name}_row_stride", values.stride(0))
        elif hasattr(args, f"{name}_dtype"):
            setattr(args, f"{name}_dtype", DTYPES[values.dtype])


def _out(device: Memory, args: ctypes.Structure, name: str, size: tuple, dtype: torch.dtype) -> Tensor:
    out = device.empty(size, dtype, align=16)
    if 0 not in size:
        setattr(args, name, at(out))
    return out


def _launch(lib: ctypes.CDLL, name: str, args: ctypes.Structure, *more) -> None:
    if not getattr(lib, f"{name}_takes")(ctypes.byref(args)):
        raise NotTaken(name)
    code = getattr(lib, f"{name}_cuda")(ctypes.byref(args), *more, None)
    if code != 0:
        raise RuntimeError(f"error {code}: {lib.simt_error().decode()}")


def norm_fwd(lib, x, residual, weight, bias, eps, rms, dtype) -> list[Tensor]:
    """The op norm_fwd; fresh outputs hold NaN before the call, and nothing beside them may be written."""
    (M, K), none = x.shape, (0,)
    with memory(lib) as device:
        args = Forward(M=M, K=K, eps=eps, dtype=DTYPES[x.dtype], y_fp32=dtype == torch.float32, rms=rms)
        _put(device, args, x=x, residual=residual, weight=weight, bias=bias)
        outputs = [
            _out(device, args, "y", (M, K), dtype),
            _out(device, args, "total", none if residual is None else (M, K), x.dtype),
            _out(device, args, "mean", none if rms else (M,), torch.float32),
            _out(device, args, "rstd", (M,), torch.float32),
        ]
        _launch(lib, "norm_fwd", args)
        return [out.clone() for out in outputs]


def workspace_bytes(lib: ctypes.CDLL, args: Backward, gpu: Gpu) -> int:
    lib.norm_bwd_workspace.restype = ctypes.c_longlong
    return lib.norm_bwd_workspace(ctypes.byref(args), ctypes.byref(gpu))


def norm_bwd(
    lib, gpu, dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias, dtype, dx_dtype
) -> list[Tensor]:  # fmt: skip
    """The op norm_bwd ; outputs and workspace hold NaN before the call."""
    (M, K), none = dy.shape, (0,)
    with memory(lib) as device:
        args = Backward(M=M, K=K, dtype=DTYPES[dx_dtype], rms=rms, sums_fp32=dtype == torch.float32)
        args.dy_fp32 = dy.dtype == torch.float32
        args.need_dx, args.need_dweight, args.need_dbias = need_dx, need_dweight, need_dbias
        _put(device, args, dy=dy, dtotal=dtotal, x=x, mean=mean, rstd=rstd, weight=weight)
        outputs = [
            _out(device, args, "dx", (M, K) if need_dx else none, dx_dtype),
            _out(device, args, "dweight", (K,) if need_dweight else none, dtype),
            _out(device, args, "dbias", (K,) if need_dbias else none, dtype),
        ]
        _out(device, args, "workspace", (workspace_bytes(lib, args, gpu) // 4,), torch.float32)
        _launch(lib, "norm_bwd", args, ctypes.byref(gpu))
        return [out.clone() for out in outputs]


def _in_both_orders(lib: ctypes.CDLL, op, *args) -> list[Tensor]:
    """No order of threads and blocks changes a bit."""
    results = []
    for reverse in (0, 1):
        lib.simt_reverse(reverse)
        try:
            results.append(op(lib, *args))
        finally:
            lib.simt_reverse(0)
    same = [torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*results, strict=True)]
    assert all(same), f"the result depends on the order of threads or blocks: {same}"
    return results[0]


def run_on(forward: ctypes.CDLL, backward: ctypes.CDLL, sm_count: int = 2, shared_bytes: int = H100) -> Run:
    gpu = Gpu(sm_count, shared_bytes)
    return Run(
        lambda *args: _in_both_orders(forward, norm_fwd, *args),
        lambda *args: _in_both_orders(backward, norm_bwd, gpu, *args),
    )
