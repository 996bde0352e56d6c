"""What every public function asks of its tensors before anything runs, and says where it is not so."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def refuse(function: str, name: str, tensor: Tensor, expected: str) -> None:
    raise ValueError(
        f"{function}: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected {expected}"
    )


def check_kind(function: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless it is a tensor, floating, and on `device`, which is x's."""
    # Each call pays for this: messages are made only where something is wrong.
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{function}: {name} is {tensor!r}; expected a tensor")
    if tensor.dtype not in _DTYPES:
        refuse(function, name, tensor, "a floating dtype: float16, bfloat16, float32 or float64")
    if tensor.device != device:
        refuse(function, name, tensor, f"the device of x, {device}")


def has_values(tensor: Tensor) -> bool:
    """Whether its values can be asked for: not of a tensor on meta, nor in a memory prediction."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def autocasts(device: torch.device) -> bool:
    # Asked of meta, is_autocast_enabled raises; torch 2.11 cannot compile is_autocast_available.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]; reshape(-1, K) would not know M where K is 0."""
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)
