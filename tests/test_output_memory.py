"""Large outputs: past the caches in memory that was written before, in huge pages where it was not."""

import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import peft_kernels as pk
from peft_kernels._core import native

_C = native.EXTENSIONS.get("_C_cpu")
pytestmark = pytest.mark.skipif(_C is None, reason=f"_C_cpu: {native.MISSING.get('_C_cpu')}")
SIZE, ROW = 16 << 20, 4096
ROOT = Path(__file__).parent.parent


@pytest.fixture
def memory():
    """(address, bytes) of pages that nobody has written."""
    view = np.frombuffer(mmap.mmap(-1, 2 * SIZE), dtype=np.uint8)
    return view.ctypes.data, view


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every page passes for one that was written")


@linux_only
def test_fresh_pages_do_not(memory):
    address, view = memory
    assert not _C.goes_past_cache(address, SIZE // ROW, ROW)
    view[: SIZE // 2 + ROW] = 1  # the second half of an output is still new
    assert not _C.goes_past_cache(address, SIZE // ROW, ROW)
    view[:] = 1
    assert _C.goes_past_cache(address, SIZE // ROW, ROW)


@linux_only
def test_pages_beside_an_output_say_nothing_of_it(memory):
    address, view = memory
    view[ROW : ROW + SIZE] = 1
    assert _C.goes_past_cache(address + ROW, SIZE // ROW, ROW)
    assert not _C.ask_for_huge_pages(address + ROW, SIZE)


def test_small_and_ragged_outputs_do_not(memory):
    address, view = memory
    view[:] = 1
    assert _C.goes_past_cache(address, SIZE // ROW, ROW)
    assert not _C.goes_past_cache(address, SIZE // ROW - 1, ROW)
    assert not _C.goes_past_cache(address + 32, SIZE // ROW, ROW)
    assert not _C.goes_past_cache(address, SIZE // ROW, ROW + 32)
    assert not _C.goes_past_cache(0, 0, ROW)


def asks_for_huge_pages(address: int) -> bool:
    """What the system has written down of the memory there."""
    areas = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]
    for area in areas:
        first, end = (int(one, 16) for one in area.split()[0].split("-"))
        if first <= address < end:
            return "hg" in re.search(r"^VmFlags:(.*)$", area, re.M)[1].split()
    raise AssertionError(f"no memory at {address:#x}")


huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="this system has no transparent huge pages"
)


@huge_pages
def test_huge_pages_for_what_is_large_and_new(memory):
    address, view = memory
    assert not _C.ask_for_huge_pages(address, (4 << 20) - 1) and not asks_for_huge_pages(address + (2 << 20))
    assert _C.ask_for_huge_pages(address, 4 << 20) and asks_for_huge_pages(address + (2 << 20))
    assert not asks_for_huge_pages(address + (8 << 20)), "more than the output was asked for"
    view[:] = 1
    assert not _C.ask_for_huge_pages(address + (8 << 20), 8 << 20)


def _weight() -> pk.NF4Weight:
    return pk.nf4_quantize(torch.randn(2048, 64))


# Each is an output of [8192, 2048] in fp32.
LARGE = {
    "nf4_dequantize": lambda: pk.nf4_dequantize(pk.nf4_quantize(torch.zeros(8192, 2048)), torch.float32),
    "nf4_linear": lambda: pk.nf4_linear(torch.zeros(8192, 64), _weight()),
    "lora_linear": lambda: pk.lora_linear(
        torch.zeros(8192, 8), torch.zeros(2048, 8), torch.zeros(4, 8), torch.zeros(2048, 4), 1.0
    ),
    "rms_norm": lambda: pk.rms_norm(torch.zeros(8192, 2048), torch.ones(2048)),
    "bias_linear": lambda: pk.bias_linear(
        torch.zeros(8192, 8), torch.zeros(2048, 8), torch.zeros(2048, requires_grad=True), "relu"
    ),
}


def large_that_ask() -> list[str]:
    """The names of those in LARGE whose output lies in memory that asked for huge pages."""
    names = []
    for name, op in LARGE.items():
        y = op()
        y = y[0] if isinstance(y, tuple) else y
        assert y.nbytes == 64 << 20
        if asks_for_huge_pages(y.data_ptr() + y.nbytes // 2):
            names.append(name)
    return names


@pytest.fixture(scope="module")
def asking() -> list[str]:
    """The same of a process where every large block is new: here the heap may hold what earlier tests have freed."""
    code = "from tests.test_output_memory import large_that_ask; print(*large_that_ask())"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}  # unless it is set, glibc raises it
    run = [sys.executable, "-c", code]
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.split()


@huge_pages
@pytest.mark.parametrize("name", LARGE)
def test_large_outputs_of_an_op_ask_for_them(name, asking):
    assert name in asking
