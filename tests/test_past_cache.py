"""Which outputs go past the caches: large ones of whole lines, in memory that was written before."""

import mmap
import sys

import numpy as np
import pytest

from peft_kernels._core import native

_C = native.EXTENSIONS.get("_C_cpu")
pytestmark = pytest.mark.skipif(_C is None, reason=f"_C_cpu: {native.MISSING.get('_C_cpu')}")
SIZE, ROW = 16 << 20, 4096


@pytest.fixture
def memory():
    """(address, bytes) of pages that nobody has written."""
    view = np.frombuffer(mmap.mmap(-1, 2 * SIZE), dtype=np.uint8)
    return view.ctypes.data, view


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every page passes for one that was written")
def test_fresh_pages_do_not(memory):
    address, view = memory
    assert not _C.goes_past_cache(address, SIZE // ROW, ROW)
    view[:] = 1
    assert _C.goes_past_cache(address, SIZE // ROW, ROW)


def test_small_and_ragged_outputs_do_not(memory):
    address, view = memory
    view[:] = 1
    assert _C.goes_past_cache(address, SIZE // ROW, ROW)
    assert not _C.goes_past_cache(address, SIZE // ROW - 1, ROW)
    assert not _C.goes_past_cache(address + 32, SIZE // ROW, ROW)
    assert not _C.goes_past_cache(address, SIZE // ROW, ROW + 32)
    assert not _C.goes_past_cache(0, 0, ROW)
