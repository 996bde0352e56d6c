"""The Triton 4-bit linear's value tests: on a GPU, or on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).

test_nf4_linear_triton.py runs them, in a process of their own where there is no GPU.
"""

import bounds
import nf4_linear_checks as checks
import pytest
import torch
from nf4_linear_checks import Case, inputs

from peft_kernels.kernels.nf4_linear import configs, triton_impl
from peft_kernels.kernels.nf4_linear.configs import Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = checks.Runs(triton_impl.nf4_linear_fwd, triton_impl.nf4_linear_bwd)
NARROW = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_values(check, dtype):
    # All but few rows is a BLAS's, which may make one chain of a sum.
    with bounds.sums_in_one_chain():
        check(RUNS, dtype, DEVICE)


@pytest.fixture
def always_rows():
    """The kernel for few rows wherever it can run, at whichever M the model says chunks."""
    with configs.force(path="rows"):
        yield


def check_rows(case: Case) -> None:
    """The forward within the tight bound, by the kernel for few rows."""
    assert configs.pick_rows(case.M, case.N, case.K, case.blocksize, case.dtype, 90) is not None
    checks.check_forward(RUNS, case, DEVICE)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("M", [1, 16, 17, 33, 64])
def test_few_rows(always_rows, M, dtype):
    """Every tile of M; one, two and four groups with a scale in a tile of K; tails along N and K."""
    for K, blocksize, nested in ((96, 32, True), (576, 64, True), (640, 128, False), (1664, 4096, True)):
        check_rows(Case(M, 67, K, dtype, blocksize=blocksize, nested=nested, bias=torch.float32, addend=True))
        check_rows(Case(M, 130, K, dtype, "fp4", blocksize, nested, layout="transposed"))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_few_rows_of_long_sums(always_rows, dtype):
    for M in (1, 30):
        check_rows(Case(M, 3, 40_000, dtype, positive=True))


@pytest.fixture
def small_plans(monkeypatch):
    """Many parts and many chunks at small shapes: what large ones have."""
    plans = triton_impl._rows_plan, triton_impl._sum_plan
    for plan in plans:
        plan.cache_clear()
    original = configs.pick_rows

    def rows(M, N, K, blocksize, dtype, arch):
        found = original(M, N, K, blocksize, dtype, arch)
        return found and Rows(found.block_m, min(found.group, 32), 64, 16, 32)

    monkeypatch.setattr(triton_impl, "pick_rows", rows)
    for module in (configs, triton_impl):
        monkeypatch.setattr(module, "chunk_lines", lambda lines, length, dtype: min(lines, 64))
    yield
    for plan in plans:
        plan.cache_clear()


@pytest.mark.parametrize("dtype", checks.DTYPES[:3], ids=str)
def test_small_plans(small_plans, dtype):
    for M, N, K in ((3, 150, 320), (65, 150, 200), (70, 129, 136), (66, 131, 77), (2, 64, 72)):
        for nested in (False, True):
            with bounds.sums_in_one_chain():
                checks.check(RUNS, Case(M, N, K, dtype, nested=nested, addend=nested, bias=torch.float64), DEVICE)
                checks.check(RUNS, Case(M, N, K, dtype, "fp4", 128, bias=dtype, addend=True), DEVICE)


WORK = [(3, 70, 1024), (64, 40, 512), (65, 600, 64), (70, 33, 77), (3, 33, 77), (0, 5, 64), (4, 0, 64), (4, 5, 0)]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"])
@pytest.mark.parametrize("dtype", checks.DTYPES[:3], ids=str)
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
@pytest.mark.parametrize("shape", WORK, ids=str)
def test_the_declared_workspace_is_what_is_allocated(shape, small, dtype, layout, monkeypatch, request):
    """Beside the result: parts or a chunk, a copy of x that no BLAS reads in place, a bias in another dtype."""
    if small:
        request.getfixturevalue("small_plans")
    case = Case(*shape, dtype, bias=torch.float64, addend=False)
    data = inputs(case, DEVICE)
    x, dy = (_laid_out(matrix, layout) for matrix in (data.x, data.dy))
    made = []
    for name in ("new_empty", "contiguous", "to"):
        original = getattr(torch.Tensor, name)

        def counting(tensor, *args, original=original, name=name, **options):
            out = original(tensor, *args, **options)
            if name != "to" or tensor is data.bias:  # the interpreter casts too
                made.append(0 if out is tensor else out.nbytes)
            return out

        monkeypatch.setattr(torch.Tensor, name, counting)
    for run, declared, args in (
        (triton_impl.nf4_linear_fwd, triton_impl.nf4_linear_fwd_workspace, (x, *data.fwd_args()[1:])),
        (triton_impl.nf4_linear_bwd, triton_impl.nf4_linear_bwd_workspace, (dy, *data.bwd_args()[1:])),
    ):
        if args[0].numel() == 0 or args[-1] == 0:
            assert declared(*args) == 0
            continue
        made.clear()
        out = run(*args)
        assert sum(made) == declared(*args) + out.nbytes


def _laid_out(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    """As it is, with columns side by side, or with every second element of a row."""
    if layout == "transposed":
        return matrix.t().contiguous().t()
    return torch.stack([matrix, matrix], 2).flatten(1)[:, ::2] if layout == "gaps" else matrix
