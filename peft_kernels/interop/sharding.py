"""Models that FSDP2 has sharded: their tensors whole, and the one process that writes them."""

import importlib
from collections.abc import Iterable

from torch import Tensor, nn

from ..nn.nf4_sharded import is_sharded


def reshard(model: nn.Module) -> None:
    """Every Parameter sharded, also where a forward has just gathered it, so that all processes see the same."""
    for module in model.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Gathered where it is sharded, which every process has to ask for."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def writes(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes files of these tensors: of sharded ones rank 0 alone."""
    return not any(map(is_sharded, tensors)) or importlib.import_module("torch.distributed").get_rank() == 0
