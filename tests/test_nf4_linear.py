"""nf4_linear_fwd and nf4_linear_bwd of every implementation against fp64 truth, within derived bounds."""

import contextlib

import bounds
import nf4_linear_checks as checks
import pytest
import torch
from nf4_linear_checks import DTYPES, Case, inputs

from peft_kernels._core.registry import OWNERS
from peft_kernels.kernels.nf4_linear import op

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def runs(impl):
    found = checks.runs_of(impl.name)
    if found is None:
        pytest.skip("there is no Triton kernel of nf4_linear")
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_values(impl, runs, check, dtype):
    # The reference hands its sums to a BLAS, which may make one chain of them; without an extension it is the op.
    by_reference = "reference" in (impl.name.partition("[")[0], OWNERS["nf4_linear_fwd", impl.device.upper()])
    with bounds.sums_in_one_chain() if by_reference else contextlib.nullcontext():
        check(runs, dtype, impl.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [0, 1, 37])
def test_opcheck(device, M, dtype):
    for case in (Case(M, 13, 64, dtype), Case(M, 5, 31, dtype, nested=True, bias=torch.float32, addend=True)):
        data = inputs(case, device)
        for run, args in ((op.nf4_linear_fwd, data.fwd_args()), (op.nf4_linear_bwd, data.bwd_args())):
            torch.library.opcheck(run, args)


def _wrong(case: Case) -> dict[str, tuple[int, object, str]]:
    """What is wrong -> (position among the forward op's arguments, the value, what the message must say)."""
    z = torch.zeros
    return {
        "x of one dimension": (0, z(64), "x is .*expected a floating matrix"),
        "x of integers": (0, z(3, 64, dtype=torch.int32), "x is .*expected a floating matrix"),
        "packed too short": (1, z(159, dtype=torch.uint8), r"packed is .*\[159\].*expected .*\[160\]"),
        "packed of another dtype": (1, z(160), r"packed is .*expected .*\[160\]"),
        "packed with gaps": (1, z(320, dtype=torch.uint8)[::2], "packed is .*dense"),
        "absmax too long": (2, z(6), r"absmax is .*\[6\].*expected .*\[5\]"),
        "absmax of another dtype": (2, z(5).double(), "absmax is "),
        "half of double quantisation": (4, z(256), "nested_absmax is None"),
        "bias too long": (6, z(6), r"bias has shape \[6\]; expected \[5\]"),
        "addend of another shape": (7, z(3, 6), r"addend is .*\[3, 6\]; expected .*\[3, 5\]"),
        "addend of another dtype": (7, z(3, 5).half(), "addend is "),
        "quant_type": (8, "int4", "quant_type is 'int4'; expected 'nf4' or 'fp4'"),
        "blocksize": (9, 48, "blocksize is 48; expected one of"),
    }


@pytest.mark.parametrize("wrong", _wrong(Case(3, 5, 64)))
def test_bad_input_is_refused_and_named(wrong):
    at, value, message = _wrong(Case(3, 5, 64))[wrong]
    args = list(inputs(Case(3, 5, 64)).fwd_args())
    args[at] = value
    with pytest.raises(ValueError, match=f"nf4_linear: {message}"):
        op.nf4_linear_fwd(*args)


@pytest.mark.parametrize("wrong", ["packed too short", "absmax too long", "quant_type", "blocksize"])
def test_bad_input_of_the_backward_is_refused_and_named(wrong):
    at, value, message = _wrong(Case(3, 5, 64))[wrong]
    args = list(inputs(Case(3, 5, 64)).bwd_args())
    args[at if at < 6 else at - 1] = value
    with pytest.raises(ValueError, match=f"nf4_linear: {message}"):
        op.nf4_linear_bwd(*args)
