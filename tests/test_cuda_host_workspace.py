"""The temporaries that the operators declare to the memory predictor: no fewer than the CUDA kernels ask for."""

from itertools import product

import pytest
import torch
from cuda_host import act, bias_grad, nf4_linear, norm
from cuda_host.build import CXX, library

from peft_kernels._core.registry import WORKSPACE

pytest.importorskip("triton", reason="without Triton, which is optional, nothing is declared")
from peft_kernels.kernels._shared import cuda_sums  # noqa: E402
from peft_kernels.kernels.nf4_linear.configs import MOST_ROWS, chunk_columns, chunk_lines  # noqa: E402

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

SHAPES = list(product((1, 5, 63, 65, 512, 8192, 2**20), (8, 264, 384, 2048, 4096, 6144, 8192, 28_672, 128_256)))
SMS = (108, 192)
ALLOWED = 1.5
"""Times the most that any call here asks for, over all its shapes and on the largest GPU."""


@pytest.fixture(scope="module")
def lib(pytestconfig):
    cache = pytestconfig.cache.mkdir("cuda_host")
    return lambda source: library(cache, source)


def matrix(M: int, N: int, dtype: torch.dtype, transposed: bool = False) -> torch.Tensor:
    one = torch.empty((M, N), dtype=dtype, device="meta")
    return one.as_strided((M, N), (1, M)) if transposed else one


def hold(op: str, asked: dict[tuple, int], declared: dict[tuple, int]) -> None:
    short = {case: (size, declared[case]) for case, size in asked.items() if size > declared[case]}
    assert not short, f"{op}: more asked for than declared: {short}"


def hold_tight(bounds: list[int], asked: dict[tuple, int]) -> None:
    assert max(bounds) <= ALLOWED * max(asked.values())


@pytest.mark.parametrize("dtype", bias_grad.DTYPES, ids=str)
def test_bias_grad(lib, dtype):
    asked, declared = {}, {}
    for case in product(SHAPES, (False, True), SMS):
        (M, N), transposed, sm_count = case
        dy = matrix(M, N, dtype, transposed)
        asked[case] = bias_grad.workspace_bytes(lib(bias_grad.SOURCE), bias_grad.call(dy, True), sm_count)
        declared[case] = WORKSPACE["bias_grad"](dy, torch.float32)
    hold("bias_grad", asked, declared)
    hold_tight([cuda_sums.column_sums(*shape, dtype) for shape in SHAPES], asked)


@pytest.mark.parametrize("dtype", act.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_act_bwd(lib, activation, dtype):
    asked, declared = {}, {}
    for case in product(SHAPES, (False, True), SMS, (False, True)):
        (M, N), transposed, sm_count, fp32 = case
        dy = matrix(M, N, dtype, transposed)
        kept = matrix(M, -(-N // 8), torch.uint8) if activation == "relu" else dy
        args = act.call(dy, kept, activation, fp32)
        args.dz = args.dbias = 16  # only looked at
        asked[case] = act.workspace_bytes(lib(act.SOURCE), args, sm_count)
        declared[case] = WORKSPACE["act_bwd"](dy, kept, activation, True, True, torch.float32 if fp32 else dtype)
    hold("act_bwd", asked, declared)


@pytest.mark.parametrize("dtype", norm.DTYPES, ids=str)
@pytest.mark.parametrize("need_dx", [True, False], ids=["dx", "sums"])
def test_norm_bwd(lib, need_dx, dtype):
    asked, declared = {}, {}
    for case in product(
        SHAPES, SMS, (99 << 10, norm.H100), ((True, True), (False, True), (True, False), (False, False))
    ):
        (M, K), sm_count, shared_bytes, needed = case
        x, row, column = matrix(M, K, dtype), matrix(K, 1, dtype)[:, 0], matrix(M, 1, torch.float32)[:, 0]
        args = norm.Backward(M=M, K=K, x_row_stride=K, dy_row_stride=K, dtype=norm.DTYPES[dtype], need_dx=need_dx)
        args.need_dweight, args.need_dbias = needed
        asked[case] = norm.workspace_bytes(lib(norm.BACKWARD), args, norm.Gpu(sm_count, shared_bytes))
        needs = need_dx, *needed
        declared[case] = WORKSPACE["norm_bwd"](x, None, x, column, column, row, False, *needs, dtype, dtype)
    hold("norm_bwd", asked, declared)
    if need_dx:
        hold_tight([cuda_sums.norm_sums(*shape, 2, dtype) for shape in SHAPES], asked)


@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_nf4_linear(lib, blocksize):
    asked, declared = {}, {}
    shapes = product((1, 2, 3, 8, 16, 17, 64), (64, 1000, 4096, 14_336, 128_256), (256, 4096, 14_336, 28_672))
    for case in product(shapes, nf4_linear.DTYPES, SMS):
        (M, N, K), dtype, sm_count = case
        args = nf4_linear.Linear(M=M, N=N, K=K, dtype=nf4_linear.DTYPES[dtype])
        args.weight.blocksize = blocksize
        asked[case] = nf4_linear.workspace_bytes(lib(nf4_linear.SOURCE), args, sm_count)
        declared[case] = cuda_sums.nf4_parts(M, N, K, blocksize, dtype)
    hold("nf4_linear_fwd", asked, declared)
    hold_tight(list(declared.values()), asked)


@pytest.mark.parametrize("dtype", nf4_linear.DTYPES, ids=str)
def test_nf4_linear_by_chunks(lib, dtype):
    """Python's few rows and chunks are C++'s: what is declared for many rows is what the extension holds."""
    library = lib(nf4_linear.SOURCE)
    assert nf4_linear.most_rows(library, torch.bfloat16) == nf4_linear.most_rows(library, torch.float16) == MOST_ROWS
    sizes = (1, 5, 64, 70, 264, 4096, 4104, 14_336, 28_672, 128_256, 1_000_000)
    for N, K in product(sizes, sizes):
        assert nf4_linear.chunk(library, N, K, dtype, False) == chunk_lines(N, K, dtype), (N, K)
        assert nf4_linear.chunk(library, N, K, dtype, True) == chunk_columns(N, K, dtype), (N, K)
