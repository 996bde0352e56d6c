"""Launching Triton kernels from Python at the cost of a dictionary look-up instead of a specialisation per argument."""

from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

_MOST_ENTRIES = 4096  # every new batch size makes one entry per kernel; the compiled code itself is Triton's to keep
_SMALL_STORAGE = 2**31  # bytes: on AMD Triton compiles smaller tensors to 32-bit offsets

_compiled: dict[tuple, tuple[Any, tuple]] = {}


def _kind(tensor: torch.Tensor | TensorDescriptor) -> tuple:
    """What Triton compiles a pointer for: its dtype, whether it is 16-byte aligned and, on AMD, its size."""
    if isinstance(tensor, TensorDescriptor):
        return tensor.base.dtype, tuple(tensor.block_shape)
    aligned = tensor.data_ptr() % 16 == 0
    if torch.version.hip:
        return tensor.dtype, aligned, tensor.untyped_storage().nbytes() < _SMALL_STORAGE
    return tensor.dtype, aligned


def launch(
    kernel,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor | TensorDescriptor, ...],
    scalars: tuple[int | float, ...],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> None:
    """Run kernel[grid](*tensors, *scalars, **constants): the kernel's parameters stand in this order.

    Triton specialises every argument of every call anew, which costs more than many of the kernels run for: 46 us of
    the host for 17 arguments beside an H100. Here the first call of a kind does that, and what it compiled is kept under
    all that Triton specialises on: devices, dtypes, alignment and the very values of scalars and constants. Under
    Triton's interpreter nothing is compiled, so nothing is kept.
    """
    device = getattr(tensors[-1], "base", tensors[-1]).device
    kinds = tuple(map(_kind, tensors))
    key = (kernel, device, kinds, scalars, tuple(constants.values()), num_warps, num_stages)
    found = _compiled.get(key)
    if found is not None:
        compiled, values = found
        compiled[grid](*tensors, *scalars, *values)
        return
    compiled = kernel[grid](*tensors, *scalars, **constants, num_warps=num_warps, num_stages=num_stages)
    if compiled is not None and device.type == "cuda":
        if len(_compiled) >= _MOST_ENTRIES:
            _compiled.clear()
        # A compiled kernel takes its constants by position.
        names = [name for name in kernel.arg_names if name in constants]
        _compiled[key] = compiled, tuple(constants[name] for name in names)
