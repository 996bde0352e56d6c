"""LayerNorm's and RMSNorm's CUDA kernels, run on a CPU: every output within the bounds of tests/bounds_norm.py."""

import ctypes
from dataclasses import replace

import norm_checks
import pytest
import torch
from cuda_host import norm
from cuda_host.build import CXX, library
from cuda_host.memory import at, memory
from norm_cases import Kind, Run, check, check_gradients, check_outputs, data

from peft_kernels.kernels.norm import reference

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

KINDS = (
    Kind(residual=True),
    Kind(rms=True, residual=True, weight="other", bias="other", wide_y=True),
    Kind(weight=None, bias=None, wide_y=True),
    Kind(rms=True, weight="own", bias=None),
)
FULL = KINDS[0]


@pytest.fixture(scope="module")
def cache(pytestconfig):
    return pytestconfig.cache.mkdir("cuda_host")


@pytest.fixture(scope="module")
def libs(cache):
    return library(cache, norm.FORWARD), library(cache, norm.BACKWARD)


@pytest.fixture(scope="module")
def run(libs) -> Run:
    return norm.run_on(*libs)


def padded(tensor, by: int = 16):
    """The same rows, further apart."""
    return None if tensor is None else torch.cat([tensor, tensor.new_zeros(len(tensor), by)], 1)[:, : tensor.shape[1]]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", norm.DTYPES, ids=str)
@pytest.mark.parametrize("pieces", [1, 2, 3, 31, 32, 33, 127, 129])
def test_short_rows(run, pieces, dtype, kind):
    """Teams of 1 to 32 lanes, and of several warps; M odd, and more rows than the grid has teams."""
    K = pieces * (16 // dtype.itemsize)
    for M in (1, 201 if pieces < 4 else 37 if pieces < 100 else 5):
        check(run, data(M, K, dtype, "cpu", kind))


LONG = (
    (512, torch.bfloat16, 0),
    (516, torch.float16, 3),
    (1024, torch.bfloat16, 0),
    (1025, torch.float16, 1),
    (1026, torch.float32, 3),
    (2049, torch.bfloat16, 0),
    (3072, torch.float32, 2),
    (3073, torch.bfloat16, 0),
    (4099, torch.float32, 1),
)
"""Pieces of 16 bytes, dtype, and which of KINDS."""


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_rows(run, case):
    """One and two pieces per thread beside the sums; dx by itself, held and read twice; the forward's 4, 8 and loop."""
    pieces, dtype, kind = case
    check(run, data(3 if pieces < 2000 else 2, pieces * (16 // dtype.itemsize), dtype, "cpu", KINDS[kind]))


@pytest.mark.parametrize("dtype", norm.DTYPES, ids=str)
def test_rows_apart(run, dtype):
    for kind in KINDS[:2]:
        for M, K in ((1, 40), (37, 264), (5, 1096)):
            one = data(M, K, dtype, "cpu", kind)
            apart = {name: padded(getattr(one, name), by) for name, by in
                     (("x", 8), ("residual", 16), ("dy", 24), ("dtotal", 32))}  # fmt: skip
            check(run, replace(one, **apart))
            check(run, replace(one, x=one.x[:1].expand(M, K), dy=one.dy[:1].expand(M, K)))
    one = data(2, 33_000, dtype, "cpu", FULL)
    check(run, replace(one, x=padded(one.x), residual=padded(one.residual, 8), dy=padded(one.dy, 24)))


@pytest.mark.parametrize("sm_count", [1, 7, 132])
@pytest.mark.parametrize(("M", "K"), [(0, 8), (2, 264), (1003, 24), (203, 264)])
def test_any_number_of_sms(libs, M, K, sm_count):
    for kind in KINDS[:2]:
        check(norm.run_on(*libs, sm_count), data(M, K, torch.bfloat16, "cpu", kind))


def test_little_shared_memory(libs):
    """Where a block's sums do not fit, dx and the sums are two launches."""
    run = norm.run_on(*libs, shared_bytes=48 << 10)
    for K in (4096, 8192):
        check(run, data(5, K, torch.bfloat16, "cpu", FULL))


@pytest.mark.parametrize("dtype", norm.DTYPES, ids=str)
@pytest.mark.parametrize("K", [40, 600, 4104])
def test_any_parameters(run, K, dtype):
    """Weight and bias of any of the three dtypes, each with each."""
    one = data(3, K, dtype, "cpu", FULL)
    for weight in norm.DTYPES:
        check(run, replace(one, weight=one.weight.to(weight)))
        for bias in norm.DTYPES:
            check_outputs(run, replace(one, weight=one.weight.to(weight), bias=one.bias.to(bias)))


@pytest.mark.parametrize("dtype", norm.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(21, 88), (5, 1096), (3, 8200), (2, 20_480)])
def test_each_subset_of_gradients(run, shape, dtype):
    for kind in (FULL, Kind(rms=True, wide_y=True)):
        one = data(*shape, dtype, "cpu", kind)
        given = norm_checks.given_statistics(one.x, one)
        for out in {dtype, torch.float32}:
            found = norm_checks.Statistics.given(*given)
            truth = norm_checks.bounds_norm.backward(one.dy, one.dtotal, one.x, found, one.weight, one.rms, out, dtype)
            for bits in range(8):
                check_gradients(run, one, one.x, *given, truth, out, tuple(bool(bits >> i & 1) for i in range(3)))


@pytest.mark.parametrize("dtype", norm.DTYPES, ids=str)
def test_constant_rows(run, dtype):
    """var = 0: eps alone keeps rstd finite."""
    for value in (0.0, 1.0, -0.3):
        one = data(6, 104, dtype, "cpu", Kind())
        check(run, replace(one, x=torch.full_like(one.x, value), dy=one.dy / 2**14))


@pytest.mark.parametrize("dtype", norm.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["check_offsets", "check_rows_not_finite", "check_sums_not_finite", "check_tiny"])
def test_the_ops_own_checks(run, name, dtype):
    """Calls that the kernels do not take go where the extension sends them: elsewhere."""

    def or_reference(kernel, otherwise):
        def call(*args):
            try:
                return kernel(*args)
            except norm.NotTaken:
                return otherwise(*args)

        return call

    both = Run(or_reference(run.fwd, reference.norm_fwd), or_reference(run.bwd, reference.norm_bwd))
    getattr(norm_checks, name)(both, dtype, "cpu")


def test_rows_more_than_2_31_apart(run, tmp_path):
    """Rows of a sparse file of 9 GB."""
    apart = 2**31 + 8
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=apart + 8, dtype=torch.bfloat16)
    one = data(2, 8, torch.bfloat16, "cpu", FULL)
    for name in ("x", "residual", "dy", "dtotal"):
        far = flat.as_strided((2, 8), (apart, 1)).copy_(getattr(one, name))
        check(run, replace(one, **{name: far}))


def taken(libs, **changes) -> tuple[int, int]:
    """Whether forward and backward take a call [5, 16] of bf16, everything on 16 bytes but for the changes."""
    both = []
    for lib, kind, name in zip(libs, (norm.Forward, norm.Backward), ("norm_fwd", "norm_bwd"), strict=True):
        args = kind(M=5, K=16, x_row_stride=16, dy_row_stride=16, residual_row_stride=16, need_dx=1)
        for field, value in changes.items():
            setattr(args, field, value)
        both.append(getattr(lib, f"{name}_takes")(ctypes.byref(args)))
    return tuple(both)


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, (1, 1)), ({"K": 0}, (0, 0)), ({"K": 12}, (0, 0)), ({"K": 12, "dtype": 2, "x_row_stride": 12}, (1, 1)),
    ({"M": -1}, (0, 0)), ({"dtype": 3}, (0, 0)), ({"x": 24}, (0, 0)), ({"x_row_stride": 20}, (0, 0)),
    ({"x_row_stride": 20, "M": 1}, (1, 1)), ({"x_row_stride": -16}, (0, 0)), ({"residual": 8}, (0, 1)),
    ({"residual": 16, "residual_row_stride": 17}, (0, 1)), ({"dy": 8}, (1, 0)), ({"dy_row_stride": 4}, (1, 0)),
    ({"dy_row_stride": 20, "dy_fp32": 1}, (1, 1)), ({"dtotal": 8}, (1, 0)), ({"weight": 8}, (0, 0)),
    ({"weight": 8, "dtype": 2}, (1, 1)), ({"weight": 8, "dtype": 2, "weight_dtype": 2}, (0, 0)), ({"bias": 8}, (0, 1)),
    ({"weight": 16, "weight_dtype": 3}, (0, 0)), ({"y": 8}, (0, 1)), ({"dx": 8}, (1, 0)), ({"K": 2**23}, (0, 0)),
    ({"dtotal": 8, "x": 8, "need_dx": 0}, (0, 1)), ({"M": 2**31}, (0, 0)),
], ids=str)  # fmt: skip
def test_what_is_taken(libs, changes, expected):
    assert taken(libs, **changes) == expected


@pytest.mark.parametrize(("M", "K"), [(2**30, 8), (2**30, 1024), (2**30, 2**22), (3, 2**22)])
def test_workspace_of_huge_shapes(libs, M, K):
    """Few sums for the rows that there are, and 2**27 rows per thread at most."""
    gpu = norm.Gpu(132, norm.H100)
    for need_dx in (0, 1):
        args = norm.Backward(M=M, K=K, x_row_stride=K, dy_row_stride=K, need_dx=need_dx, need_dweight=1, need_dbias=1)
        parts, left = divmod(norm.workspace_bytes(libs[1], args, gpu), 2 * 4 * K)
        assert left == 0 and 1 <= parts <= 132 * 16 and M / parts <= 2**27 * 256


def test_wrong_calls(libs):
    """An error, not a crash: outputs, inputs or the workspace missing, no GPU, no such rows."""
    forward, backward = libs
    gpu, zero = norm.Gpu(2, norm.H100), norm.Gpu(0, norm.H100)
    assert forward.norm_fwd_cuda(ctypes.byref(norm.Forward(M=5, K=16, x_row_stride=16)), None) == 1
    assert forward.norm_fwd_cuda(ctypes.byref(norm.Forward(M=5, K=15, x_row_stride=16)), None) == 1
    with memory(backward) as device:
        there = {name: at(device.put(torch.ones(16), align=16)) for name in ("dy", "x", "rstd", "mean", "dx", "dbias")}
        args = norm.Backward(M=1, K=16, need_dx=1, need_dbias=1, **there)
        assert norm.workspace_bytes(backward, args, gpu) > 0 and norm.workspace_bytes(backward, args, zero) == 0
        assert backward.norm_bwd_cuda(ctypes.byref(args), ctypes.byref(gpu), None) == 1, "no workspace"
        args.workspace = at(device.empty((1024,), torch.float32, align=16))
        assert backward.norm_bwd_cuda(ctypes.byref(args), ctypes.byref(zero), None) == 1, "no SMs"
        assert backward.norm_bwd_cuda(ctypes.byref(args), ctypes.byref(gpu), None) == 0, backward.simt_error()
        args.rstd = None
        assert backward.norm_bwd_cuda(ctypes.byref(args), ctypes.byref(gpu), None) == 1, "no rstd"
