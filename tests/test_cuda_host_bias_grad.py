"""The bias gradient's CUDA kernels, run on a CPU: values within the bound derived in csrc/common/column_sum.cuh."""

import ctypes

import pytest
import torch
from bounds import Approx, assert_within, unit_roundoff
from cuda_host.bias_grad import DTYPES, LAYOUTS, SOURCE, bias_grad, call, workspace_bytes
from cuda_host.build import CXX, library
from cuda_host.memory import memory

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

BOUND = 11
"""Roundings of fp32, times sum|terms|, that the kernels promise for any M; the op's own tests allow 16."""
U = unit_roundoff(torch.float32)

FAULTS = {
    "row stride": (
        "csrc/common/vec.cuh",
        "data + row * row_stride + column))",
        "data + row * (row_stride + 8) + column))",
    ),
    "column stride": ("csrc/common/vec.cuh", "column * column_stride", "column"),
    "halves swapped": (
        "csrc/common/vec.cuh",
        "out[0] = __uint_as_float(word << 16);",
        "out[0] = __uint_as_float(word);",
    ),
    "tail rows dropped": ("csrc/common/column_sum.cuh", "if (row < end) sum_batch", "if (row < 0) sum_batch"),
    "tail not guarded": ("csrc/common/column_sum.cuh", "if (Full || row + (part + i) * step < end) raw", "raw"),
    "compensation lost": ("csrc/common/column_sum.cuh", "__fadd_rn(sum.lo, s.lo))", "0.0f)"),
    "compensation lost in the tree": (
        "csrc/common/column_sum.cuh",
        "__fadd_rn(__fadd_rn(sum.lo, y.lo), s.lo)",
        "sum.lo - sum.lo",
    ),
    "chain too long": ("csrc/common/column_sum.cuh", "kBatch = 8;", "kBatch = 32;"),
    "infinity not guarded": ("csrc/common/column_sum.cuh", "fabsf(v) <= FLT_MAX ? v : 0.0f", "v"),
    "barrier missing": ("csrc/common/column_sum.cuh", "    __syncthreads();\n", ""),
    "columns past the last": (
        "csrc/common/column_sum.cuh",
        "if (row > 0 || column >= shape.N) return;",
        "if (row > 0) return;",
    ),
    "parts on one place": ("csrc/common/column_sum.cuh", "out[blockIdx.y * shape.N + column + c]", "out[column + c]"),
    "parts overlap": (
        "csrc/common/column_sum.cuh",
        "? begin + shape.rows_per_part :",
        "? begin + shape.rows_per_part + 1 :",
    ),
}


@pytest.fixture(scope="module")
def cache(pytestconfig):
    return pytestconfig.cache.mkdir("cuda_host")


@pytest.fixture(scope="module")
def lib(cache):
    return library(cache, SOURCE)


def exact_and_bound(dy: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    terms = dy.double()
    # The truth has an error of its own: one fp64 rounding per term at most.
    error = (BOUND * U + len(dy) * unit_roundoff(torch.float64)) * terms.abs().sum(0)
    sums = Approx(terms.sum(0), error)
    out = sums if dtype == torch.float32 else sums.rounded(dtype)
    return out.value, out.error


def check(lib, values, dtype, layout="contiguous", sm_count=2) -> float:
    """The bound holds, nothing outside the tensors is touched, and no order of threads changes a bit.

    Returns the error over the bound.
    """
    with memory(lib) as device:
        dy = LAYOUTS[layout](device, values)
        results = []
        for reverse in (0, 1):
            lib.simt_reverse(reverse)
            try:
                results.append(bias_grad(lib, device, dy, dtype, sm_count).clone())
            finally:
                lib.simt_reverse(0)
        ratio = assert_within(results[0], *exact_and_bound(dy, dtype), f"dbias of {layout} dy {list(dy.shape)}")
        assert torch.equal(*results), "the result depends on the order of threads or blocks"
        return ratio


def normal(M, N, dtype):
    return torch.randn(M, N, generator=torch.Generator().manual_seed(M + N)).to(dtype)


# Terms that cost the most roundings where 256 threads share the rows (fp32, N = 4): a one, and what fails to move it.
TINY = 0.99 * U


def lossy_chain(batches: int = 1) -> torch.Tensor:
    """Each chain of the first batch loses all but its first term: 7 roundings, and more in a longer chain."""
    dy = torch.full((2048 * batches, 4), TINY)
    dy[:256] = 1
    return dy


def lossy_folds() -> torch.Tensor:
    """Exact in every chain; each of 15 chains joins a sum that it cannot move (one SM cuts the rows into 12 parts)."""
    dy = torch.zeros(12 * 16, 8, 256, 4)
    dy[:, 0] = TINY
    dy[0, 0] = 1
    return dy.view(-1, 4)


def lossy_tree() -> torch.Tensor:
    """The first thread loses 7 roundings in its chain, and meets a sum that cannot move its own on all 8 levels."""
    dy = torch.zeros(2048, 4)
    dy[::256] = TINY
    dy[0] = 1
    dy[[1, 2, 4, 8, 16, 32, 64, 128]] = TINY
    return dy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M", [1, 37, 517])
@pytest.mark.parametrize("N", [1, 3, 8, 1000])
def test_values(lib, M, N, layout, dtype):
    for out in {dtype, torch.float32} if N in (3, 8) else {dtype}:
        check(lib, normal(M, N, dtype), out, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [0, 1, 8, 1000])
def test_no_rows_and_no_columns(lib, N, dtype):
    with memory(lib) as device:
        dbias = bias_grad(lib, device, device.empty((0, N), dtype), dtype, 2)
        assert torch.equal(dbias, torch.zeros(N, dtype=dtype))
        assert bias_grad(lib, device, device.empty((5, 0), dtype), dtype, 2).shape == (0,)


@pytest.mark.parametrize("sm_count", [1, 2, 7, 132])
@pytest.mark.parametrize("shape", [(4099, 8), (2048, 256), (5000, 3), (300, 2056)])
def test_any_number_of_sms(lib, shape, sm_count):
    check(lib, normal(*shape, torch.bfloat16), torch.float32, sm_count=sm_count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_million_terms_of_one_sign(lib, dtype):
    values = torch.rand(1_000_000, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for sm_count in (1, 4):
        check(lib, values, torch.float32, sm_count=sm_count)


def test_the_worst_terms_cost_what_the_bound_counts(lib):
    """Seven roundings for the chains, attained by these terms; the result's own for all that comes after them."""
    assert 6.9 < BOUND * check(lib, lossy_chain(), torch.float32) < 7
    assert BOUND * check(lib, lossy_tree(), torch.float32) < 8
    assert BOUND * check(lib, lossy_folds(), torch.float32, sm_count=1) < 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("row", [0, 700, 2299])
def test_infinity_and_nan_as_in_a_plain_sum(lib, row, layout, dtype):
    values = normal(2300, 8, dtype)
    inf = float("inf")
    values[row, 1], values[row, 2], values[row, 3] = inf, -inf, float("nan")
    values[row, 4], values[(row + 1111) % 2300, 4] = inf, -inf
    values[row, 5], values[(row + 1111) % 2300, 5] = inf, inf
    with memory(lib) as device:
        got = bias_grad(lib, device, LAYOUTS[layout](device, values), dtype, 2).clone()
    assert torch.equal(got.isnan(), torch.tensor([0, 0, 0, 1, 1, 0, 0, 0]).bool())
    assert torch.equal(got[[1, 2, 5]], torch.tensor([inf, -inf, inf], dtype=dtype))
    assert got[[0, 6, 7]].isfinite().all()


def test_a_sum_too_large_is_infinite(lib):
    values = torch.full((3000, 4), 3e38)
    values[:, 1] *= -1
    with memory(lib) as device:
        got = bias_grad(lib, device, device.put(values, align=16), torch.float32, 2).tolist()
    assert got == [float("inf"), -float("inf"), float("inf"), float("inf")]


def test_sums_that_cancel_are_exact(lib):
    """What is left of large terms of both signs was never rounded away: 3 * 1000 of terms that add up to 0."""
    values = torch.full((6000, 4), 2.0**24)
    values[1::2] *= -1
    values[::2] += 2
    check(lib, values, torch.float32)


def test_elements_more_than_2_31_apart(lib, tmp_path):
    """Rows, or columns, of a sparse file of 9 GB, read by 16-byte loads and one by one."""
    apart = 2**31 + 8
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * apart + 8, dtype=torch.bfloat16)
    for size, strides in (((3, 8), (apart, 1)), ((3, 7), (apart, 1)), ((8, 3), (1, apart))):
        dy = flat.as_strided(size, strides)
        dy.copy_(normal(*size, torch.bfloat16))
        with memory(lib) as device:
            assert_within(bias_grad(lib, device, dy, torch.float32, 2), *exact_and_bound(dy, torch.float32), "dbias")


@pytest.mark.parametrize(("M", "N"), [(2**40, 1), (2**40, 8), (2**33, 4096), (3, 2**31), (2, 2**34)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_workspace_of_huge_shapes(lib, M, N, dtype):
    """Parts of the rows small enough for the bound (2**27 per thread), few enough for a grid's second dimension."""
    for strides in ((N, 1), (1, M), (0, 1)):
        args = call(torch.empty((M, N), dtype=dtype, device="meta").as_strided((M, N), strides), True)
        parts, left = divmod(workspace_bytes(lib, args, 132), 4 * N)
        assert left == 0 and parts < 65536
        assert -(-M // max(1, parts)) <= 2**27 * 256


def test_wrong_calls(lib):
    with memory(lib) as device:
        dy = device.put(torch.ones(4000, 8))
        args = call(dy, True)
        assert workspace_bytes(lib, args, 2) > 0
        assert lib.bias_grad_cuda(ctypes.byref(args), 2, None) == 1, "no workspace, no output"
        assert lib.bias_grad_cuda(ctypes.byref(args), 0, None) == 1, "no SMs"
        args.dtype = 3
        assert lib.bias_grad_cuda(ctypes.byref(args), 2, None) == 1, "no such dtype"


def all_checks(lib) -> None:
    """What the planted faults go through: every kernel, several parts, ragged rows, columns past a tile."""
    for dtype in DTYPES:
        for layout in ("contiguous", "spread", "transposed"):
            check(lib, normal(517, 40, dtype), dtype, layout)
    check(lib, lossy_chain(8), torch.float32, sm_count=132)
    check(lib, lossy_folds(), torch.float32, sm_count=1)
    check(lib, lossy_tree(), torch.float32)
    test_infinity_and_nan_as_in_a_plain_sum(lib, 700, "contiguous", torch.float32)


def test_the_checks_pass_without_a_fault(lib):
    all_checks(lib)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(cache, fault):
    with pytest.raises((AssertionError, RuntimeError)) as seen:
        all_checks(library(cache, SOURCE, [FAULTS[fault]]))
    assert "failed:" not in str(seen.value), "the fault does not compile"
