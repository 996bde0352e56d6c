"""bias_grad against fp64 truth, for every implementation: sizes, strides, long sums, inf and NaN, threads, the op."""

import bias_grad_checks as checks
import bounds
import pytest
import torch
from bias_grad_checks import DTYPES, LARGE, gradient, run_of, wide

from peft_kernels._core.registry import OWNERS
from peft_kernels.kernels.bias_grad import op, reference

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_values(impl, check, dtype):
    check(run_of(impl.name), dtype, impl.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(impl, shape, dtype):
    checks.check(run_of(impl.name), gradient(*shape, dtype, impl.device))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_million_terms_of_one_sign(impl, dtype):
    checks.check_same_sign(run_of(impl.name), dtype, impl.device)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_offsets_of_64_bits(impl, dtype):
    checks.check_far(run_of(impl.name), dtype, impl.device)


def test_more_than_2_to_the_32_elements(impl):
    """One row again and again: 2**20 x 4100 elements, and a count that fp32 holds."""
    dy = torch.ones(1, 4100, dtype=torch.bfloat16, device=impl.device).expand(2**20, 4100)
    if run_of(impl.name) is reference.bias_grad or OWNERS["bias_grad", impl.device.upper()] == "reference":
        pytest.skip("Torch's own sum takes a minute on a CPU")
    assert (run_of(impl.name)(dy, torch.float32) == 2.0**20).all()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_same_bits_for_any_number_of_threads(impl, dtype):
    if OWNERS["bias_grad", "CPU"] == "reference" or impl.name == "reference":
        pytest.skip("a promise of the C++ kernel; Torch's sum makes none")
    before, run = torch.get_num_threads(), run_of(impl.name)
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            layouts = ("contiguous", "rows", "transposed", "columns")
            found.append([run(gradient(2053, N, dtype, impl.device, la), dtype) for la in layouts for N in (3, 300)])
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], one, strict=True))


def test_truth_is_the_references_formula():
    dy = gradient(130, 57, torch.float64, "cpu")
    torch.testing.assert_close(reference.bias_grad(dy, dy.dtype), dy.sum(0))


def test_the_bound_is_a_few_roundings():
    """A bound of many units would catch nothing: of terms of one sign, half an ulp of the output and 16 u of fp32."""
    dy = gradient(1000, 33, torch.bfloat16, "cpu").abs()
    for dtype, units in ((torch.bfloat16, 1.1), (torch.float32, 16.1)):
        value, error = checks.bounds_sums.bias_grad(dy, dtype)
        assert (error / value).max() <= units * bounds.unit_roundoff(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_opcheck(device, layout, dtype):
    """Schema, fake kernel and functionalisation agree with what the kernels do."""
    for shape in ((37, 53), (0, 5), (3, 0)):
        for out in {dtype, wide(dtype)}:
            torch.library.opcheck(op.bias_grad, (gradient(*shape, dtype, device, layout), out))


@pytest.mark.parametrize(
    "dy, dtype, message",
    [
        (torch.zeros(4), torch.float32, r"dy has shape \[4\]; expected two dimensions"),
        (torch.zeros(4, 5), torch.bfloat16, "dtype is (torch.bfloat16|BFloat16); expected (torch.float32|Float)"),
        (torch.zeros(4, 5).half(), torch.bfloat16, "dtype is (torch.bfloat16|BFloat16); expected (torch.float16|Half)"),
        (torch.zeros(4, 5).double(), torch.float32, "dtype is (torch.float32|Float); expected (torch.float64|Double)"),
    ],
)
def test_bad_arguments_are_refused(device, dy, dtype, message):
    for run in (reference.bias_grad, op.bias_grad):
        with pytest.raises((ValueError, RuntimeError), match=message):
            run(dy.to(device), dtype)
