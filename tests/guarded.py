"""Tensors whose last byte is followed by a page that faults: who reads beside them does not live to tell."""

import ctypes
import mmap

import torch
from torch import Tensor

_PROT_NONE = 0


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy."""
    if tensor.numel() == 0:
        return tensor.clone()
    whole = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, whole + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + whole), mmap.PAGESIZE, _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=whole - tensor.nbytes)
    return flat.view(tensor.shape).copy_(tensor)
