"""Tensors in the shim's memory: between pages that fault, full of NaN until written."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Memory:
    """Allocates on one shim; free() ends the life of every tensor from it."""

    def __init__(self, lib: ctypes.CDLL):
        self._lib = lib
        self._buffers: list[int] = []

    def empty(
        self, size: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None, align: int = 0
    ) -> Tensor:
        """Its last element ends at a page that faults, unless `align` (default: the itemsize) moves it down."""
        strides = strides or torch.empty(size, device="meta").stride()
        extent = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
        itemsize = torch.empty((), dtype=dtype).element_size()
        begin = self._lib.simt_alloc(extent * itemsize, align or itemsize)
        self._buffers.append(begin)
        if extent == 0:
            return torch.empty(size, dtype=dtype)
        flat = torch.frombuffer((ctypes.c_uint8 * (extent * itemsize)).from_address(begin), dtype=dtype)
        return flat.as_strided(size, strides)

    def put(self, values: Tensor, strides: Sequence[int] | None = None, align: int = 0) -> Tensor:
        return self.empty(values.shape, values.dtype, strides, align).copy_(values)

    def free(self) -> int:
        """How many buffers a kernel wrote beside."""
        damaged = sum(self._lib.simt_free(begin) for begin in self._buffers)
        self._buffers.clear()
        return damaged


@contextmanager
def memory(lib: ctypes.CDLL) -> Iterator[Memory]:
    """Memory for one test; at its end nothing beside the tensors may have been written."""
    owner = Memory(lib)
    try:
        yield owner
    finally:
        damaged = owner.free()
    assert damaged == 0, f"{damaged} buffers were written beside"


def at(tensor: Tensor) -> ctypes.c_void_p:
    """The address to hand to C."""
    return ctypes.c_void_p(tensor.data_ptr())
