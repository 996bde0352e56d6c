"""The C++ kernels of norm for every instruction set that is here: shapes around vectors, groups, chains and blocks."""

from dataclasses import replace

import norm_checks as checks
import pytest
import torch
from norm_cases import DTYPES, FULL, Kind, check, data, run_of, wide

from peft_kernels._core import native

_C = native.EXTENSIONS.get("_C_cpu")
pytestmark = [
    pytest.mark.skipif(_C is None, reason=f"_C_cpu: {native.MISSING.get('_C_cpu')}"),
    pytest.mark.usefixtures("poisoned"),
]
OP = run_of("op")
NAMES = ("y", "total", "mean", "rstd", "dx", "dweight", "dbias")
NATIVE = DTYPES[:3]
"""fp64 is plain ATen code, the same for every instruction set: test_norm.py has it."""


@pytest.fixture(params=_C.available_isas() if _C else [])
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("run", [*checks.CHECKS, checks.check_same_sign], ids=lambda run: run.__name__)
def test_values(isa, run, dtype):
    run(OP, dtype, "cpu")


# A vector of columns (4, 8 or 16), four of them, a chain of 8 such steps; rows in a group (8 in the forward, 4 in the
# backward), in a chain (44), in a block (16 at least, 32 blocks until they have 256 rows): one less, one more, a rest.
EDGES = [(5, K) for K in (2, 3, 4, 5, 7, 9, 15, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 511, 513, 1100)]
EDGES += [(M, 20) for M in (2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 60, 511, 513, 1409, 8191, 8193)]


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("kind", [*FULL, Kind(wide_y=True)], ids=str)
def test_edges(isa, kind, dtype):
    for M, K in EDGES:
        check(OP, data(M, K, dtype, "cpu", kind))


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_rows_too_long_to_take_together(isa, dtype):
    """Past 512 KB of dy and x for four rows the backward takes one row at a time."""
    check(OP, data(14, 40_001, dtype, "cpu"))


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("kind", [*FULL, Kind(wide_y=True)], ids=str)
def test_what_goes_past_the_caches(isa, kind, dtype):
    """Outputs of 16 MiB are stored another way; each of their rows must be that of a smaller call, bit for bit."""
    few = data(64, 512, dtype, "cpu", kind)
    times = 2**24 // (64 * 512 * dtype.itemsize)
    whole = {name: tensor.repeat(times, 1) for name, tensor in few.tensors().items() if tensor.dim() == 2}
    found = checks.outputs(OP, replace(few, **whole))
    for name, a, b in zip(NAMES[:5], found, checks.outputs(OP, few), strict=False):
        if b.numel():
            assert torch.equal(a.view(times, *b.shape), b.expand(times, *b.shape)), name


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_any_number_of_threads_gives_the_same_bits(isa, layout, dtype):
    one, before = data(1237, 130, dtype, "cpu", FULL[0], layout), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(checks.outputs(OP, one))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, a, b in zip(NAMES, found[0], other, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_what_a_call_leaves_behind_is_not_read(isa, dtype):
    """The memory that kernels work in is kept for the next call: NaN and inf of one must not reach another."""
    one = data(301, 77, dtype, "cpu", FULL[0], "transposed")
    first = checks.outputs(OP, one)
    faulty = replace(one, x=one.x * torch.nan, residual=one.residual, dy=one.dy * torch.inf)
    OP.fwd(faulty.x, faulty.residual, one.weight, one.bias, one.eps, False, dtype)
    OP.bwd(faulty.dy, one.dtotal, one.x, *first[2:4], one.weight, False, *(True,) * 3, wide(dtype), dtype)
    for name, a, b in zip(NAMES, first, checks.outputs(OP, one), strict=True):
        assert torch.equal(a, b), name
