"""The 4-bit linear's CUDA kernels, run on a CPU: every y within the bound of tests/bounds_nf4.py."""

import ctypes

import nf4_linear_checks as checks
import pytest
import torch
from cuda_host import nf4_linear
from cuda_host.build import CXX, library
from cuda_host.memory import at, memory
from nf4_linear_checks import Case, Runs, check_forward

from peft_kernels.formats.nf4 import BLOCKSIZES
from peft_kernels.kernels.nf4_linear import reference

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def lib(pytestconfig):
    return library(pytestconfig.cache.mkdir("cuda_host"), nf4_linear.SOURCE)


def runs(lib, sm_count: int = 4) -> Runs:
    return Runs(nf4_linear.forward(lib, sm_count), None)


def or_reference(lib) -> Runs:
    """Calls that the kernels do not take go where the extension sends them: elsewhere."""
    kernel = nf4_linear.forward(lib)

    def forward(*args):
        try:
            return kernel(*args)
        except nf4_linear.NotTaken:
            return reference.nf4_linear_fwd(*args)

    return Runs(forward, reference.nf4_linear_bwd)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 7, 8, 9, 15, 16, 17, 25, 31, 32, 33, 40, 48, 49, 57, 63, 64])
def test_rows(lib, M, dtype):
    """Each number of column tiles, full and not; N and K with tails of every tile, K in one part and in several."""
    for N, K in ((1, 64), (37, 320), (130, 192), (129, 64)):
        check_forward(runs(lib), Case(M, N, K, dtype, nested=N % 2 == 0))
    check_forward(runs(lib), Case(M, 5, 2112, dtype, quant_type="fp4", bias=dtype, addend=True))


@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_rows_of_float32(lib, M):
    for N, K in ((1, 32), (37, 320), (9, 4128), (130, 2048), (3, 9216)):
        for nested in (False, True):
            check_forward(runs(lib), Case(M, N, K, torch.float32, blocksize=32, nested=nested, bias=torch.float32))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocksizes(lib, blocksize, nested):
    """Rows of one block and of several, K no multiple of what a warp takes at once."""
    for M, dtype in (
        (2, torch.bfloat16),
        (5, torch.float16),
        (16, torch.bfloat16),
        (30, torch.float16),
        (64, HALVES[0]),
    ):
        for K in {blocksize, 3 * blocksize, 32 * blocksize if blocksize < 128 else 5 * blocksize}:
            case = Case(M, 21, K, dtype, ("nf4", "fp4")[M % 2], blocksize, nested, addend=True)
            check_forward(runs(lib), case)
    check_forward(runs(lib), Case(3, 300 if blocksize < 64 else 40, 4096, torch.bfloat16, "nf4", blocksize, nested))


@pytest.mark.parametrize("sm_count", [1, 7, 132])
@pytest.mark.parametrize("M", [1, 6, 14, 20, 60])
def test_any_number_of_sms(lib, M, sm_count):
    for N, K, blocksize in ((300, 1024, 32), (40, 4160, 64), (129, 1536, 256)):
        check_forward(runs(lib, sm_count), Case(M, N, K, torch.bfloat16, "nf4", blocksize, N == 40))


@pytest.mark.parametrize("dtype", nf4_linear.DTYPES, ids=str)
@pytest.mark.parametrize("layout", checks.LAYOUTS)
def test_layouts(lib, layout, dtype):
    for M in (1, 2, 4) if dtype == torch.float32 else (1, 2, 4, 19):
        check_forward(runs(lib), Case(M, 33, 192, dtype, layout=layout, addend=True, bias=dtype))


@pytest.mark.parametrize("dtype", nf4_linear.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["check_features", "check_not_finite", "check_repeats"])
def test_the_ops_own_checks(lib, name, dtype):
    getattr(checks, name)(or_reference(lib), dtype, "cpu")


@pytest.mark.parametrize("dtype", nf4_linear.DTYPES, ids=str)
def test_long_sums(lib, dtype):
    """Of one sign over K: one long chain of additions would drift."""
    for M in (1, 2, 3) if dtype == torch.float32 else (1, 2, 3, 30):
        check_forward(runs(lib), Case(M, 3, 40_000, dtype, blocksize=32, positive=True))
        check_forward(runs(lib, 1), Case(M, 300 if M == 3 else 3, 20_480, dtype, positive=True))


def test_a_row_does_not_depend_on_the_others(lib):
    """Whatever runs beside it: the same bits for a row of x in each of the tensor cores' kernels."""
    data = checks.inputs(Case(64, 40, 320, torch.bfloat16))
    kernel = nf4_linear.forward(lib, 1)
    for M in (8, 16, 32, 64):
        whole = kernel(data.x[:M], *data.fwd_args()[1:])
        data.x[1:M] = data.x[1:M].flip(0)
        assert torch.equal(whole[:1], kernel(data.x[:M], *data.fwd_args()[1:])[:1])


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, 1), ({"M": 64}, 1), ({"M": 65}, 0), ({"dtype": 2, "M": 4}, 1), ({"dtype": 2, "M": 5}, 0), ({"dtype": 3}, 0),
    ({"K": 96}, 0), ({"K": 63}, 0), ({"K": 2**26 + 64}, 0), ({"N": 0}, 0), ({"K": 0}, 0), ({"packed": 8}, 0),
    ({"blocksize": 48}, 0), ({"blocksize": 32, "K": 96}, 1), ({"bias": 2, "bias_dtype": 3}, 0), ({"x": 2}, 1),
])  # fmt: skip
def test_what_is_taken(lib, changes, expected):
    args = nf4_linear.Linear(M=5, N=7, K=128)
    args.weight.blocksize = 64
    for name, value in changes.items():
        setattr(args.weight if name in ("packed", "blocksize") else args, name, value)
    assert lib.nf4_linear_takes(ctypes.byref(args)) == expected


def test_wrong_calls(lib):
    data = checks.inputs(Case(9, 5, 1024, torch.bfloat16))
    with memory(lib) as device:
        kernel = nf4_linear.linear
        kernel(lib, device, 4, *data.fwd_args())
        args = nf4_linear.Linear(M=9, N=5, K=1024, x_row=1024, x_column=1)
        args.weight = nf4_linear.put_weight(device, data.weight.tensors(), "nf4", 64, 5 * 1024)
        args.x, args.y = at(device.put(data.x, align=16)).value, at(device.empty((9, 5), torch.bfloat16)).value
        assert nf4_linear.workspace_bytes(lib, args, 4) > 0
        assert lib.nf4_linear_cuda(ctypes.byref(args), 4, None) == 1, "no workspace"
        assert lib.nf4_linear_cuda(ctypes.byref(args), 0, None) == 1, "no SMs"
        args.weight.absmax = None
        assert lib.nf4_linear_cuda(ctypes.byref(args), 4, None) == 1, "no scales"
        assert lib.nf4_linear_cuda(ctypes.byref(nf4_linear.Linear(N=1, K=1)), 4, None) == 1, "no blocksize"


def test_the_workspace_is_bounded(lib):
    """No more bytes of sums than half of the packed weight's, but where long sums have to be cut."""
    for M in (3, 8, 16, 33, 64):
        for N, K in ((64, 64), (4096, 4096), (14_336, 4096), (4096, 14_336), (1024, 8192)):
            args = nf4_linear.Linear(M=M, N=N, K=K)
            args.weight.blocksize = 64
            asked = nf4_linear.workspace_bytes(lib, args, 132)
            cut = -(-K // (96 * 64))
            assert (4 * M * N * cut if cut > 1 else 0) <= asked, f"one long chain of {M}, {N}, {K}"
            assert asked <= max(N * K // 4, 4 * M * N * cut if cut > 1 else 0), (M, N, K)
