"""The 4-bit formats' CUDA kernels on a CPU: calls of their C API with the ops' arguments."""

import ctypes

import torch
from torch import Tensor

from .memory import Memory, at, memory

DEQUANTIZE, QUANTIZE = "csrc/nf4/nf4_dequantize.cu", "csrc/nf4/nf4_quantize.cu"
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def fields(kind, *names: str) -> list:
    return [(name, kind) for name in names]


class Weight(ctypes.Structure):
    """struct Nf4Weight of nf4.h."""

    _fields_ = fields(ctypes.c_void_p, "packed", "absmax", "absmax8", "nested_absmax", "nested_code", "nested_offset")
    _fields_ += fields(ctypes.c_int64, "numel", "blocksize") + fields(ctypes.c_bool, "fp4")


class Dequantize(ctypes.Structure):
    """struct Nf4Dequantize of nf4_cuda.h."""

    _fields_ = [("weight", Weight), ("out", ctypes.c_void_p)]
    _fields_ += fields(ctypes.c_longlong, "start", "pitch", "rows", "cols") + fields(ctypes.c_int, "dtype", "keep")


class Quantize(ctypes.Structure):
    """struct Nf4Quantize of nf4_cuda.h."""

    _fields_ = fields(ctypes.c_void_p, "weight", "packed", "absmax") + fields(ctypes.c_longlong, "numel", "blocksize")
    _fields_ += fields(ctypes.c_int, "dtype", "fp4")


class QuantizeScales(ctypes.Structure):
    """struct Nf4QuantizeScales of nf4_cuda.h."""

    _fields_ = fields(ctypes.c_void_p, "absmax", "nested_code", "offset", "codes", "nested_absmax")
    _fields_ += fields(ctypes.c_longlong, "blocks")


def off_alignment(device: Memory, values: Tensor) -> Tensor:
    """A copy that starts one element behind a multiple of 16 bytes."""
    return device.put(torch.cat([values.new_zeros(1), values]), align=16)[1:]


def put_weight(
    device: Memory, tensors: tuple, quant_type: str, blocksize: int, numel: int, aligned: bool = True
) -> Weight:
    """packed, absmax, nested_absmax, nested_code, nested_offset in `device`, as the kernels take them."""
    packed, absmax, *nested = tensors
    place = (lambda values: device.put(values, align=16)) if aligned else (lambda values: off_alignment(device, values))
    one = Weight(packed=at(place(packed)).value, numel=numel, blocksize=blocksize, fp4=quant_type == "fp4")
    if nested[0] is None:
        one.absmax = at(device.put(absmax)).value
        return one
    one.absmax8 = at(device.put(absmax)).value
    for name, values in zip(("nested_absmax", "nested_code", "nested_offset"), nested, strict=True):
        setattr(one, name, at(device.put(values)).value)
    return one


def raise_for(lib: ctypes.CDLL, code: int) -> None:
    if code != 0:
        raise RuntimeError(f"error {code}: {lib.simt_error().decode()}")


def in_both_orders(lib: ctypes.CDLL, op, *args) -> list[Tensor]:
    """No order of threads and blocks changes a bit."""
    results = []
    for reverse in (0, 1):
        lib.simt_reverse(reverse)
        try:
            with memory(lib) as device:
                results.append([out.clone() for out in op(lib, device, *args)])
        finally:
            lib.simt_reverse(0)
    same = [torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*results, strict=True)]
    assert all(same), f"the result depends on the order of threads or blocks: {same}"
    return results[0]


def dequantize(
    lib, device: Memory, tensors: tuple, quant_type, blocksize, numel, dtype, aligned=True, keep=False
) -> tuple[Tensor]:
    """The op nf4_dequantize; the fresh output holds NaN, and nothing beside it may be written."""
    weight = put_weight(device, tensors, quant_type, blocksize, numel, aligned)
    out = device.empty((numel + 1,), dtype, align=16)[1:] if not aligned else device.empty((numel,), dtype, align=16)
    args = Dequantize(weight, at(out).value, 0, 0, 1, numel, DTYPES[dtype], keep)
    raise_for(lib, lib.nf4_dequantize_cuda(ctypes.byref(args), None))
    return (out,)


def dequantize_part(lib, device: Memory, weight: tuple, dtype, part: tuple, aligned=True) -> tuple[Tensor]:
    """`weight`: tensors, quant_type, blocksize, numel; `part`: start, pitch, rows, cols."""
    placed, (*_, rows, cols) = put_weight(device, *weight, aligned), part
    out = device.empty((rows * cols,), dtype, align=16)
    args = Dequantize(placed, at(out).value, *part, DTYPES[dtype], 1)
    raise_for(lib, lib.nf4_dequantize_cuda(ctypes.byref(args), None))
    return (out.view(rows, cols),)


def quantize(lib, device: Memory, values: Tensor, quant_type, blocksize, aligned=True) -> tuple[Tensor, Tensor]:
    """The op nf4_quantize of a flat tensor."""
    numel = values.numel()
    given = device.put(values, align=16) if aligned else off_alignment(device, values)
    packed = device.empty((-(-numel // 2),), torch.uint8, align=16)
    absmax = device.empty((-(-numel // blocksize),), torch.float32)
    kinds = DTYPES[values.dtype], quant_type == "fp4"
    args = Quantize(at(given).value, at(packed).value, at(absmax).value, numel, blocksize, *kinds)
    raise_for(lib, lib.nf4_quantize_cuda(ctypes.byref(args), None))
    return packed, absmax


def quantize_scales(lib, device: Memory, absmax: Tensor, code: Tensor, offset: Tensor | None = None) -> tuple:
    """The op nf4_quantize_scales, its offset taken as the extension takes it unless it is given."""
    offset = absmax.mean().view(1) if offset is None else offset
    codes = device.empty(absmax.shape, torch.uint8)
    nested_absmax = device.empty((-(-absmax.numel() // 256),), torch.float32)
    given = [at(device.put(tensor)).value for tensor in (absmax, code, offset)]
    args = QuantizeScales(*given, at(codes).value, at(nested_absmax).value, absmax.numel())
    raise_for(lib, lib.nf4_quantize_scales_cuda(ctypes.byref(args), None))
    return codes, nested_absmax, offset
