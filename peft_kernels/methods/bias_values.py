"""A bias's value: copied to host memory, written back in place, and its version."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ASIDE = 2**30
"""Added to a bias's version while the original stands in its place: more than training will ever count up to."""


def kept(tensor: Tensor) -> Tensor:
    """A copy in host memory (on the meta device there is nothing to copy)."""
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def write(parameter: nn.Parameter, value: Tensor) -> None:
    """The value is of the whole bias, also where the Parameter is one rank's part."""
    if is_traceable_wrapper_subclass(parameter) and not is_traceable_wrapper_subclass(value):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device)  # each rank has the whole: nothing to send
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def set_version(parameter: nn.Parameter, version: int) -> None:
    """By which autograd sees that a tensor which a graph saved is not what it was."""
    torch._C._autograd._unsafe_set_version_counter((parameter,), (version,))
