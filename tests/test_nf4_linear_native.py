"""The C++ kernels of nf4_linear for every instruction set that is here, on shapes around their chunks and panels."""

from dataclasses import replace

import bounds
import bounds_nf4
import nf4_linear_checks as checks
import pytest
import torch
from guarded import guarded
from nf4_linear_checks import DTYPES, Case, inputs

from peft_kernels._core import native
from peft_kernels.kernels.nf4_linear import op

_C = native.EXTENSIONS.get("_C_cpu")
pytestmark = [
    pytest.mark.skipif(_C is None, reason=f"_C_cpu: {native.MISSING.get('_C_cpu')}"),
    pytest.mark.usefixtures("poisoned"),
]

RUNS = checks.runs_of("op")


@pytest.fixture(params=_C.available_isas() if _C else [])
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_values(isa, check, dtype):
    check(RUNS, dtype, "cpu")


# A chunk is 64 elements of a row, a run 16 to 64 chunks; rows of W go by 1 to 4 and by stripes of 60 or 64, rows of x
# by 6, up to 12 at once, and by 4 MB; panels are 8 to 64 columns, decoded 256 rows at a time: one less, one more.
EDGES = [(M, N, 4096 + 64 * c) for M, N in ((1, 5), (2, 9), (7, 6)) for c in (-1, 0, 1, 65)]
EDGES += [(M, N, 64) for M in (1, 4) for N in (1, 3, 4, 63, 64, 65, 127, 129, 260)]
EDGES += [(M, N, 128) for M, N in ((3, 61), (5, 62), (6, 67), (7, 64), (8, 68), (9, 63), (10, 65), (12, 66), (13, 1))]
EDGES += [(M, 5, 4096 + 64) for M in (3, 8, 9, 12)]
EDGES += [(30, N, K) for N, K in ((255, 66), (257, 65), (511, 257), (300, 8), (130, 191), (17, 513))]
EDGES += [(511, 10, 64), (515, 130, 33), (1025, 3, 70)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges(isa, threads, dtype):
    for size in EDGES:
        case = Case(*size, dtype, nested=size[1] % 2 == 0, bias=dtype)
        checks.check(RUNS, case)
        checks.check_forward(RUNS, replace(case, blocksize=256, quant_type="fp4"))


# Of one or two rows of x: W in two or four streams of a thread's rows, up to 512 at a time; 32 or 64 chunks to a chain,
# which may end in another group of 256 scales than it begins in, with 64 and with 128 elements to a scale.
STREAMS = [(M, N, K) for M in (1, 2, 3) for N, K in ((2, 64), (7, 128), (9, 4032), (10, 4160), (6, 8256))]
STREAMS += [(M, 9, K) for M in (1, 2, 3, 8) for K in (1984, 2048, 2112)]
STREAMS += [(M, N, 64) for M in (1, 2) for N in (511, 512, 513, 1023, 1030)]


@pytest.mark.parametrize("blocksize", [64, 128, 1024])
def test_one_element_of_x_brings_the_weights_own_values(isa, blocksize):
    """To the bit: a bound does not see whether a scale was rounded after its product and again after its sum."""
    case = Case(2, 67, 64 * 61, blocksize=blocksize, nested=True)
    data = inputs(case)
    values = bounds_nf4.values(data.weight).float()
    for k in range(0, case.K, 119):
        x = torch.zeros(2, case.K)
        x[0, k] = x[1, -1 - k] = 1.0
        two = op.nf4_linear_fwd(x, *data.fwd_args()[1:6], None, None, "nf4", blocksize, case.N)
        one = op.nf4_linear_fwd(x[:1], *data.fwd_args()[1:6], None, None, "nf4", blocksize, case.N)
        assert torch.equal(two, torch.stack([values[:, k], values[:, -1 - k]])) and torch.equal(one, two[:1]), k


# A few rows of dy: rows of W by 16, whose sums join a total every 1024; columns by 2048 or a share of them; rows
# of dy by 4 and 8, up to 32 or 48 of them.
DOWN = [(M, N, K) for M in (1, 4, 5, 8) for N, K in ((0, 64), (1, 128), (15, 192), (16, 64), (17, 320), (33, 4160))]
DOWN += [(M, 1041, 128) for M in (1, 2, 3)] + [(M, 18, 192) for M in (9, 16, 31, 32, 33, 47, 48, 49)] + [(1, 2063, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streams(isa, threads, dtype):
    for size in STREAMS:
        case = Case(*size, dtype, nested=size[1] % 2 == 0, bias=dtype, addend=size[0] == 2)
        checks.check_forward(RUNS, case)
        checks.check_forward(RUNS, replace(case, blocksize=128))
        checks.check_forward(RUNS, replace(case, blocksize=1024, quant_type="fp4", layout="rows"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_down_the_rows(isa, threads, dtype):
    for size in DOWN:
        case = Case(*size, dtype, nested=size[1] % 2 == 0, addend=size[0] % 2 == 0)
        checks.check_backward(RUNS, case)
        checks.check_backward(RUNS, replace(case, blocksize=1024, quant_type="fp4", layout="rows"))


# Many long rows of x: from 768 KB on a strip is a whole stripe; above 4 MB and 96 rows they go in several passes.
LONG = [(97, 9, 21_952), (98, 70, 21_953)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows(isa, threads, dtype):
    for size in LONG:
        checks.check_forward(RUNS, Case(*size, dtype, nested=size[1] == 9, bias=dtype, addend=True, layout="rows"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(isa, dtype):
    """Sums are never shared among threads."""
    sizes = (1, 67, 192), (2, 1100, 2240), (5, 130, 256), (7, 94, 2112), (8, 97, 192), (12, 130, 64), (70, 130, 77)
    for size in sizes:
        for nested in (False, True):
            assert_same_bits(Case(*size, dtype, nested=nested))


def assert_same_bits(case: Case) -> None:
    """Of y and dx, on every number of threads."""
    data, before, found = inputs(case), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((op.nf4_linear_fwd(*data.fwd_args()), op.nf4_linear_bwd(*data.bwd_args())))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True)), str(case)


@pytest.fixture
def precision():
    """Torch's two settings for fp32 products, set back at the end."""
    matmul = torch.backends.mkldnn.matmul
    before, there = torch.get_float32_matmul_precision(), matmul.fp32_precision
    yield matmul
    torch.set_float32_matmul_precision(before)
    matmul.fp32_precision = there


@pytest.fixture(params=["set_float32_matmul_precision", "mkldnn.matmul.fp32_precision"])
def rounding(request, precision):
    """The user lets fp32 products round to bf16, by either setting."""
    if request.param == "set_float32_matmul_precision":
        torch.set_float32_matmul_precision("medium")
    else:
        precision.fp32_precision = "bf16"


SOME_ROWS = [(1, 67, 192), (2, 9, 4160), (8, 67, 128), (13, 70, 192), (40, 33, 65), (97, 9, 320)]


def test_fp32_rounds_to_bf16_where_the_user_lets_it(isa, rounding):
    """Within the bound of rounded factors, and not exact any more; elsewhere nothing changes."""
    for size in SOME_ROWS:
        data = inputs(Case(*size, bias=torch.float32, addend=True, nested=size[0] % 2 == 0))
        y, dx = op.nf4_linear_fwd(*data.fwd_args()), op.nf4_linear_bwd(*data.bwd_args())
        exact = bounds_nf4.forward(data.x, data.weight, data.bias, data.addend)
        if isa == "avx512bf16":
            args = data.x, data.weight, data.bias, data.addend, torch.bfloat16
            bounds.assert_within(y, *bounds_nf4.forward(*args), f"y of {size}")
            args = data.dy, data.weight, data.dx_addend, torch.bfloat16
            bounds.assert_within(dx, *bounds_nf4.backward(*args), f"dx of {size}")
            assert ((y - exact[0]).abs() > exact[1]).any(), "y is as exact as without the setting"
        else:
            bounds.assert_within(y, *exact, f"y of {size}")
            bounds.assert_within(dx, *bounds_nf4.backward(data.dy, data.weight, data.dx_addend), f"dx of {size}")


@pytest.mark.parametrize("asked", ["highest", "high", "medium, but no oneDNN"])
def test_fp32_is_exact_otherwise(isa, precision, asked, monkeypatch):
    """A CPU has no TF32; and where Torch's own products do not ask, ours do not."""
    torch.set_float32_matmul_precision(asked.partition(",")[0])
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", "oneDNN" not in asked)
    for size in SOME_ROWS:
        checks.check(RUNS, Case(*size))


def test_rounded_fp32_has_the_same_bits_on_every_number_of_threads(isa, rounding):
    for size in SOME_ROWS:
        assert_same_bits(Case(*size, nested=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_the_arguments_is_read(isa, threads, dtype):
    for M in (1, 2, 3, 6, 8, 9, 13, 40):
        # The last two end with a group of 256 scales.
        for N, K, blocksize in (
            (7, 384, 64),
            (61, 64, 64),
            (67, 192, 256),
            (5, 71, 32),
            (4, 4096, 64),
            (64, 1024, 256),
        ):
            for nested in (False, True):
                case = Case(M, N, K, dtype, blocksize=blocksize, nested=nested, bias=dtype, addend=True)
                data = inputs(case)
                for run, args in ((op.nf4_linear_fwd, data.fwd_args()), (op.nf4_linear_bwd, data.bwd_args())):
                    beside = [guarded(t) if isinstance(t, torch.Tensor) else t for t in args]
                    assert torch.equal(run(*beside), run(*args)), str(case)


def test_a_call_holds_no_dequantised_weight():
    """The op's temporaries: what the process grows by while it runs is far below W in bf16."""
    import resource

    data = inputs(Case(16, 4096, 8192, torch.bfloat16))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for M in (1, 16):
        args = list(data.fwd_args())
        args[0] = args[0][:M]
        op.nf4_linear_fwd(*args)
    op.nf4_linear_bwd(*data.bwd_args())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 24 << 20, f"the process grew by {grown} bytes; W in bf16 has {2 * 4096 * 8192}"
