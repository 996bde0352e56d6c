"""Faults planted in the norm's CUDA kernels, which the checks must see, and the terms that cost their sums the most."""

import norm_checks
import pytest
import torch
from bounds import unit_roundoff
from cuda_host import norm
from cuda_host.build import CXX, library
from norm_cases import Kind, Run, check, check_outputs, data

from peft_kernels.kernels.norm import reference

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

U = unit_roundoff(torch.float32)
CHAINS = 11
"""Roundings of fp32, times sum|terms|, that csrc/common/column_sum.cuh promises of a column's sum."""
KINDS = (Kind(residual=True), Kind(rms=True, residual=True))

ROWS, SUMS, REDUCE = "csrc/norm/norm_bwd_rows.cuh", "csrc/common/column_sum.cuh", "csrc/common/reduce.cuh"
FORWARD, BACKWARD = norm.FORWARD, norm.BACKWARD
SQUARES = "out[c] = (out[c] - mean) * (out[c] - mean);\n  });\n  sum_team"
FORWARD_FAULTS = {
    "lanes of half a warp": (REDUCE, "bits < 32; bits *= 2", "bits < 16; bits *= 2"),
    "neighbours' rows added": (REDUCE, "if (bits >= span) break;", ""),
    "wrong lane mask": (REDUCE, "0xffffffffu, values[i], bits", "0x7fffffffu, values[i], bits"),
    "barrier missing": (REDUCE, "  __syncthreads();\n", ""),
    "one warp's sum": (REDUCE, "lane < span / 32 ?", "lane < 1 ?"),
    "variance not centred": (FORWARD, SQUARES, "out[c] *= out[c];\n  });\n  sum_team"),
    "columns past the row's end counted": (FORWARD, "    if (!has(v)) return;\n", ""),
    "rows past the last": (FORWARD, "return row < a.M && v * span", "return v * span"),
    "residual's stride": (FORWARD, "row * a.residual_row_stride, (begin", "row * a.x_row_stride, (begin"),
    "total not kept": (FORWARD, "held[begin + i] = pack<T>(x);", "pack<T>(x);"),
    "long rows: x, not the total": (FORWARD, "adds ? a.total : a.x", "adds ? a.x : a.x"),
    "long rows: total not rounded": (
        FORWARD,
        "rounded(__fadd_rn(out[c], other[c]), a.dtype)",
        "__fadd_rn(out[c], other[c])",
    ),
}
SLOT = "* static_cast<int>(blockDim.x) + threadIdx.x];\n}"
BACKWARD_FAULTS = {
    "barrier missing": (REDUCE, "  __syncthreads();\n", ""),
    "rows of one place": (ROWS, "(threadIdx.x / span) * P::kRows;", "(threadIdx.x / span);"),
    "next row not loaded": (ROWS, "if constexpr (P::kAhead) load_rows(row + step);", ""),
    "rows past the part": (ROWS, "return row < end && piece", "return piece"),
    "chain too long": (ROWS, "kChain = kBatch;", "kChain = 4 * kBatch;"),
    "chain not begun anew": (ROWS, "carried.chain[sum][v][column + c] = 0.0f;", ""),
    "last chain lost": (ROWS, "    fold(carried);\n    write_part", "    write_part"),
    "shared words not cleared": (ROWS, "  clear_shared<P>();\n", ""),
    "threads on one place": (ROWS, SLOT, "* static_cast<int>(blockDim.x)];\n}"),
    "compensation lost": (SUMS, "__fadd_rn(sum.lo, s.lo))", "0.0f)"),
    "teams not merged": (ROWS, "if (at.span <= 32) sum_block", "if (at.span < 1) sum_block"),
    "parts on one place": (ROWS, "static_cast<long long>(blockIdx.x) * P::kSums * a.K;", "0;"),
    "dbias in dweight's place": (ROWS, "out + sum * a.K + piece", "out + piece"),
    "dtotal before rstd": (ROWS, "- xhat[c] * mean_both) + dtotal[c];", "- xhat[c] * mean_both + dtotal[c]);"),
    "RMSNorm with mean(g)": (ROWS, "a.rms ? 0.0f : sums[2 * r]", "sums[2 * r]"),
    "weight not in the sums": (ROWS, "g[c] *= weight[c], xhat[c] *= g[c];", "xhat[c] *= g[c];"),
}

HALF = "a.dy_fp32 ? run<__half, float>(a, gpu, stream) : run<__half, __half>(a, gpu, stream)"
FP32 = "run<float, float>(a, gpu, stream)"
BF16_ONLY = {
    FORWARD: [(FORWARD, f"run<{name}>(a, stream)", "cudaErrorInvalidValue") for name in ("__half", "float")],
    BACKWARD: [
        (BACKWARD, text, "cudaErrorInvalidValue") for text in (HALF, FP32, "run<__nv_bfloat16, float>(a, gpu, stream)")
    ],
}
"""What a library with a planted fault leaves out, so that it compiles in a quarter of the time."""


@pytest.fixture(scope="module")
def cache(pytestconfig):
    return pytestconfig.cache.mkdir("cuda_host")


def lossy_chain(dtype: torch.dtype) -> torch.Tensor:
    """Two parts of 256 teams of 32 rows, four at a time: each team's first chain loses all but its first term."""
    dy = torch.full((2, 8, 256, 4, 16 // dtype.itemsize), 0.99 * U, dtype=dtype)
    dy[:, 0, :, 0] = 1
    return dy.view(-1, dy.shape[-1])


def lossy_folds(dtype: torch.dtype) -> torch.Tensor:
    """Two parts of 256 teams of 128 rows: chains of one term each, 15 of which cannot move the sum they join."""
    dy = torch.zeros((2, 32, 256, 4, 16 // dtype.itemsize), dtype=dtype)
    dy[:, ::2, :, 0] = 0.99 * U
    dy[:, 0, :, 0] = 1
    return dy.view(-1, dy.shape[-1])


def roundings(run: Run, dy: torch.Tensor) -> float:
    """What dbias of rows of these columns has lost, in units of u sum|terms|."""
    none = (None,) * 5
    dbias = run.bwd(dy, *none, False, False, False, True, torch.float32, dy.dtype)[2]
    exact = dy.double()
    return float(((dbias.double() - exact.sum(0)).abs() / (U * exact.abs().sum(0))).max())


def check_roundings(run: Run, dtype: torch.dtype) -> None:
    """Seven roundings for the chains, attained by these terms; the result's own for all that comes after them."""
    lost = roundings(run, lossy_chain(dtype))
    assert 6.5 < lost < 8, f"{lost} roundings of {CHAINS}"
    lost = roundings(run, lossy_folds(dtype))
    assert lost < 2, f"{lost} roundings of {CHAINS}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_worst_terms_cost_what_the_bound_counts(cache, dtype):
    """Not of float16, whose smallest number, 2**-24, is half a unit in the last place of a one in fp32."""
    check_roundings(norm.run_on(None, library(cache, BACKWARD), 1), dtype)


def check_forward(cache, faults) -> None:
    run = norm.run_on(library(cache, FORWARD, faults), None)
    for kind in KINDS:
        for M, K in ((37, 8), (5, 40), (3, 264), (3, 1048), (2, 8200), (1, 24_600)):
            one = data(M, K, torch.bfloat16, "cpu", kind)
            check_outputs(run, one)
            check_outputs(run, norm_checks.replace(one, x=torch.cat([one.x, one.x[:, :8]], 1)[:, :K]))


def check_backward(cache, faults) -> None:
    lib = library(cache, BACKWARD, faults)
    run = norm.run_on(None, lib)
    for kind in KINDS:
        for M, K in ((301, 40), (37, 264), (5, 4104)):
            check(Run(reference.norm_fwd, run.bwd), data(M, K, torch.bfloat16, "cpu", kind))
    check_roundings(norm.run_on(None, lib, 1), torch.bfloat16)


@pytest.mark.parametrize("checks", [check_forward, check_backward])
def test_the_checks_pass_without_a_fault(cache, checks):
    checks(cache, ())


def is_seen(check, cache, faults) -> None:
    with pytest.raises((AssertionError, RuntimeError)) as seen:
        check(cache, faults)
    assert "failed:" not in str(seen.value), "the fault does not compile"
    assert not isinstance(seen.value, norm.NotTaken)


@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_faults_in_the_forward_are_seen(cache, fault):
    is_seen(check_forward, cache, [FORWARD_FAULTS[fault], *BF16_ONLY[FORWARD]])


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_faults_in_the_backward_are_seen(cache, fault):
    is_seen(check_backward, cache, [BACKWARD_FAULTS[fault], *BF16_ONLY[BACKWARD]])
