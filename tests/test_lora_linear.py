"""The LoRA linear's ops against fp64 truth, for every implementation: values, gradients, layouts, dropout, repeats."""

from contextlib import nullcontext
from dataclasses import replace

import bounds
import checks
import pytest
import torch
from cases import ALIGNED_CASES, DTYPES, LONG_SUMS, VALUE_CASES, Case, inputs, lay_out

from peft_kernels._core.registry import OWNERS
from peft_kernels.kernels.lora_linear import reference

pytestmark = pytest.mark.usefixtures("poisoned")


def test_fresh_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()


@pytest.mark.parametrize("case", VALUE_CASES, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_values(impl, check, case):
    check(impl, case)


@pytest.mark.parametrize("case", ALIGNED_CASES, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_values_where_rows_start_on_16_bytes(impl, check, case):
    check(impl, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_parameters_from_a_flat_buffer(impl, dtype):
    """Contiguous, but aligned to nothing: what slices of a flat parameter buffer are."""
    data = inputs(Case(2048, 2048, 264, 16, dtype), impl.device)
    lora_a, lora_b, bias = (lay_out(tensor, "offset") for tensor in (data.lora_a, data.lora_b, data.bias[None]))
    checks.round_trip(impl, replace(data, lora_a=lora_a, lora_b=lora_b, bias=bias[0]))


@pytest.mark.parametrize("case", LONG_SUMS, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_long_sums_of_one_sign(impl, check, case):
    # MKL adds 20,000 fp32 terms of a skinny product in one chain. The sums over N and K of the base products are the
    # BLAS's; those over M are of adapter and bias gradients alone, which our kernels cut into partial sums.
    by_blas = impl.name.startswith("reference") or OWNERS["lora_linear_bwd", impl.device.upper()] == "reference"
    with bounds.sums_in_one_chain() if by_blas or case.M < case.N + case.K else nullcontext():
        check(impl, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_any_subset_of_gradients(impl, dtype, dropout):
    checks.check_subsets(impl, Case(37, 53, 71, 12, dtype, dropout=dropout))
    checks.check_subsets(impl, Case(9, 17, 13, 3, dtype, dropout=dropout, weight=None))
    checks.check_subsets(impl, Case(70, 264, 136, 16, dtype, dropout=dropout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_same_bits_every_run_and_inputs_untouched(impl, dtype, dropout):
    checks.check_repeats(impl, Case(257, 300, 515, 24, dtype, dropout=dropout))
    checks.check_repeats(impl, Case(1030, 520, 264, 64, dtype, dropout=dropout))
    checks.check_repeats(impl, Case(37, 53, 71, 3, dtype, dropout=dropout, layout="transposed"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tiny_values_stay_inside_the_underflow_terms(impl, dtype):
    """Values near the bottom of the range: only flushing to zero or gradual underflow is allowed."""
    data = inputs(Case(37, 53, 71, 8, dtype), impl.device)
    small = torch.finfo(dtype).smallest_normal
    x, a = (data.x * small).contiguous(), data.lora_a
    y, s, mask = impl.fwd(x, data.weight, a, data.lora_b, None, None, data.scaling, 0)
    truth = bounds.forward(x, data.weight, a, data.lora_b, None, mask, data.scaling)
    bounds.assert_within(s, *truth["s"], "s")
    bounds.assert_within(y, *truth["y"], "y")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_are_not_hidden(impl, dtype):
    """A NaN in x reaches its row of y and no other, also when the low-rank branch drops it."""
    data = inputs(Case(9, 17, 71, 3, dtype, dropout=0.5), impl.device)
    x = data.x.clone()
    x[4, 7], x[6, 2] = torch.nan, torch.inf
    y, _, _ = impl.fwd(x, data.weight, data.lora_a, data.lora_b, data.bias, data.seed, data.scaling, data.threshold)
    broken = ~y.isfinite().all(1)
    assert broken.tolist() == [row in (4, 6) for row in range(9)]


@pytest.mark.parametrize("case", [Case(13, 17, 21, 5, torch.float64, dropout=p) for p in (0.0, 0.5)], ids=str)
def test_truth_is_the_references_formula(case):
    """The fp64 values in `bounds` were written apart from the reference: the two agree to fp64 accuracy."""
    data = inputs(case)
    args = data.weight, data.lora_a, data.lora_b
    y, s, mask = reference.lora_linear_fwd(data.x, *args, data.bias, data.seed, data.scaling, data.threshold)
    grads = reference.lora_linear_bwd(data.dy, data.x, *args, s, mask, data.scaling, True, True, True, True)
    truth = bounds.forward(data.x, *args, data.bias, data.mask, data.scaling)
    truth |= bounds.backward(data.dy, data.x, *args, s, data.mask, data.scaling)
    for name, value in zip(("y", "s", *checks.GRADIENTS), (y, s, *grads), strict=True):
        torch.testing.assert_close(value, truth[name][0])


def test_bound_is_of_the_size_of_the_rounding():
    """A bound of many ulps would catch nothing: the median one is a few units of the output's rounding."""
    data = inputs(Case(130, 257, 193, 16, torch.bfloat16))
    args = data.weight, data.lora_a, data.lora_b
    truth = bounds.forward(data.x, *args, data.bias, data.mask, data.scaling)
    truth |= bounds.backward(data.dy, data.x, *args, None, data.mask, data.scaling)
    for name in ("y", "s", "dx"):
        value, bound = truth[name]
        relative = (bound.median() / value.abs().median()).item()
        assert relative <= 16 * bounds.unit_roundoff(torch.bfloat16), f"{name}: {relative}"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(impl, threads):
    """Rows and columns are shared out among threads: none twice, none left out, the same bits every run."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case in (Case(500, 130, 259, 12, torch.bfloat16, dropout=0.5), Case(7, 1000, 300, 3, torch.float32)):
            for check in (*checks.CHECKS, checks.check_repeats):
                check(impl, case)
    finally:
        torch.set_num_threads(before)
