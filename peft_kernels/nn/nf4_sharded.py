"""A 4-bit weight whose packed bytes are a DTensor (FSDP2), brought together with parts that came whole."""

import importlib
from dataclasses import replace

from torch import Tensor

from ..formats.nf4_state import Stored

_PARTS = ("absmax", "nested_absmax", "nested_code", "nested_offset")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing those."""
    return hasattr(tensor, "device_mesh")


def on_one_mesh(stored: Stored) -> Stored:
    """Every part cut as the packed bytes are.

    The offset is read as a number, and set_model_state_dict(full_state_dict=True) cuts what has a Parameter's name,
    which of the keys is `weight` alone: the other parts are there whole, in each process.
    """
    packed, parts = stored.weight.packed, {}
    if not is_sharded(packed):
        return stored
    distribute = importlib.import_module("torch.distributed.tensor").distribute_tensor
    for name in _PARTS:
        tensor = getattr(stored.weight, name)
        if tensor is not None and not is_sharded(tensor):
            parts[name] = distribute(tensor, packed.device_mesh, packed.placements, src_data_rank=None)
    return replace(stored, weight=replace(stored.weight, **parts))
