"""The activation pass's CUDA kernels, run on a CPU: values within the bound of tests/bounds_act.py in every layout."""

import ctypes

import act_checks as checks
import pytest
import torch
from act_checks import ACTIVATIONS, SMOOTH, mask_of, pair
from cuda_host.act import DTYPES, SOURCE, act_bwd, call, relu_fwd, workspace_bytes
from cuda_host.bias_grad import LAYOUTS
from cuda_host.build import CXX, library
from cuda_host.memory import memory

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

_ACT, _SLOPE = "csrc/bias_grad/act.cu", "csrc/common/activations.cuh"
FAULTS = {
    "z's rows": (_ACT, "z + row * z_row + column)", "z + row * dy_row + column)"),
    "upper half of a byte": (_ACT, "raw.bits >> (column % 8);", "raw.bits;"),
    "kept by the mask's stride": (_ACT, "column / 8 * mask_column", "column / 8"),
    "y on one place": (_ACT, "from_float(out[c], y[row * N + column + c])", "from_float(out[c], y[row * N + column])"),
    "z for dz": (_ACT, "out[0] = __fmul_rn(to_float(raw.dy), slope);", "out[0] = slope;"),
    "alignment of z": (_ACT, "wide_rows(a.kept, a.kept_row, a.kept_column, a.M, wide)", "true"),
    "alignment of dz": (_ACT, "on_16_bytes(a.dz) && kept", "kept"),
    "end of the visit": (_ACT, "    if (row + i * step < end) rows.values", "    rows.values"),
    "the sums in 16 bits twice": (_ACT, "float* sums = direct ? static_cast<float*>(a.dbias) : a.workspace;",
                                  "float* sums = static_cast<float*>(a.dbias);"),
    "NaN stopped": (_ACT, "!(z[c] <= 0.0f)", "z[c] > 0.0f"),
    "bits past N": (_ACT, "column + c < N ? to_float(raw.z[c]) : 0.0f", "column + c < N ? to_float(raw.z[c]) : 1.0f"),
    "NaN cut": (_SLOPE, "fabsf(z) > most ? most : fabsf(z)", "fabsf(z) < most ? fabsf(z) : most"),
    "the tail's side": (_SLOPE, "z > 0.0f ? 1.0f - tail : tail", "z > 0.0f ? tail : 1.0f - tail"),
    "a digit of gelu": (_SLOPE, "0.896195313196f", "0.896205313196f"),
    "gelu_tanh's slope": (_SLOPE, "3 * kCube", "2 * kCube"),
    "gelu for gelu_tanh": (_ACT, "return run_wide<T, GeluTanhSlope>", "return run_wide<T, GeluSlope>"),
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(pytestconfig):
    return pytestconfig.cache.mkdir("cuda_host")


@pytest.fixture(scope="module")
def lib(cache):
    return library(cache, SOURCE)


def run_of(lib, layout: str = "contiguous", sm_count: int = 2) -> checks.Run:
    """The ops on this CPU, their inputs moved into the shim's memory in this layout, in both orders of threads."""

    def both_orders(run) -> tuple[torch.Tensor, torch.Tensor]:
        with memory(lib) as device:
            results = []
            for reverse in (0, 1):
                lib.simt_reverse(reverse)
                try:
                    results.append([out.clone() for out in run(device)])
                finally:
                    lib.simt_reverse(0)
        for first, second in zip(*results, strict=True):
            assert torch.equal(first.nan_to_num(), second.nan_to_num()), "it depends on the order of threads or blocks"
        return tuple(results[0])

    def backward(dy, kept, *rest):
        place = LAYOUTS[layout]
        return both_orders(lambda device: act_bwd(lib, device, place(device, dy), place(device, kept), *rest, sm_count))

    def forward(z):
        return both_orders(lambda device: relu_fwd(lib, device, LAYOUTS[layout](device, z), sm_count))

    return checks.Run(forward, backward)


def check(lib, shape, activation, dtype, layout="contiguous", sm_count=2, out=None) -> None:
    dy, z = pair(*shape, dtype, "cpu")
    if layout == "one_row":
        dy, z = dy[:1].expand(shape).contiguous(), z[:1].expand(shape).contiguous()
    run = run_of(lib, layout, sm_count)
    checks.check(run, dy, z, activation, out)
    if activation == "relu":
        checks.check_relu(run, z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values(lib, layout, activation, dtype):
    for shape in ((1, 8), (37, 3), (37, 72), (300, 1), (131, 264)):
        check(lib, shape, activation, dtype, layout, out=torch.float32)
    check(lib, (517, 40), activation, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_checks(lib, activation, dtype):
    run = run_of(lib)
    for one in (checks.check_not_finite, checks.check_needs, checks.check_tiny):
        one(run, activation, dtype, "cpu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_number(lib, activation):
    checks.check_every_number(run_of(lib), activation, torch.bfloat16, "cpu")


@pytest.mark.parametrize("sm_count", [1, 7, 132])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("shape", [(4099, 8), (1030, 256), (2000, 3), (300, 2056)])
def test_any_number_of_sms(lib, shape, activation, sm_count):
    check(lib, shape, activation, torch.bfloat16, sm_count=sm_count)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_that_are_not_on_16_bytes(lib, activation):
    dy, z = pair(37, 40, torch.bfloat16, "cpu")
    kept = mask_of(z) if activation == "relu" else z
    with memory(lib) as device:
        given = device.put(dy, align=16), device.put(kept, align=16)
        expected = act_bwd(lib, device, *given, activation, True, True, torch.float32)
        # 37 * 40 elements of 2 bytes before a page end on 2 bytes, not on 16, for an odd number of elements.
        flat = device.empty((37 * 40 + 1,), torch.bfloat16, align=16)
        args = call(*given, activation, True)
        dbias = device.empty((40,), torch.float32)
        args.dz, args.dbias = flat.data_ptr() + 2, dbias.data_ptr()
        workspace = device.empty((workspace_bytes(lib, args, 2) // 4,), torch.float32)
        args.workspace = workspace.data_ptr()
        assert lib.act_bwd_cuda(ctypes.byref(args), 2, None) == 0
        assert torch.equal(flat[1:].view(37, 40), expected[0])
        torch.testing.assert_close(dbias, expected[1])


@pytest.mark.parametrize("activation", SMOOTH)
def test_elements_more_than_2_31_apart(lib, activation, tmp_path):
    apart = 2**31 + 8
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * apart + 8, dtype=torch.bfloat16)
    for size, strides in (((3, 8), (apart, 1)), ((3, 7), (apart, 1)), ((8, 3), (1, apart))):
        dy, z = pair(*size, torch.bfloat16, "cpu")
        far = flat.as_strided(size, strides)
        for kind, place in (("dy", dy), ("z", z)):
            far.copy_(place)
            with memory(lib) as device:
                near = device.put(z if kind == "dy" else dy, align=16)
                given = (far, near) if kind == "dy" else (near, far)
                got = act_bwd(lib, device, *given, activation, True, True, torch.float32)
                run = checks.Run(relu_fwd, lambda *_, got=got: [out.clone() for out in got])
                checks.check(run, dy, z, activation, torch.float32)


def test_wrong_calls(lib):
    with memory(lib) as device:
        dy = device.put(torch.ones(4000, 8))
        args, dbias = call(dy, dy, "gelu", True), device.empty((8,), torch.float32)
        args.dbias = dbias.data_ptr()
        assert workspace_bytes(lib, args, 2) > 0
        assert lib.act_bwd_cuda(ctypes.byref(args), 2, None) == 1, "no workspace"
        assert lib.act_bwd_cuda(ctypes.byref(args), 0, None) == 1, "no SMs"
        for name, value in (("dtype", 3), ("activation", 4), ("kept", None)):
            wrong = call(dy, dy, "gelu", True)
            wrong.dz = dbias.data_ptr()
            setattr(wrong, name, value)
            assert lib.act_bwd_cuda(ctypes.byref(wrong), 2, None) == 1, f"{name} is {value}"


def all_checks(lib) -> None:
    """What the planted faults go through: every kernel, several parts, ragged rows, rows on 16 bytes and off them."""
    for dtype in (torch.bfloat16, torch.float32):
        for activation in ACTIVATIONS:
            for layout in ("contiguous", "spread", "unaligned"):
                check(lib, (139, 40), activation, dtype, layout)
            dy, z = pair(139, 40, dtype, "cpu")
            _mixed(lib, dy, z, activation)
            checks.check_needs(run_of(lib), activation, dtype, "cpu")
            checks.check_not_finite(run_of(lib), activation, dtype, "cpu")
    test_outputs_that_are_not_on_16_bytes(lib, "gelu")


def _mixed(lib, dy, z, activation) -> None:
    """dy and z in layouts of their own: padded and odd rows, dense ones."""
    kept = mask_of(z) if activation == "relu" else z
    for of_dy, of_kept in (("contiguous", "padded"), ("padded", "contiguous"), ("odd_rows", "contiguous")):
        for places in ((of_dy, of_kept), (of_kept, of_dy)):
            with memory(lib) as device:
                given = LAYOUTS[places[0]](device, dy), LAYOUTS[places[1]](device, kept)
                got = [out.clone() for out in act_bwd(lib, device, *given, activation, True, True, torch.float32)]
                alone, _ = act_bwd(lib, device, *given, activation, True, False, torch.float32)
                assert torch.equal(got[0], alone), "dz differs without sums"
            checks.check(checks.Run(relu_fwd, lambda *_, got=got: got), dy, z, activation, torch.float32)


def test_the_checks_pass_without_a_fault(lib):
    all_checks(lib)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(cache, fault):
    with pytest.raises((AssertionError, RuntimeError)) as seen:
        all_checks(library(cache, SOURCE, [FAULTS[fault]]))
    assert "failed:" not in str(seen.value), "the fault does not compile"
