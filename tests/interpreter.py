"""Triton's interpreter made fit for bf16.

In triton 3.6 to 3.9 it keeps bf16 as uint16 and multiplies those integers in tl.dot, truncates fp32 -> bf16 where GPUs
round to nearest even, and casts fp64 and fp16 to and from bf16 as integers.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_original_cast = interpreter.InterpreterBuilder.cast_impl


def _floats(tile: interpreter.TensorHandle) -> np.ndarray:
    """bf16 is kept as uint16, the upper half of an fp32."""
    if tile.dtype.scalar == tl.bfloat16:
        return (tile.data.astype(np.uint32) << 16).view(np.float32)
    return tile.data


def _cast(self, tile, dst_type):
    dst = dst_type.scalar
    if dst == tl.bfloat16 and tile.dtype.scalar != tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(tile.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), dst)
    if tile.dtype.scalar == tl.bfloat16 and dst != tl.bfloat16:
        return interpreter.TensorHandle(_floats(tile).astype(interpreter._get_np_dtype(dst)), dst)
    return _original_cast(self, tile, dst_type)


def _create_fp_to_fp(self, tile, dst_type, rounding_mode):
    return _cast(self, tile, dst_type)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    product = np.matmul(_floats(a), _floats(b), dtype=np.float32)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def repair() -> None:
    """Give the interpreter right bf16 arithmetic; other dtypes are as before."""
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_fp_to_fp = _create_fp_to_fp
    interpreter.InterpreterBuilder.create_dot = _create_dot
