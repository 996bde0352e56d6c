"""Launching Triton kernels from Python at the cost of a dictionary look-up instead of a specialisation per argument."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..._core.registry import planned_arch

_MOST_KINDS = 256  # per plan; what was compiled is kept by Triton, so forgetting costs one slow launch
_SMALL_STORAGE = 2**31  # bytes: on AMD Triton compiles smaller tensors to 32-bit offsets


def cdiv(a: int, b: int) -> int:
    """ceil(a / b); triton.cdiv costs 1.3 us of the host a call, as much as an allocation."""
    return -(-a // b)


def arch_of(device: torch.device) -> int | str:
    """90 for compute capability 9.0, "gfx942" on ROCm; for CPU tensors, which the interpreter or a memory prediction
    takes, what is planned for: 90 unless said otherwise."""
    return _gpu_arch(device) if device.type == "cuda" else planned_arch()


@lru_cache
def _gpu_arch(device: torch.device) -> int | str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True, eq=False)
class Plan:
    """One kernel at one shape: its grid and constants, and the compiled code of every kind of arguments seen."""

    grid: tuple[int, int, int]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    compiled: dict[tuple, tuple[Any, tuple]] = field(default_factory=dict)


def _kind(tensor: Tensor | TensorDescriptor) -> tuple | torch.dtype:
    """What Triton compiles an argument for: its dtype, whether it is 16-byte aligned and, on AMD, its size."""
    if isinstance(tensor, TensorDescriptor):
        return tensor.base.dtype, tuple(tensor.block_shape)
    if torch.version.hip:
        return tensor.dtype, tensor.data_ptr() % 16, tensor.untyped_storage().nbytes() < _SMALL_STORAGE
    return tensor.dtype if tensor.data_ptr() % 16 == 0 else (tensor.dtype, False)


def launch(
    kernel,
    plan: Plan,
    inputs: tuple[Tensor | TensorDescriptor, ...],
    outputs: tuple[Tensor | TensorDescriptor, ...],
    scalars: tuple[int | float, ...],
) -> None:
    """Run kernel[plan.grid](*inputs, *outputs, *scalars, **plan.constants): its parameters stand in this order.

    Triton specialises every argument of every call anew, which takes longer than many kernels run: 46 us of the host
    for 17 arguments beside an H100. Here the first call of a kind does that, and what it compiled is kept under all
    that Triton specialises on: the device, dtypes, alignment and the very values of the scalars. `outputs` are new
    memory, which is always aligned, of dtypes that the plan's maker took into account. Under Triton's interpreter
    nothing is compiled, so nothing is kept.
    """
    device = inputs[-1].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, whatever its arguments live on
            return launch(kernel, plan, inputs, outputs, scalars)
    key = (kernel, device, scalars, *map(_kind, inputs), *(map(_kind, outputs) if torch.version.hip else ()))
    found = plan.compiled.get(key)
    if found is not None:
        compiled, values = found
        compiled[plan.grid](*inputs, *outputs, *scalars, *values)
        return
    compiled = kernel[plan.grid](
        *inputs, *outputs, *scalars, **plan.constants, num_warps=plan.num_warps, num_stages=plan.num_stages
    )
    if compiled is not None and device >= 0:
        if len(plan.compiled) >= _MOST_KINDS:
            plan.compiled.clear()
        # A compiled kernel takes its constants by position.
        names = [name for name in kernel.arg_names if name in plan.constants]
        plan.compiled[key] = compiled, tuple(plan.constants[name] for name in names)
