"""The bindings of the 4-bit kernels for CUDA, run on a CPU over the kernels: checks, and what decides which runs."""

import bounds
import nf4_linear_checks as checks
import pytest
import torch
from cuda_host import nf4, nf4_linear
from cuda_host.bindings import Ops
from cuda_host.build import CXX
from nf4_host_checks import any_weight, equal, weights
from nf4_linear_checks import Case, Runs, inputs

from peft_kernels._core.registry import WORKSPACE
from peft_kernels.formats.nf4 import nested_code
from peft_kernels.kernels.nf4 import op as quantize_op
from peft_kernels.kernels.nf4 import reference as quantize_reference
from peft_kernels.kernels.nf4_linear import configs, op, reference

pytestmark = [pytest.mark.skipif(CXX is None, reason="needs a C++ compiler"), pytest.mark.usefixtures("poisoned")]

CHUNKS = [
    (nf4_linear.SOURCE, "kChunkBytes = 24 << 20", "kChunkBytes = 1 << 14"),
    (nf4_linear.SOURCE, "kChunkLines = 256;", "kChunkLines = 16;"),
]
"""Many chunks of a small weight."""


@pytest.fixture(scope="session")
def cache(pytestconfig):
    return pytestconfig.cache.mkdir("cuda_host")


@pytest.fixture(scope="session")
def linear(cache):
    ops = {op.nf4_linear_fwd: reference.nf4_linear_fwd, op.nf4_linear_bwd: reference.nf4_linear_bwd}
    return Ops(cache, "nf4_linear", [nf4_linear.SOURCE, nf4.DEQUANTIZE], ops, CHUNKS)


@pytest.fixture(scope="session")
def quantiser(cache):
    names = "nf4_quantize", "nf4_quantize_scales", "nf4_dequantize"
    ops = {getattr(quantize_op, name): getattr(quantize_reference, name) for name in names}
    return Ops(cache, "nf4", [nf4.QUANTIZE, nf4.DEQUANTIZE], ops)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["check_sizes", "check_layouts", "check_features", "check_not_finite", "check_repeats"]
)
def test_the_linears_own_checks(linear, name, dtype):
    with bounds.sums_in_one_chain():  # a BLAS's may be
        getattr(checks, name)(Runs(linear.nf4_linear_fwd, linear.nf4_linear_bwd), dtype, "cpu")


@pytest.mark.parametrize("dtype", nf4_linear.DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 5, 64, 65, 70])
def test_chunks(linear, M, dtype):
    """Whole chunks and a rest, one of less than a tile, columns that cannot be cut; what is added, in every chunk."""
    linear.general.clear()
    runs = Runs(linear.nf4_linear_fwd, linear.nf4_linear_bwd)
    with bounds.sums_in_one_chain():
        for N, K in ((150, 320), (129, 512), (131, 136), (64, 1000), (70, 2112)):
            for nested in (False, True):
                checks.check_backward(runs, Case(M, N, K, dtype, nested=nested, addend=nested))
                if M > 64:
                    case = Case(M, N, K, dtype, "fp4", 4096 if nested else 32, nested, torch.float32, N % 2 == 0)
                    checks.check_forward(runs, case)
    assert not linear.general


@pytest.mark.parametrize(("size", "dtype", "forward", "backward"), [
    ((64, 33, 64), torch.bfloat16, False, False), ((64, 33, 96), torch.bfloat16, True, False),
    ((65, 33, 96), torch.bfloat16, False, False), ((4, 33, 64), torch.float32, False, False),
    ((5, 33, 64), torch.float32, False, False), ((4, 33, 96), torch.float32, True, False),
    ((70, 5, 64), torch.float64, True, True), ((0, 5, 64), torch.float16, True, True),
])  # fmt: skip
def test_what_is_left_to_the_general_ops(linear, size, dtype, forward, backward):
    data = inputs(Case(*size, dtype))
    linear.general.clear()
    linear.nf4_linear_fwd(*data.fwd_args())
    linear.nf4_linear_bwd(*data.bwd_args())
    assert linear.general == ["nf4_linear_fwd"] * forward + ["nf4_linear_bwd"] * backward


def made_by(function, *args) -> tuple[torch.Tensor, list[int]]:
    """What a call returns, and the sizes of the memory that it asks Torch for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = function(*args)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return out, [event.nbytes() for event in events if event.nbytes() > 0]


@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
@pytest.mark.parametrize("size", [(70, 1024, 64), (70, 64, 1024), (70, 33, 77)], ids=str)
def test_what_is_held_is_what_is_declared(linear, size, layout, monkeypatch):
    """Beside the result a chunk, a copy of what no BLAS reads in place, a bias in another dtype: to the byte.

    In fp32: of 16-bit products a CPU's BLAS asks Torch for memory of its own.
    """
    pytest.importorskip("triton", reason="without Triton, which is optional, nothing is declared")
    monkeypatch.setattr(configs, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(configs, "_CHUNK_LINES", 16)
    data = inputs(Case(*size, torch.float32, bias=torch.float64, addend=True))
    for name, args in (("nf4_linear_fwd", data.fwd_args()), ("nf4_linear_bwd", data.bwd_args())):
        left = args[0]
        left = torch.stack([left, left], 2).flatten(1)[:, ::2] if layout == "gaps" else left
        out, made = made_by(getattr(linear, name), left, *args[1:])
        assert sum(made) == out.nbytes + WORKSPACE[name](left, *args[1:])


@pytest.mark.parametrize("size", [(3, 5, 64), (70, 33, 64)], ids=str)
def test_calls_inside_autograd(linear, size):
    """What the bindings call is below it, which would refuse to write into results that are given."""
    data = inputs(Case(*size, torch.float32, bias=torch.float32))
    calls = (linear.nf4_linear_fwd, data.fwd_args()), (linear.nf4_linear_bwd, data.bwd_args())
    want = [function(*args) for function, args in calls]
    for function, args in calls:
        args[0].requires_grad_()
        assert torch.equal(function(*args), want.pop(0))


def test_the_linears_wrong_calls(linear):
    """Named, as the reference names them."""
    data = inputs(Case(3, 5, 64, torch.bfloat16, bias=torch.bfloat16, addend=True))
    args = list(data.fwd_args())
    for at, wrong, named in (
        (0, args[0][0], "x is"), (1, args[1][:-1], "packed is"), (2, args[2].double(), "absmax is"),
        (6, args[6][:3], "bias has shape"), (7, args[7].float(), "addend is"), (8, "int4", "quant_type is"),
        (9, 48, "blocksize is"), (10, 6, "packed is"),
    ):  # fmt: skip
        for function in (linear.nf4_linear_fwd, reference.nf4_linear_fwd):
            with pytest.raises(ValueError, match=named):
                function(*args[:at], wrong, *args[at + 1 :])


@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
def test_the_quantiser(quantiser, dtype):
    quantiser.general.clear()
    values = weights(1003, dtype, 64, "nf4").view(17, 59)
    for got, want in zip(
        quantiser.nf4_quantize(values, "nf4", 64), quantize_reference.nf4_quantize(values, "nf4", 64), strict=True
    ):
        equal(got, want)
    args = any_weight(1003, "nf4", 64, True), "nf4", 64, 1003, dtype
    equal(quantiser.nf4_dequantize(*args[0], *args[1:]), quantize_reference.nf4_dequantize(*args[0], *args[1:]))
    absmax = torch.randn(300).exp()
    scales = quantiser.nf4_quantize_scales(absmax, nested_code())
    for got, want in zip(scales, quantize_reference.nf4_quantize_scales(absmax, nested_code()), strict=True):
        equal(got, want)
    assert not quantiser.general


def test_what_the_quantiser_leaves_to_the_general_ops(quantiser):
    quantiser.general.clear()
    values = torch.randn(8, 64)
    for got, want in zip(
        quantiser.nf4_quantize(values.t(), "nf4", 64),
        quantize_reference.nf4_quantize(values.t(), "nf4", 64),
        strict=True,
    ):
        equal(got, want)
    quantiser.nf4_dequantize(*any_weight(64, "nf4", 64, False), "nf4", 64, 64, torch.float64)
    assert quantiser.general == ["nf4_quantize", "nf4_dequantize"]
