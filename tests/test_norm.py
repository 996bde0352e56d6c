"""norm_fwd and norm_bwd against fp64 truth, for every implementation: sizes, strides, long sums, inf and NaN."""

import bounds
import bounds_norm
import norm_checks as checks
import pytest
import torch
import torch.nn.functional as F
from norm_cases import DTYPES, FULL, Kind, data, given_statistics, run_of
from norm_checks import LARGE

from peft_kernels._core.registry import OWNERS
from peft_kernels.kernels.norm import op, reference

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_values(impl, check, dtype):
    check(run_of(impl.name), dtype, impl.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=lambda one: f"{one[0]}x{one[1]}")
def test_large(impl, shape, dtype):
    M, K, kind = shape
    checks.check(run_of(impl.name), checks.data(M, K, dtype, impl.device, kind))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_million_terms_of_one_sign(impl, dtype):
    checks.check_same_sign(run_of(impl.name), dtype, impl.device)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_offsets_of_64_bits(impl, dtype):
    checks.check_far(run_of(impl.name), dtype, impl.device)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_same_bits_for_any_number_of_threads(impl, dtype):
    if OWNERS["norm_bwd", "CPU"] == "reference" or impl.name == "reference":
        pytest.skip("a promise of the C++ kernel; Torch's sums make none")
    before, run = torch.get_num_threads(), run_of(impl.name)
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            inputs = [data(M, K, dtype, impl.device, kind) for M, K in ((1237, 5), (301, 700)) for kind in FULL]
            found.append([out for one in inputs for out in checks.outputs(run, one)])
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(map(torch.equal, found[0], one))


def test_truth_is_torchs():
    """The bounds' fp64 formulas give what torch.nn.functional and autograd give."""
    for kind in (Kind(residual=True), Kind(rms=True, residual=True)):
        one = data(13, 57, torch.float64, "cpu", kind)
        x, weight, bias = (t.clone().requires_grad_() for t in (one.x + one.residual, one.weight, one.bias))
        rms = kind.rms and F.rms_norm(x, (57,), weight, one.eps) + bias
        y = rms if kind.rms else F.layer_norm(x, (57,), weight, bias, one.eps)
        torch.autograd.backward([y, x], [one.dy, one.dtotal])
        truth = bounds_norm.forward(x, weight, bias, one.eps, kind.rms, torch.float64)
        found = bounds_norm.statistics(x, one.eps, kind.rms)
        args = one.dy, one.dtotal, x, found, weight, kind.rms, torch.float64, torch.float64
        truth |= bounds_norm.backward(*args)
        for name, theirs in (("y", y), ("dx", x.grad), ("dweight", weight.grad), ("dbias", bias.grad)):
            torch.testing.assert_close(truth[name][0], theirs.detach())


def test_the_bounds_are_a_few_roundings():
    """Bounds of many units would catch nothing: in 16 bits they are half an ulp and what fp32 may lose."""
    for rms in (False, True):
        one = data(64, 300, torch.bfloat16, "cpu", Kind(rms=rms, weight=None, bias=None))
        found = bounds_norm.statistics(one.x, one.eps, rms)
        truth = bounds_norm.forward(one.x, None, None, one.eps, rms, torch.bfloat16)
        truth |= bounds_norm.backward(one.dy, None, one.x, found, None, rms, torch.bfloat16, torch.bfloat16)
        half, u = bounds.unit_roundoff(torch.bfloat16), bounds.unit_roundoff(torch.float32)
        # A sum's terms are of order 1, and there are 64 of them.
        for name, units in (("y", 64), ("dx", 64), ("dweight", 64 * 40), ("dbias", 64 * 20)):
            value, error = truth[name]
            excess = (error - half * value.abs()) / (1 + value.abs())
            assert excess.median() <= units * u, f"{name}: {excess.median() / u} u"
        if not rms:
            assert (truth["mean"][1] <= 18.1 * u * one.x.double().abs().mean(1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*FULL, Kind(), Kind(weight="other", bias=None, wide_y=True)], ids=str)
def test_opcheck(device, kind, dtype):
    """Schemas, fake kernels and functionalisation agree with what the kernels do."""
    for M, layout in ((7, "contiguous"), (7, "transposed"), (0, "contiguous")):
        one = data(M, 24, dtype, device, kind, layout)
        args = one.x, one.residual, one.weight, one.bias, one.eps, one.rms, one.y_dtype
        torch.library.opcheck(op.norm_fwd, args)
        given = given_statistics(one.x, one)
        for needed in ((True, True, True), (False, False, True), (True, False, False)):
            x, *stats = (one.x, *given) if needed != (False, False, True) else (None, None, None)
            args = one.dy, one.dtotal, x, *stats, one.weight, one.rms, *needed, one.y_dtype, dtype
            torch.library.opcheck(op.norm_bwd, args)


def _forward(**changed) -> tuple:
    z = torch.zeros
    given = {"x": z(4, 5), "residual": z(4, 5), "weight": z(5), "bias": z(5), "eps": 1e-5, "rms": False}
    return tuple({**given, "dtype": torch.float32, **changed}.values())


def _backward(**changed) -> tuple:
    z = torch.zeros
    given = {"dy": z(4, 5), "dtotal": z(4, 5), "x": z(4, 5), "mean": z(4), "rstd": z(4), "weight": z(5), "rms": False}
    given |= {"need_dx": True, "need_dweight": True, "need_dbias": True}
    return tuple({**given, "dtype": torch.float32, "dx_dtype": torch.float32, **changed}.values())


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("norm_fwd", _forward(x=torch.zeros(5)), r"x is .*\[5\]; expected two dimensions"),
        ("norm_fwd", _forward(x=torch.zeros(4, 0)), r"x is .*\[4, 0\]; expected .*K at least 1"),
        ("norm_fwd", _forward(residual=torch.zeros(3, 5)), r"residual is .*\[3, 5\]; expected .*\[4, 5\]"),
        ("norm_fwd", _forward(residual=torch.zeros(4, 5).half()), "residual is .*; expected"),
        ("norm_fwd", _forward(weight=torch.zeros(4)), r"weight is .*\[4\]; expected .*\[5\]"),
        ("norm_fwd", _forward(bias=torch.zeros(1, 5)), r"bias is .*\[1, 5\]; expected .*\[5\]"),
        ("norm_fwd", _forward(dtype=torch.bfloat16), "dtype is .*; expected"),
        ("norm_bwd", _backward(dy=torch.zeros(5)), r"dy is .*\[5\]; expected two dimensions"),
        ("norm_bwd", _backward(dy=torch.zeros(4, 5).half()), "dy is .*; expected"),
        ("norm_bwd", _backward(dtotal=torch.zeros(5, 4)), r"dtotal is .*\[5, 4\]; expected .*\[4, 5\]"),
        ("norm_bwd", _backward(x=None), "x is None; expected"),
        ("norm_bwd", _backward(x=torch.zeros(4, 5).half()), "x is .*; expected"),
        ("norm_bwd", _backward(mean=None), "mean is None; expected"),
        ("norm_bwd", _backward(mean=torch.zeros(5)), r"mean is .*\[5\]; expected .*\[4\]"),
        ("norm_bwd", _backward(rstd=None), "rstd is None; expected"),
        ("norm_bwd", _backward(rstd=torch.zeros(4).double()), "rstd is .*; expected"),
        ("norm_bwd", _backward(weight=torch.zeros(4)), r"weight is .*\[4\]; expected .*\[5\]"),
        ("norm_bwd", _backward(dtype=torch.float64), "dtype is .*; expected"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(device, name, args, message):
    args = [t.to(device) if isinstance(t, torch.Tensor) else t for t in args]
    for run in (getattr(reference, name), getattr(op, name)):
        with pytest.raises((ValueError, RuntimeError), match=f"{name}: {message}"):
            run(*args)
