"""Faults planted in the 4-bit linear's CUDA kernels, which the checks must see."""

import pytest
import torch
from cuda_host import nf4_linear
from cuda_host.build import CXX, library
from nf4_linear_checks import Case, Runs, check_forward

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

PLAN, COMMON = nf4_linear.SOURCE, "csrc/nf4_linear/nf4_linear_common.cuh"
MMA, SIMT = "csrc/nf4_linear/nf4_linear_mma.cuh", "csrc/nf4_linear/nf4_linear_simt.cuh"

FAULTS = {
    "halves of a byte": (
        MMA,
        "tables.level[byte >> 4], tables.level[byte & 15]",
        "tables.level[byte & 15], tables.level[byte >> 4]",
    ),
    "copies of the table": (MMA, "byte * 8 + (i + byte) % 8", "byte * 8 + i % 7"),
    "bytes of a word": (MMA, "word >> (8 * i - 7)", "word >> (8 * (4 - i) - 7)"),
    "rows of a tile": (MMA, "[i % 2 + byte % 2 * 2] =", "[byte % 2 + i % 2 * 2] ="),
    "order of x": (MMA, "(group * Bytes + j * 4 + t) * 16", "(group * Bytes + t * kEach + j) * 16"),
    "columns of x": (MMA, "x + (column * 8 + g) * kRowBytes", "x + g * kRowBytes"),
    "scale of another lane": (MMA, "(lane & ~3) | (group & 3)", "(lane & ~3)"),
    "scale of the step to come": (
        MMA,
        "        scales[i / kEach / 2][i / kEach % 2][i % kEach] =\n",
        "        scales[0][0][0] =\n",
    ),
    "row's scales": (MMA, "block + ((rows_on[i] + column) >> shift)", "block + (column >> shift)"),
    "same rows for both halves": (MMA, "(rows_on[i] + k) / 2 + group", "k / 2 + group"),
    "rows past N": (MMA, "(8 * i < a.N - first ? 8 * i : a.N - 1 - first) * a.K", "8 * i * a.K"),
    "columns past K": (MMA, "if (k + group * kGroupK < end)", "if (true)"),
    "a part's beginning": (MMA, "static_cast<int>(blockIdx.y) * k_per_split, end", "0, end"),
    "parts on one place": (
        MMA,
        "a.workspace[(blockIdx.y * a.M + m) * a.N + n] = sum",
        "a.workspace[m * a.N + n] = sum",
    ),
    "a part left out": (MMA, "int64_t part = 0; part < parts", "int64_t part = 1; part < parts"),
    "scaled before, not after": (MMA, "float products[4] = {};", "float products[4] = {sums[tile][column][0]};"),
    "bias beside its stride": (COMMON, "if (a.bias != nullptr) sum =", "if (a.bias != nullptr) sum = a.bias_step + "),
    "addend's rows": (COMMON, "m * a.addend_row + n * a.addend_column", "m * a.N + n"),
    "x past K": (COMMON, "if (m >= a.M || k >= a.K) return", "if (m >= a.M) return"),
    "x past M": (COMMON, "if (m >= a.M || k >= a.K) return", "if (k >= a.K) return"),
    "x's columns": (COMMON, "to_float(__ldg(x + i * a.x_column))", "to_float(__ldg(x + i))"),
    "alignment of x": (COMMON, "return on_bytes(a.x, 16) && ", "return "),
    "nested offset": (
        COMMON,
        "__fmul_rn(codes.of[raw.code], raw.value), offset)",
        "__fmul_rn(codes.of[raw.code], raw.value), 0.0f)",
    ),
    "nested blocks": (COMMON, "block / kNestedBlock : weight.absmax", "block / 4096 : weight.absmax"),
    "lanes of half a warp": (SIMT, "int bits = 16; bits > 0", "int bits = 8; bits > 0"),
    "a way left out": (SIMT, "for (int w = 1; w < plan.ways; ++w)", "for (int w = 2; w < plan.ways; ++w)"),
    "ways on the same columns": (SIMT, "int64_t k = way * kSimtStepK;", "int64_t k = 0;"),
    "sums without a barrier": (SIMT, "  __syncthreads();\n  const int i =", "  const int i ="),
    "place of x": (SIMT, "j * 32 + piece / kPieces % 32]", "piece % (32 * kPieces)]"),
    "rows of W past N": (SIMT, "row + r < a.N ? row + r : a.N - 1", "row + r"),
}
"""None of the barriers in the tensor cores' kernel: here its warps keep in step by their collectives anyway."""

BF16_ONLY = [
    (PLAN, "return run<__half>(a, sm_count, stream);", "return cudaErrorInvalidValue;"),
    (PLAN, "return run<float>(a, sm_count, stream);", "return cudaErrorInvalidValue;"),
    (PLAN, "run_mma<T, 1, 2>(a, plan, stream)", "cudaErrorInvalidValue"),
    (PLAN, "run_mma<T, 2, 4>(a, plan, stream)", "cudaErrorInvalidValue"),
]
"""What a library with a planted fault leaves out, so that it compiles in a third of the time."""


@pytest.fixture(scope="module")
def cache(pytestconfig):
    return pytestconfig.cache.mkdir("cuda_host")


def all_checks(lib) -> None:
    """Every layout of lanes, both kernels, tails of all three sizes, parts of K, nested scales, strides."""
    runs, dtype = Runs(nf4_linear.forward(lib, 2), None), torch.bfloat16
    for M in (2, 5, 33):
        check_forward(runs, Case(M, 37, 320, dtype, bias=torch.float32, addend=True, layout="rows"))
        check_forward(runs, Case(M, 21, 96, dtype, "fp4", 32, nested=True))
        check_forward(runs, Case(M, 300, 1152, dtype, "nf4", 128, nested=True))
        check_forward(runs, Case(M, 9, 192, dtype, layout="columns", addend=True))
        check_forward(runs, Case(M, 9, 192, dtype, layout="offset"))
        check_forward(runs, Case(M, 37, 64, dtype))  # rows that W lacks lie where reading is an error
    check_forward(runs, Case(1, 9, 20_480, dtype))


def test_the_checks_pass_without_a_fault(cache):
    all_checks(library(cache, nf4_linear.SOURCE, BF16_ONLY))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(cache, fault):
    with pytest.raises((AssertionError, RuntimeError)) as seen:
        all_checks(library(cache, nf4_linear.SOURCE, [FAULTS[fault], *BF16_ONLY]))
    assert "failed:" not in str(seen.value), "the fault does not compile"
    assert not isinstance(seen.value, nf4_linear.NotTaken)
